"""What is published of B3's own models on MMEB, beside the score files of `mmeb_scores.csv`.

Means: Thirukovalluru et al. 2025 (arXiv 2505.11293), tables 1 and 2. They gave no scores by subset. Those of the
released 2B checkpoint are a third party's: PGA-KD (EMNLP 2026), and Visual7W-Pointing HieRD's. Its classification and
VQA means lie within 0.1 of the paper's. Its MSCOCO_i2t, 49.7, is 18 points below what VLM2Vec-2B has: probably
measured without the target prefix, hence doubtful. The in-domain mean with it is 70.7, with 72 in its place 71.9; the
paper's is 72.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Scores = dict[str, float]


@dataclass(frozen=True, slots=True)
class Marks:
    """Scores of one model, 0 to 1. means: of families, IND, OOD, and "mean", where they are published themselves."""

    subsets: Scores
    source: str
    means: Scores = field(default_factory=dict)
    doubtful: frozenset[str] = frozenset()


def _scores(text: str) -> Scores:
    words = text.split()
    return {name: round(float(value) / 100, 6) for name, value in zip(words[::2], words[1::2], strict=True)}


GROUPS = ("Retrieval", "Classification", "VQA", "Visual grounding", "IND", "OOD", "mean")


def _means(*percent: float) -> Scores:
    return {name: round(value / 100, 6) for name, value in zip(GROUPS, percent, strict=True)}


B3_2B = _scores(
    """
    ImageNet-1K 82.9 N24News 79.2 HatefulMemes 56.2 VOC2007 88.0 SUN397 80.9 Place365 44.7 ImageNet-A 49.7
    ImageNet-R 90.4 ObjectNet 71.7 Country211 25.7
    OK-VQA 63.0 A-OKVQA 53.5 DocVQA 92.3 InfographicsVQA 58.9 ChartQA 53.1 Visual7W 53.1 ScienceQA 40.7
    VizWiz 48.4 GQA 68.1 TextVQA 80.0
    VisDial 83.4 CIRR 60.3 VisualNews_t2i 76.0 VisualNews_i2t 79.9 MSCOCO_t2i 76.6 MSCOCO_i2t 49.7 NIGHTS 68.7
    WebQA 88.6 MSCOCO 70.5 Visual7W-Pointing 74.7
    """
)
PAPER = "means of the paper"
MARKS = {
    "B3_Qwen2_2B": Marks(
        B3_2B,
        "subsets by third parties, means of the paper",
        _means(70.85, 67.00, 61.19, 79.88, 72.11, 63.09, 68.10),
        frozenset({"MSCOCO_i2t"}),
    ),
    "B3_Qwen2_7B": Marks({}, PAPER, _means(74.1, 70.0, 66.5, 84.6, 75.9, 67.1, 72.0)),
    "b3_qwen2vl_2b": Marks({}, PAPER, _means(70.55, 66.89, 61.53, 78.15, 71.80, 62.97, 67.87)),
    "random_qwen2vl_2b": Marks({}, PAPER, _means(66.33, 66.47, 59.08, 75.30, 69.59, 60.05, 65.35)),
}
