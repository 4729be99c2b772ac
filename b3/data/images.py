"""Where images come from: a folder, or a parquet file that holds the encoded images.

A store turns the image path of a data row into bytes or a decoded `PIL.Image`. Stores are cheap to pickle (they carry
only their location), so that worker processes open files on their own.
"""

from __future__ import annotations

import functools
import hashlib
import io
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


class FolderImages:
    """Images as files below `root`, as MMEB distributes them."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.location = str(root)

    def _resolve(self, path: str) -> Path:
        full = (self.root / path).resolve()
        if not full.is_relative_to(self.root.resolve()):
            raise DataError(f"image path '{path}' leaves the image directory {self.root}; correct the row")
        return full

    def __contains__(self, path: str) -> bool:
        return self._resolve(path).is_file()

    def read(self, path: str) -> bytes:
        try:
            return self._resolve(path).read_bytes()
        except FileNotFoundError:
            raise DataError(f"image '{path}' is not in {self.root}; check image_dir") from None
        except OSError as error:
            raise DataError(f"image '{path}' in {self.root} cannot be read ({error.strerror})") from None


class ParquetImages:
    """Images inside one parquet file with the columns `path` (string) and `bytes` (binary).

    Row groups are read on demand and a few are kept, so that memory does not grow with the file.
    """

    _KEEP = 64

    def __init__(self, file: str | Path) -> None:
        self.location = str(file)
        self._file: Any = None
        self._rows: dict[str, tuple[int, int]] = {}
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _shared_store, (self.location,)  # one store, one index per process, however often it is unpickled

    def _open(self) -> None:
        with self._lock:
            if self._file is None:
                self._read_index()

    def _read_index(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(self.location, memory_map=True)
            for group in range(file.num_row_groups):
                paths = file.read_row_group(group, columns=["path"]).column("path").to_pylist()
                self._rows.update((path, (group, row)) for row, path in enumerate(paths))
        except FileNotFoundError:
            raise DataError(f"image file {self.location} does not exist; check image_dir") from None
        except (pa.ArrowException, KeyError) as error:
            raise DataError(
                f"image file {self.location} is not a parquet file with columns 'path' and 'bytes' ({error})"
            ) from None
        self._file = file

    def __contains__(self, path: str) -> bool:
        self._open()
        return path in self._rows

    def read(self, path: str) -> bytes:
        self._open()
        if path not in self._rows:
            raise DataError(f"image '{path}' is not in {self.location}; check image_dir")
        group, row = self._rows[path]
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._file.read_row_group(group, columns=["bytes"]).column("bytes")
                while len(self._groups) > self._KEEP:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group][row].as_py()


@functools.lru_cache(maxsize=64)
def _shared_store(location: str) -> ParquetImages:
    return ParquetImages(location)


def open_store(location: str | Path) -> FolderImages | ParquetImages:
    """The store for an `image_dir`: a folder, or a `.parquet` file of images."""
    path = Path(location)
    return ParquetImages(path) if path.suffix == ".parquet" else FolderImages(path)


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a store, not yet read. Two references are the same image if store and path are the same."""

    store: FolderImages | ParquetImages
    path: str

    @property
    def key(self) -> str:
        return f"{self.store.location}:{self.path}"

    def open(self) -> Image.Image:
        """Decode the image. Raises `DataError` naming the path if the bytes are not an image."""
        return decode(self.store.read(self.path), f"{self.path} in {self.store.location}")


def _why(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    return "no image format that is known" if isinstance(error, UnidentifiedImageError) else str(error)


def decode(data: bytes, name: str) -> Image.Image:
    """Decode image bytes fully (a truncated file fails here, not later). `name` is used in the error."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Image.DecompressionBombError as error:
        raise DataError(f"image {name} is too large ({error}); reduce it or raise PIL.Image.MAX_IMAGE_PIXELS") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"image {name} does not decode ({_why(error)}); replace the file or drop the row") from None
    return image


def peek(data: bytes, name: str) -> tuple[bytes, tuple[int, int]]:
    """(SHA-256 of the encoded bytes, (width, height) from the header). Errors as `decode`."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return hashlib.sha256(data).digest(), image.size
    except Image.DecompressionBombError as error:
        raise DataError(f"image {name} is too large ({error}); reduce it or raise PIL.Image.MAX_IMAGE_PIXELS") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"image {name} does not decode ({_why(error)}); replace the file or drop the row") from None


def content_key(image: Image.Image) -> str:
    """A key that is equal for images with equal pixels (mode, size and palette included)."""
    digest = hashlib.sha256(f"{image.mode}{image.size}".encode())
    digest.update(bytes(image.getpalette() or ()))
    digest.update(image.tobytes())
    return digest.hexdigest()
