"""The part `eval-v2` of scripts/prepare_mmeb.py: tables and media of MMEB-V2 for chosen tasks.

Fills OUT/hub with the tables (`OWNER/NAME/[CONFIG/]SPLIT.parquet`, pages of documents included, so that no archive of
pages is needed, and of the two page sets the fixed ones) and OUT/data with images and frames from the archives of
TIGER-Lab/MMEB-V2. Of an archive only what the chosen tasks need is extracted.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from b3.console import num_bytes
from b3.data import copies, tarballs
from b3.data.archives import MARKERS, RemoteFile
from b3.errors import DataError, InputError
from b3.eval.benchmarks.mmeb_v2.benchmark import MMEB_V2, load_task
from b3.eval.benchmarks.mmeb_v2.table import TASKS, V2Task
from b3.eval.benchmarks.mmeb_v2.video_qa import MVBENCH
from b3.files import atomic, tidy, write_json

REPOSITORY = "TIGER-Lab/MMEB-V2"
ARCHIVES = {  # by group: how the paths of their archives begin
    **dict.fromkeys(("I-CLS", "I-QA", "I-RET", "I-VG"), "image-tasks/"),
    "V-CLS": "video-tasks/frames/video_cls",
    "V-QA": "video-tasks/frames/video_qa",
    "V-RET": "video-tasks/frames/video_ret",
    "V-MRET": "video-tasks/frames/video_mret",
}
_PART = re.compile(r"^(.*\.tar(?:\.gz)?)(?:[-.]\d+)?$")
Table = tuple[str, str, str]  # repository, configuration, split


def choose(names: Sequence[str] | None) -> list[V2Task]:
    """The tasks of names, groups or modalities; None: all 78. Raises `InputError` for an unknown one."""
    chosen = MMEB_V2.expand(list(names or ["all"]), [])
    by_name = {task.name: task for task in TASKS}
    unknown = next((name for name in chosen if name not in by_name), None)
    if unknown is not None:
        raise InputError(f"MMEB-V2 has no task '{unknown}'; choose names, groups, image, video, visdoc or all")
    return [by_name[name] for name in chosen]


def tables_of(tasks: Iterable[V2Task]) -> list[Table]:
    """All tables that tasks read, each once."""
    tables: dict[Table, None] = {}
    for task in tasks:
        configs = [task.config]
        if task.modality == "visdoc":
            configs = ["queries", "qrels", "corpus"]
        elif task.config == "*":
            configs = MVBENCH
        tables.update(dict.fromkeys((task.hub, config, task.split) for config in configs))
    return list(tables)


def archives_of(files: Iterable[RemoteFile], tasks: Iterable[V2Task]) -> dict[str, list[RemoteFile]]:
    """Archives that tasks need, as the parts of each in order. Raises `InputError` naming a group without one."""
    groups: dict[str, list[RemoteFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        found = _PART.match(file.path)
        if found:
            groups.setdefault(found[1], []).append(file)
    result: dict[str, list[RemoteFile]] = {}
    for group in dict.fromkeys(task.family for task in tasks if task.family in ARCHIVES):
        own = {name: parts for name, parts in groups.items() if name.startswith(ARCHIVES[group])}
        if not own:
            raise InputError(f"{REPOSITORY} has no archive {ARCHIVES[group]}*.tar.gz; its layout may have changed")
        result.update(own)
    return result


def place_of(archive: str, tasks: Sequence[V2Task], image_paths: set[str] | None) -> Callable[[str], str | None]:
    """Where a member goes below the data folder, None for what the tasks do not need.

    Archives are packed from different depths: with the whole path, from frames/ on, from their own name on, or below.
    """
    stem = PurePosixPath(archive).name.split(".")[0]
    is_image = archive.startswith("image-tasks/")
    home = "image-tasks" if is_image else f"video-tasks/frames/{stem}"
    folders = tuple(f"{place}/" for task in tasks for place in task.folder.split("|"))

    def place(name: str) -> str | None:
        first = PurePosixPath(name).parts[0]
        if first in ("image-tasks", "video-tasks"):
            path = name
        elif first == "frames":
            path = f"video-tasks/{name}"
        elif first == stem and not is_image:
            path = f"video-tasks/frames/{name}"
        else:
            path = f"{home}/{name}"
        if is_image and image_paths is not None:
            inside = path.removeprefix("image-tasks/").removeprefix("MMEB/")
            return path if inside in image_paths else None
        return path if path.startswith(folders) else None

    return place


def copy_tables(tables: Iterable[Table], source: Path, hub: Path) -> None:
    """Copy tables of a local copy of the hub, skipping those there with the right size. Raises `InputError`."""
    for repository, config, split in tables:
        root = source / repository
        found = [*(root / config).glob(f"{split}*.parquet"), *(root / config / "data").glob(f"{split}*.parquet")]
        if not found:
            raise InputError(f"--source has no {repository}/{config + '/' if config else ''}{split}*.parquet")
        for file in found:
            target = hub / repository / config / file.name
            if not (target.is_file() and target.stat().st_size == file.stat().st_size):
                with atomic(target) as stream, file.open("rb") as original:
                    shutil.copyfileobj(original, stream)


def fetch_tables(tables: Iterable[Table], hub: Path) -> None:
    """Load tables by the `datasets` library, whatever their layout on the hub, and keep them as parquet."""
    import datasets

    for repository, config, split in tables:
        target = hub / repository / config / f"{split}.parquet"
        if target.is_file():
            continue
        try:
            table = datasets.load_dataset(repository, config or None, split=split)
        except Exception as error:  # the library raises many types, some from its own dependencies
            raise InputError(
                f"{repository} {config} {split} cannot be loaded ({copies.first_line(error)}); run the same command"
                " again to continue"
            ) from None
        with atomic(target) as stream:
            table.to_parquet(stream)
        print(f"{repository}{'/' + config if config else ''}: {table.num_rows:,} rows", flush=True)


def marker_of(out: Path, archive: str) -> Path:
    return out / MARKERS / (archive.replace("/", "__") + ".json")


def is_done(out: Path, archive: str, parts: Sequence[RemoteFile], tasks: Sequence[V2Task]) -> bool:
    """Whether an earlier run extracted this archive for these tasks or more."""
    try:
        marker = json.loads(marker_of(out, archive).read_text())
    except (OSError, ValueError):
        return False
    same = marker.get("sizes") == [part.size for part in parts]
    return same and set(marker.get("tasks", ())).issuperset(task.name for task in tasks)


def prepare(arguments: argparse.Namespace) -> int:
    """Do what is missing; prints the bytes first, and at the end what each task holds."""
    out, source = arguments.out, arguments.source
    tasks = choose(arguments.tasks or arguments.subsets)
    tables = tables_of(tasks)
    root = None if source is None else source / REPOSITORY
    needs_archives = any(task.family in ARCHIVES for task in tasks)
    listed = list_files(root, arguments.revision) if needs_archives else []
    archives = archives_of(listed, tasks)
    todo = {name: parts for name, parts in archives.items() if not is_done(out, name, parts, tasks)}
    say_sizes(tables, todo, archives, source, out)
    hub, data = out / "hub", out / "data"
    if todo:
        tidy(out)
    if source is not None:
        copy_tables(tables, source, hub)
    else:
        fetch_tables(tables, hub)
        wanted = [file for parts in todo.values() for file in parts]
        copies.download(REPOSITORY, wanted, out / "archives", arguments.revision)
    images = [task for task in tasks if task.modality == "image"]
    paths = None if len(images) == 36 else image_paths(images, hub)
    for name, parts in todo.items():
        own = [task for task in tasks if task.family in ARCHIVES and name.startswith(ARCHIVES[task.family])]
        files = [(root or out / "archives") / part.path for part in parts]
        written = tarballs.extract(files, data, place_of(name, own, paths), progress=True)
        before = json.loads(marker_of(out, name).read_text())["tasks"] if marker_of(out, name).exists() else []
        names = sorted({*before, *(task.name for task in tasks)})
        write_json(marker_of(out, name), {"sizes": [part.size for part in parts], "tasks": names})
        print(f"{name}: {written:,} files extracted", flush=True)
    check(tasks, hub, data)
    print(f"ready: --benchmark mmeb_v2 --dataset_name {hub} --data_basedir {data}")
    return 0


def list_files(root: Path | None, revision: str | None) -> list[RemoteFile]:
    return copies.list_source(root) if root else copies.list_hub(REPOSITORY, revision)


def image_paths(tasks: Sequence[V2Task], hub: Path) -> set[str]:
    """Paths that the rows of image tasks name."""
    files = [file for task in tasks for file in (hub / task.hub / task.config).glob(f"{task.split}*.parquet")]
    return copies.image_paths(files)


def say_sizes(
    tables: Sequence[Table],
    todo: dict[str, list[RemoteFile]],
    archives: dict[str, list[RemoteFile]],
    source: Path | None,
    out: Path,
) -> None:
    """Print what is to be done in bytes. Raises `InputError` if it does not fit."""
    repositories = dict.fromkeys(repository for repository, _, _ in tables)
    missing = [name for name in repositories if not (out / "hub" / name).is_dir()]
    if source is not None:
        sizes = [p.stat().st_size for name in missing for p in (source / name).rglob("*.parquet")]
    else:
        sizes = [file.size for name in missing for file in copies.list_hub(name)]
    of_archives = sum(part.size for parts in todo.values() for part in parts)
    of_tables = sum(sizes)
    print(
        f"{len(tables)} tables of {len(repositories)} repositories, {num_bytes(of_tables)} of them missing;"
        f" {len(todo)} archives to extract, {len(archives) - len(todo)} extracted before"
    )
    download = of_tables + (0 if source is not None else of_archives)
    unpacked = int(of_archives * copies.GROWTH)
    free = copies.check_space(out, download + unpacked)
    verb = "to copy" if source is not None else "to download"
    print(f"{num_bytes(download)} {verb}, up to {num_bytes(unpacked)} to extract; {num_bytes(free)} free", flush=True)


def check(tasks: Sequence[V2Task], hub: Path, data: Path) -> None:
    """Load each task as an evaluation would and print a line. Raises `DataError` if one cannot be loaded."""
    problems = []
    for task in tasks:
        try:
            dataset = load_task(str(hub), task.name, image_dir=str(data) if data.is_dir() else None)
        except DataError as error:
            problems.append(str(error))
            print(f"{task.name:46} {error}")
            continue
        state = "" if len(dataset) == task.num_rows else f"; {task.num_rows:,} are published"
        print(f"{task.name:46} {len(dataset):>6,} queries, {len(dataset.candidates):>6,} candidates{state}")
    if problems:
        raise DataError(
            f"{len(problems)} of {len(tasks)} tasks are not complete, the first: {problems[0]};"
            f" delete {data.parent / MARKERS} and run the same command again"
        )
