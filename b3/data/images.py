"""Where images come from: a folder, or a parquet file that holds the encoded images.

A store turns the image path of a data row into bytes or a decoded `PIL.Image`. Stores are cheap to pickle (they carry
only their location), so that worker processes open files on their own.
"""

from __future__ import annotations

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


class RowGroups:
    """One column of a parquet file, by (row group, row): groups are read on demand and the last few are kept.

    So memory does not grow with the file. Pickles to the file's name; a process that unpickles it opens it by itself.
    """

    def __init__(self, file: str, column: str, keep: int) -> None:
        self._arguments = (file, column, keep)
        self._file: Any = None
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, self._arguments

    def value(self, group: int, row: int) -> Any:
        import pyarrow.parquet as pq

        file, column, keep = self._arguments
        with self._lock:
            if self._file is None:
                self._file = pq.ParquetFile(file, memory_map=True)
            if group not in self._groups:
                self._groups[group] = self._file.read_row_group(group, columns=[column]).column(column)
                while len(self._groups) > keep:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group][row].as_py()


class ParquetImages:
    """Images inside one parquet file with the columns `path` (string) and `bytes` (binary)."""

    _KEEP = 64

    def __init__(self, file: str | Path) -> None:
        self.location = str(file)
        self._rows: dict[str, tuple[int, int]] | None = None
        self._bytes = RowGroups(self.location, "bytes", self._KEEP)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetImages, (self.location,)

    def _index(self) -> dict[str, tuple[int, int]]:
        """(row group, row) of each path, read when it is first needed."""
        with self._lock:
            if self._rows is None:
                self._rows = self._read_index()
            return self._rows

    def _read_index(self) -> dict[str, tuple[int, int]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows: dict[str, tuple[int, int]] = {}
        try:
            file = pq.ParquetFile(self.location, memory_map=True)
            for group in range(file.num_row_groups):
                paths = file.read_row_group(group, columns=["path"]).column("path").to_pylist()
                rows.update((path, (group, row)) for row, path in enumerate(paths))
        except FileNotFoundError:
            raise DataError(f"image file {self.location} does not exist; check image_dir") from None
        except (pa.ArrowException, KeyError) as error:
            raise DataError(
                f"image file {self.location} is not a parquet file with columns 'path' and 'bytes' ({error})"
            ) from None
        return rows

    def __contains__(self, path: str) -> bool:
        return path in self._index()

    def read(self, path: str) -> bytes:
        rows = self._index()
        if path not in rows:
            raise DataError(f"image '{path}' is not in {self.location}; check image_dir")
        content: bytes = self._bytes.value(*rows[path])
        return content


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
