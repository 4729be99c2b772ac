"""Copies of a data set's files: what there is on the hub or in a folder laid out like it, fetching it, room for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from b3.console import num_bytes
from b3.data.archives import RemoteFile
from b3.errors import DataError, InputError

# Images are compressed already: an archive that is not here yet grows by little more than its directory.
GROWTH = 1.05


def list_source(source: Path) -> list[RemoteFile]:
    """Files of a local folder laid out like the hub. Raises `InputError` if it is not a folder."""
    if not source.is_dir():
        raise InputError(f"--source {source} is not a folder; give a copy of the data set laid out like the hub's")
    paths = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    return [RemoteFile(p.as_posix(), (source / p).stat().st_size) for p in paths if not p.parts[0].startswith(".")]


def list_hub(repository: str, revision: str | None = None) -> list[RemoteFile]:
    """Files of a data set on the hub with their sizes. Raises `InputError` if it cannot be reached."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().dataset_info(repository, revision=revision, files_metadata=True).siblings or []
    except Exception as error:  # the client raises many types: offline, gated, not found
        raise InputError(f"{repository} cannot be listed ({first_line(error)}); check the connection") from None
    return [RemoteFile(s.rfilename, s.size or 0) for s in siblings]


def download(repository: str, files: Sequence[RemoteFile], out: Path, revision: str | None = None) -> None:
    """Fetch `files` below `out`; what is there already is kept, a broken-off file is continued."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            repository,
            repo_type="dataset",
            revision=revision,
            local_dir=out,
            allow_patterns=[_literal(f.path) for f in files],
        )
    except Exception as error:  # as in `list_hub`
        raise InputError(
            f"{repository} cannot be downloaded ({first_line(error)}); run the same command again to continue"
        ) from None


def check_space(out: Path, needed: int) -> int:
    """Free bytes where `out` lies. Raises `InputError` if `needed` do not fit."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{num_bytes(needed)} are needed but {out} has {num_bytes(free)} free; make room, choose another --out,"
            " or take fewer --subsets"
        )
    return free


def image_paths(files: Iterable[Path]) -> set[str]:
    """Distinct image paths in the rows of parquet files (columns ending in `image_path` or `img_path`)."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    paths: set[str] = set()
    for file in files:
        try:
            opened = pq.ParquetFile(file)
            names = [n for n in opened.schema_arrow.names if n.endswith(("image_path", "img_path"))]
            for group in range(opened.num_row_groups):
                for column in opened.read_row_group(group, columns=names).columns:
                    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                        column = pc.list_flatten(column)
                    paths.update(path for path in pc.unique(column).to_pylist() if path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{file} cannot be read as parquet ({first_line(error)}); delete it and run the same command again"
            ) from None
    return paths


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _literal(path: str) -> str:
    """A path as a glob pattern that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)
