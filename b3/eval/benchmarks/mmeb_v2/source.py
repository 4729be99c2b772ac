"""Where the rows and the media of MMEB-V2 lie: tables of the hub (or of a copy), and the folders of its archives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from b3.data.items import Still, Video
from b3.data.tables import load_table
from b3.data.video import frame_files
from b3.errors import DataError

Rows = list[dict[str, Any]]


@dataclass
class Source:
    """The data of one run.

    tables: folder laid out as HUB/OWNER/NAME/[CONFIG/]SPLIT*.parquet; None: the hub.
    media: folder of the unpacked archives (image-tasks/, video-tasks/, visdoc-tasks/), or None.
    lenient: a video whose folder is missing or empty becomes one that the encoder counts as unreadable.
    counts: of what is odd in the rows, by what it is.
    """

    tables: Path | None
    media: Path | None
    lenient: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    _videos: dict[tuple[Path, int | None], Video] = field(default_factory=dict)

    def location(self, repository: str) -> str:
        """A source line of `b3.data.tables`."""
        return f"hub:{repository}" if self.tables is None else f"parquet:{self.tables / repository}"

    def rows(self, repository: str, config: str, split: str, needed: Iterable[str], more: Iterable[str] = ()) -> Rows:
        """A table as dictionaries, whole images left out; `more` columns may be missing or hold nulls (None).

        Raises `DataError` naming what is missing: the table, one of the `needed` columns, or a value in one.
        """
        where = f"{repository}{'/' + config if config else ''} split {split}"
        if self.tables is not None and not any((self.tables / repository / config).glob(f"{split}*.parquet")):
            raise DataError(
                f"{where}: no {split}*.parquet in {self.tables / repository / config}; check --dataset_name, a folder"
                " laid out as OWNER/NAME/[CONFIG/]SPLIT*.parquet, or leave it out to read from the hub"
            )
        table = load_table(self.location(repository), config or ("." if self.tables else ""), split, "image")
        missing = [name for name in needed if name not in table.column_names]
        if missing:
            raise DataError(f"{where}: column(s) {', '.join(missing)} missing; found {', '.join(table.column_names)}")
        if table.num_rows == 0:
            raise DataError(f"{where}: no rows")
        rows: Rows = table.select([n for n in table.column_names if n in {*needed, *more}]).to_pylist()
        for row, record in enumerate(rows):
            for name in needed:
                if record[name] is None:
                    raise DataError(f"{where}: row {row}: {name} is empty; correct or drop the row")
            record.update({name: record.get(name) for name in more})
        return rows

    def folder(self, choices: str) -> Path:
        """The first of the folders ``a|b|c`` below `media` that exists. Raises `DataError` naming all."""
        places = choices.split("|")
        if self.media is None:
            raise DataError(f"the media of {places[0]} are needed; give --data_basedir, the folder that holds them")
        found = next((self.media / place for place in places if (self.media / place).is_dir()), None)
        if found is None:
            raise DataError(f"--data_basedir {self.media} has none of {', '.join(places)}; unpack the archive there")
        return found

    def name(self, path: Path) -> str:
        """A path below the media folder, as names and info files give it."""
        return path.relative_to(self.media).as_posix() if self.media else path.as_posix()

    def video(self, folder: Path, limit: int | None, where: str, may_be_empty: bool = False) -> Video:
        """At most `limit` frames of a folder, evenly chosen (linspace cut to integers).

        Raises `DataError` beginning with `where` for a folder that is missing or (unless it may be) without frames.
        """
        key = (folder, limit)
        if key not in self._videos:
            if not folder.is_dir():
                return self._without_frames(folder, f"{where}: frame folder {folder} is missing")
            whole = Video(tuple(Still(str(file)) for file in frame_files(folder)))
            if not whole.frames and not may_be_empty:
                return self._without_frames(folder, f"{where}: {folder} holds no frames (.jpg, .jpeg, .png)")
            self._videos[key] = Video(whole.sample(limit, 1.0))
        return self._videos[key]

    def _without_frames(self, folder: Path, problem: str) -> Video:
        if not self.lenient:
            raise DataError(f"{problem}; restore it, or give --on_error skip")
        return Video(file=str(folder))

    def notes(self) -> list[str]:
        """What was counted, in words."""
        return [f"{what}: {number}" for what, number in self.counts.items()]
