"""Questions about a video with a few answers each: one function per data set, since every one has its own columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from b3.data.items import Item
from b3.data.prompts import VIDEO_PLACEHOLDER
from b3.errors import DataError
from b3.eval.benchmarks.mmeb_v2.harness import Harness
from b3.eval.benchmarks.mmeb_v2.source import Source
from b3.eval.benchmarks.mmeb_v2.table import Load, V2Task
from b3.eval.ranked import Name, RankedQuery, RankedSet

Row = dict[str, Any]
Choices = dict[str, str]  # by name, the text that is encoded
MVBENCH = (  # configurations, in the reference's order
    "episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action"
    " object_existence object_interaction object_shuffle moving_direction action_localization scene_transition"
    " action_count moving_count moving_attribute state_change fine_grained_pose character_order egocentric_navigation"
    " counterfactual_inference"
).split()


def video_mme(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """An answer is the letter of its option. An option without ". " becomes its last character ("vlm2vec")."""
    answers = _Answers(task, source, harness)
    columns, more = ("question", "videoID", "options", "answer"), ("question_id", "domain", "sub_category")
    for number, row in enumerate(source.rows(task.hub, task.config, task.split, columns, more)):
        options = row["options"]
        right = ord(row["answer"][:1] or " ") - ord("A")
        answers.check(number, row["answer"], right, options)
        whole = harness.is_chat  # keeps an option without ". " whole
        choices = {option: answers.text(option, whole) for option in options}
        body = row["question"] + "\n" + "\n".join(options)
        info = {"answer": row["answer"], "label_name": options[right], "answer_idx": right}
        info |= {"domain": row["domain"], "sub_category": row["sub_category"]}
        answers.add(number, row["question_id"], row["videoID"], body, options, choices, info)
    return answers.finish()


def nextqa(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """Five answers; equal ones have one vector, and either copy counts."""
    answers = _Answers(task, source, harness)
    columns = ("video", "question", "answer", *(f"a{i}" for i in range(5)))
    for number, row in enumerate(source.rows(task.hub, task.config, task.split, columns, ("qid", "type"))):
        options = [row[f"a{i}"] for i in range(5)]
        answers.check(number, row["answer"], row["answer"], options)
        names = [f"({chr(65 + i)}) {option}" for i, option in enumerate(options)] if harness.is_chat else options
        right = row["answer"]
        info = {"answer": options[right], "label_name": names[right], "answer_idx": right, "type": row["type"]}
        body = template(row["question"], options)
        answers.add(number, row["qid"], row["video"], body, names, {name: name for name in names}, info)
    return answers.finish()


def egoschema(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """As Video-MME; options follow the question without a space ("vlm2vec")."""
    answers = _Answers(task, source, harness)
    columns = ("video_idx", "question", "answer", "option")
    for number, row in enumerate(source.rows(task.hub, task.config, task.split, columns, ("question_idx",))):
        options, answer = row["option"], str(row["answer"])
        right = int(answer) if answer.isdigit() else -1
        answers.check(number, answer, right, options)
        body = row["question"] + (" " if harness.is_chat else "") + " ".join(options)
        info = {"answer": options[right], "label_name": options[right], "answer_idx": right}
        choices = {option: answers.text(option, False) for option in options}
        answers.add(number, row["question_idx"], row["video_idx"], body, options, choices, info)
    return answers.finish()


def activitynetqa(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """Yes or no."""
    answers = _Answers(task, source, harness)
    columns = ("video_name", "question", "answer")
    options = ["yes", "no"]
    for number, row in enumerate(source.rows(task.hub, task.config, task.split, columns, ("question_id",))):
        right = options.index(row["answer"]) if row["answer"] in options else -1
        answers.check(number, row["answer"], right, options)
        info = {"answer": row["answer"], "label_name": row["answer"], "answer_idx": right}
        body = row["question"] + "? (A) yes; (B) no."
        choices = {name: name for name in options}
        answers.add(
            number, row["question_id"], row["video_name"], body, options, choices, info, f"v_{row['video_name']}"
        )
    return answers.finish()


def mvbench(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """Twenty configurations in one task. An answer that is no candidate is never right; such rows are counted."""
    answers = _Answers(task, source, harness)
    columns = ("question", "video", "candidates", "answer")
    for subset in MVBENCH:
        for number, row in enumerate(source.rows(task.hub, subset, task.split, columns)):
            options = row["candidates"]
            right = options.index(row["answer"]) if row["answer"] in options else -1
            if right < 0:
                source.counts[f"answers of {task.name} that are no candidate, never right"] += 1
            names = [f"({chr(65 + i)}) {option}" for i, option in enumerate(options)]
            label = f"({chr(65 + right)}) {row['answer']}"
            info = {"answer": label, "label_name": label, "answer_idx": right}
            body, choices = template(row["question"], options), {name: name for name in names}
            answers.add(number, None, row["video"], body, names, choices, info, f"{subset}/{row['video']}", subset)
    return answers.finish()


def template(question: str, options: list[str]) -> str:
    """Question, ``Options:``, and the options with letters, a line each; white space at the end is cut."""
    lines = "".join(f"({chr(65 + i)}) {option}\n" for i, option in enumerate(options))
    return f"{question}\nOptions:\n{lines}".rstrip()


class _Answers:
    """Collects the rows of a task."""

    def __init__(self, task: V2Task, source: Source, harness: Harness) -> None:
        self.task, self.source, self.harness = task, source, harness
        self.root = source.folder(task.folder)
        self.queries: list[RankedQuery] = []
        self.candidates: dict[Name, Item] = {}
        self.instruction = task.instruction.removesuffix("Question: ").strip() if harness.is_chat else task.instruction

    def check(self, number: int, answer: Any, right: int, options: list[str]) -> None:
        """Raise `DataError` if the answer of a row is none of its options."""
        if not 0 <= right < len(options):
            raise DataError(f"{self.task.name} row {number}: answer {answer!r} is none of {len(options)} options")

    def text(self, option: str, keeps_whole: bool) -> str:
        """An option without its letter: from the first ". " on, dots and spaces cut at both ends."""
        start = option.find(". ")
        if start < 0:
            what = "kept whole" if keeps_whole else "cut to their last character, as in the reference"
            self.source.counts[f'options of {self.task.name} without ". ", {what}'] += 1
            if keeps_whole:
                return option
        return option[start:].strip(". ")

    def add(
        self, number: int, question: Any, video_name: Any, body: str, names: list[str], choices: Choices, info: Row,
        folder: str | None = None, subset: str | None = None,
    ) -> None:  # fmt: skip
        """One row. folder: of the frames, below the task's; default the video's name."""
        place: Path = self.root / (folder or str(video_name))
        where = f"{self.task.name} {subset + ' ' if subset else ''}row {number}"
        video = self.source.video(place, self.harness.num_frames, where)
        item = self.harness.query(self.instruction, body, video)
        first = {"subset": subset} if subset else {"question_id": question}
        shown = body if self.harness.is_chat else (item.text or "").replace(VIDEO_PLACEHOLDER, "<|video_pad|>")
        whole = {**first, "video_id": video_name, "query": shown, "cand_names": names, **info}
        if not self.harness.is_chat:
            paths = [self.source.name(Path(str(frame.source))) for frame in video.frames]
            whole["qry_frame_paths"] = paths
            if subset:
                whole["num_unique_qry_frame"] = len(set(paths))
        self.queries.append(RankedQuery(item, whole))
        for name, text in choices.items():
            self.candidates.setdefault(name, Item(text))

    def finish(self) -> RankedSet:
        return RankedSet(self.task.name, self.queries, self.candidates, self.task.is_local)
