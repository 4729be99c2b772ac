"""Frames of a video: a folder of images in natural order, or a file read through PyAV."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from b3.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FRAME_SUFFIXES = {".jpg", ".jpeg", ".png"}


def natural_key(name: str) -> list[Any]:
    """Sorts digit runs as numbers and letters without case: frame_9.jpg before frame_10.jpg."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)]


def frame_files(folder: str | Path) -> list[Path]:
    """Frames of a folder (.jpg, .jpeg, .png in any case; other files are ignored), in natural order."""
    files = [file for file in Path(folder).iterdir() if file.suffix.lower() in FRAME_SUFFIXES]
    return sorted(files, key=lambda file: natural_key(file.name))


def read_frames(file: str, fps: float, limit: int | None) -> list[Image.Image]:
    """Decoded frames of a video file: `fps` per second of its duration, at least one, at most `limit`.

    They are spread evenly from the first frame to the last (linspace, cut to integers). Two passes over the file: the
    first only counts, so that no more than the result is held in memory.

    Raises:
        DataError: PyAV is not installed, or the file does not decode or has no frames.
    """
    try:
        import av
    except ImportError:
        raise DataError(f"video {file} needs PyAV; pip install av, or give a folder of frames") from None
    try:
        with av.open(file) as container:
            times = [float(frame.time or 0.0) for frame in container.decode(video=0)]
        if not times:
            raise DataError(f"video {file} has no frames; replace the file or drop the row")
        count = max(1, int((times[-1] - times[0]) * fps) + 1)
        count = min(count, len(times), len(times) if limit is None else limit)
        rows = set(np.linspace(0, len(times) - 1, count).astype(int).tolist())
        with av.open(file) as container:
            decoded = enumerate(container.decode(video=0))
            return [frame.to_image() for row, frame in decoded if row in rows]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise DataError(f"video {file} does not decode ({error}); replace the file or drop the row") from None
