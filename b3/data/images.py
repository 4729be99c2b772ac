"""Where images come from: a folder, or a parquet file that holds the encoded images.

A store turns the image path of a data row into bytes or a decoded `PIL.Image`. Stores are cheap to pickle (they carry
only their location), so that worker processes open files on their own.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from b3.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


class ImageStore(Protocol):
    """Where the images of a data set lie; `location` names it, in errors and in the keys of its images."""

    location: str

    def read(self, path: str) -> bytes:
        """The encoded image of that name. Raises `DataError` if there is none."""


class FolderImages:
    """Images as files below `root`, as MMEB distributes them."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.location = str(root)

    def file(self, path: str) -> Path:
        """The whole path. Raises `DataError` if it leaves the folder."""
        try:
            full = (self.root / path).resolve()
        except ValueError:  # a null byte, half of a character
            raise DataError(f"image path {path!r} is not a path; correct the row") from None
        if not full.is_relative_to(self.root.resolve()):
            raise DataError(f"image path '{path}' leaves the image directory {self.root}; correct the row")
        return full

    def read(self, path: str) -> bytes:
        full = self.file(path)
        try:
            return full.read_bytes()
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
                for row, path in enumerate(paths):
                    if rows.setdefault(path, (group, row)) != (group, row):
                        self._refuse_another(path, rows[path], (group, row))
        except FileNotFoundError:
            raise DataError(f"image file {self.location} does not exist; check image_dir") from None
        except (pa.ArrowException, KeyError) as error:
            raise DataError(
                f"image file {self.location} is not a parquet file with columns 'path' and 'bytes' ({error})"
            ) from None
        return rows

    def _refuse_another(self, path: str, first: tuple[int, int], again: tuple[int, int]) -> None:
        if self._bytes.value(*first) != self._bytes.value(*again):
            raise DataError(
                f"image '{path}' stands twice in {self.location} with different bytes; one name must be one image"
            )

    def read(self, path: str) -> bytes:
        rows = self._index()
        if path not in rows:
            raise DataError(f"image '{path}' is not in {self.location}; check image_dir")
        content: bytes = self._bytes.value(*rows[path])
        return content


def open_store(location: str | Path) -> ImageStore:
    """The store for an `image_dir`: a folder, or a `.parquet` file of images."""
    path = Path(location)
    return ParquetImages(path) if path.suffix == ".parquet" else FolderImages(path)


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a store, not yet read. Two references are the same image if store and path are the same."""

    store: ImageStore
    path: str

    @property
    def key(self) -> str:
        return f"{self.store.location}:{self.path}"

    def open(self) -> Image.Image:
        """Decode the image. Raises `DataError` naming the path if the bytes are not an image."""
        return decode(self.store.read(self.path), f"{self.path} in {self.store.location}")


def _opened(data: bytes, name: str, use: Callable[[Image.Image], T]) -> T:
    """`use` of the image that the bytes hold. Raises `DataError` with `name` if they hold none or it is too large."""
    from PIL import Image, UnidentifiedImageError

    try:
        return use(Image.open(io.BytesIO(data)))
    except Image.DecompressionBombError as error:
        raise DataError(f"image {name} is too large ({error}); reduce it or raise PIL.Image.MAX_IMAGE_PIXELS") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        why = "no image format that is known" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"image {name} does not decode ({why}); replace the file or drop the row") from None


def decode(data: bytes, name: str) -> Image.Image:
    """Decode image bytes fully (a truncated file fails here, not later). `name` is used in the error."""

    def loaded(image: Image.Image) -> Image.Image:
        image.load()
        return image

    return _opened(data, name, loaded)


def peek(data: bytes, name: str) -> tuple[bytes, tuple[int, int]]:
    """(SHA-256 of the encoded bytes, (width, height) from the header). Errors as `decode`."""
    return hashlib.sha256(data).digest(), _opened(data, name, lambda image: image.size)


def content_key(image: Image.Image) -> str:
    """A key that is equal for images with equal pixels (mode, size and palette included)."""
    digest = hashlib.sha256(f"{image.mode}{image.size}".encode())
    digest.update(bytes(image.getpalette() or ()))
    digest.update(image.tobytes())
    return digest.hexdigest()
