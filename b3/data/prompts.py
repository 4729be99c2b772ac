"""Strings that surround an item: the image placeholder and the target prefixes.

Prompts are raw text: no chat template, no BOS or EOS. The placeholder of MMEB rows is replaced by the backbone's own
image token; text-only targets of 22 MMEB evaluation subsets (13 training subsets) may get a fixed prefix (paper,
Table 13).
"""

from __future__ import annotations

PLACEHOLDER = "<|image_1|>"
VIDEO_PLACEHOLDER = "<|video_1|>"

CLASS_PREFIX = "Represent the class label: "
ANSWER_PREFIX = "Represent the answer: "
CAPTION_PREFIX = "Represent the image caption: "

_CLASSIFICATION = (
    "ImageNet-1K ImageNet_1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211"
    " emoji_cls"
)
_VQA = "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA GQA TextVQA VizWiz emoji_vqa"
_CAPTION = "MSCOCO_i2t VisualNews_i2t emoji_i2t"

TARGET_PREFIXES: dict[str, str] = {
    **dict.fromkeys(_CLASSIFICATION.split(), CLASS_PREFIX),
    **dict.fromkeys(_VQA.split(), ANSWER_PREFIX),
    **dict.fromkeys(_CAPTION.split(), CAPTION_PREFIX),
}


def target_prefix(subset: str) -> str:
    """The prefix of text-only targets of `subset`; '' where the rows already carry their instruction."""
    return TARGET_PREFIXES.get(subset, "")
