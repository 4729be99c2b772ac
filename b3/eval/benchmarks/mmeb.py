"""The evaluation subsets, their families and whether their data set was trained on.

MMEB's 36 image subsets: 10 classification, 10 VQA, 12 retrieval, 4 visual grounding; 20 in domain (IND), 16 out (OOD).
The overall number is the plain mean over subsets (paper, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = ("Classification", "VQA", "Retrieval", "Visual grounding")


@dataclass(frozen=True, slots=True)
class Task:
    """A subset: its family, and whether it is in domain (None where that has no meaning)."""

    name: str
    family: str
    in_domain: bool | None


_MMEB = {
    "Classification": (
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
        "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ),
    "VQA": ("OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W", "ScienceQA VizWiz GQA TextVQA"),
    "Retrieval": (
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "FashionIQ Wiki-SS-NQ OVEN EDIS",
    ),
    "Visual grounding": ("MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
}
_EMOJI = {
    "Classification": "emoji_cls",
    "VQA": "emoji_vqa",
    "Retrieval": "emoji_t2i emoji_i2t emoji_i2i",
    "Visual grounding": "emoji_vg",
}

MMEB: tuple[Task, ...] = tuple(
    Task(name, family, in_domain)
    for family, both in _MMEB.items()
    for in_domain, names in zip((True, False), both, strict=True)
    for name in names.split()
)
EMOJI: tuple[Task, ...] = tuple(Task(name, family, None) for family, names in _EMOJI.items() for name in names.split())
TASKS: dict[str, Task] = {task.name: task for task in (*MMEB, *EMOJI)}


def family_of(subset: str) -> str:
    """Family of a subset; 'Other' for data of the user's own."""
    return TASKS[subset].family if subset in TASKS else "Other"


def expand(names: list[str], available: list[str]) -> list[str]:
    """Subset names from the command line, each once.

    'all' means all that the source lists, or MMEB's 36 if it cannot list them; a family ('vqa', 'Visual grounding',
    'visual-grounding') means its subsets among those.
    """
    everything = available or [task.name for task in MMEB]
    families = {family.lower().replace(" ", "-"): family for family in FAMILIES}
    result: list[str] = []
    for name in names:
        family = families.get(name.lower().replace(" ", "-"))
        if name == "all":
            result += everything
        elif family is not None and name not in everything:
            result += [subset for subset in everything if family_of(subset) == family]
        else:
            result.append(name)
    return list(dict.fromkeys(result))
