"""One side of a row: a text, an instruction, and any number of images and videos."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from b3.data.digests import digest, joined
from b3.data.images import FolderImages, ImageRef, content_key, decode, peek
from b3.data.video import frame_files, read_frames
from b3.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

T = TypeVar("T")
ImageSource: TypeAlias = "ImageRef | Image.Image | str | Path | bytes"


@dataclass(frozen=True, slots=True)
class Still:
    """One image: a path, encoded bytes, an `ImageRef` into a store, or a decoded `PIL.Image`."""

    source: ImageSource

    @property
    def key(self) -> str:
        """Equal for images that are the same file, or have the same content."""
        if isinstance(self.source, ImageRef):
            return self.source.key
        if isinstance(self.source, (str, Path)):
            return f":{self.source}"
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        return content_key(self.source)

    @property
    def name(self) -> str:
        """For messages."""
        if isinstance(self.source, (str, Path)):
            return str(self.source)
        return self.source.path if isinstance(self.source, ImageRef) else self.key[:80]

    def _read(self) -> tuple[bytes, str]:
        if isinstance(self.source, ImageRef):
            return self.source.store.read(self.source.path), f"{self.source.path} in {self.source.store.location}"
        if isinstance(self.source, bytes):
            return self.source, f"of {len(self.source)} bytes"
        path = Path(str(self.source))
        return FolderImages(path.parent).read(path.name), str(path)

    def open(self) -> Image.Image:
        """The decoded image. Raises `DataError` if it is missing or does not decode."""
        from PIL import Image

        return self.source if isinstance(self.source, Image.Image) else decode(*self._read())

    def peek(self) -> tuple[bytes, tuple[int, int]]:
        """(digest of the content, (width, height)), reading the file but decoding only its header."""
        from PIL import Image

        if isinstance(self.source, Image.Image):
            return content_key(self.source).encode(), self.source.size
        return peek(*self._read())


@dataclass(frozen=True, slots=True)
class Video:
    """Frames in order of time, or a video file, read through PyAV when it is needed.

    frames: of the video; empty if `file` is given. file: of a container format (MP4, WebM, ...).
    """

    frames: tuple[Still, ...] = ()
    file: str | None = None

    @property
    def key(self) -> str:
        return f"video:{self.file}" if self.file else "video:" + "\x1f".join(frame.key for frame in self.frames)

    @property
    def name(self) -> str:
        """For messages."""
        if self.file:
            return self.file
        return f"{len(self.frames)} frames" + (f" from {self.frames[0].name}" if self.frames else "")

    def sample(self, limit: int | None, fps: float) -> tuple[Still, ...]:
        """At most `limit` frames, spread evenly over the video and its ends included; None: all.

        Frame i of k is frame floor(i (n - 1) / (k - 1)) of n, as numpy's linspace cut to integers has it (the rule of
        both MMEB-V2 harnesses). A file gives `fps` frames per second first. Raises `DataError` if it cannot be read.
        """
        if self.file:
            return tuple(Still(frame) for frame in read_frames(self.file, fps, limit))
        if limit is None or len(self.frames) <= limit:
            return self.frames
        import numpy as np

        return tuple(self.frames[i] for i in np.linspace(0, len(self.frames) - 1, limit).astype(int))

    def peeked(self, limit: int | None, fps: float) -> list[tuple[bytes, tuple[int, int]]]:
        """`Still.peek` of the sampled frames, without those that cannot be read. Raises `DataError` if none is left."""
        return _readable(self.sample(limit, fps), Still.peek, self.name)[0]

    def decoded(self, limit: int | None, fps: float) -> list[Image.Image]:
        """The sampled frames; those that do not decode are left out with a note. Raises `DataError` if none is left."""
        sampled = self.sample(limit, fps)
        images, problem = _readable(sampled, Still.open, self.name)
        if problem is not None:
            lost = len(sampled) - len(images)
            print(f"note: {lost} of {len(sampled)} frames of {self.name} left out: {problem}", file=sys.stderr)
        return images


def _readable(frames: Sequence[Still], read: Callable[[Still], T], name: str) -> tuple[list[T], DataError | None]:
    """(what `read` gives for each frame, without those that it refuses; why it refused the last of them)."""
    results, problem = list[T](), None
    for frame in frames:
        try:
            results.append(read(frame))
        except DataError as error:
            problem = error
    if not results:
        raise problem or DataError(f"video {name} has no frames; drop the row")
    return results, problem


Medium: TypeAlias = Still | Video


@dataclass(frozen=True, slots=True, init=False)
class Item:
    """One input of the embedder.

    text: in the data set's form, ``<|image_1|>``, ``<|image_2|>``, ``<|video_1|>`` standing for the media; None if
        there is no text at all, which a prompt rule may tell from an empty one.
    media: images and videos. instruction: what the vector is for, or None; its place is the prompt rule's choice.
    """

    text: str | None
    media: tuple[Medium, ...]
    instruction: str | None

    def __init__(
        self,
        text: str | None = None,
        image: ImageSource | None = None,
        *,
        media: tuple[Medium, ...] = (),
        instruction: str | None = None,
    ) -> None:
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "media", media if image is None else (Still(image), *media))
        object.__setattr__(self, "instruction", instruction)

    @property
    def images(self) -> tuple[Still, ...]:
        return tuple(medium for medium in self.media if isinstance(medium, Still))

    @property
    def videos(self) -> tuple[Video, ...]:
        return tuple(medium for medium in self.media if isinstance(medium, Video))

    @property
    def image(self) -> ImageSource | None:
        """The first image, or None."""
        return self.images[0].source if self.images else None

    def open_image(self) -> Image.Image | None:
        """The first image decoded, or None. Raises `DataError` if it is missing or does not decode."""
        return self.images[0].open() if self.images else None

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for items with equal content; used to encode each distinct item once."""
        parts = ["\0" if self.text is None else self.text, "\x1e".join(medium.key for medium in self.media)]
        return tuple(parts if self.instruction is None else [*parts, self.instruction])

    def describe(self) -> str:
        """A short name for error messages."""
        kinds = (f" with {'image' if isinstance(medium, Still) else 'video'} {medium.name}" for medium in self.media)
        return f"text {(self.text or '')[:60]!r}" + "".join(kinds)


def key_digests(items: Iterable[Item]) -> np.ndarray:
    """(N, 16) uint8, equal where the items have equal content (`Item.key`)."""
    return joined(digest(item.key) for item in items)


def item_id(item: Item) -> int:
    """64-bit id, equal for equal items on every rank."""
    digest = hashlib.sha256("\0".join(item.key).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


KEYS = ("text", "instruction", "image", "images", "video", "videos")


def as_item(value: Item | dict[str, Any] | str) -> Item:
    """Accept an `Item`, a plain text, or a dictionary with some of the keys of `KEYS`.

    text: a string, or several, joined without separator. image, images: one image or a list. video, videos: a list of
    frames, a folder of frames, a file, or a list of these.

    Raises:
        DataError: a key or a value is none of these.
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise DataError(f"an item is {str(value)[:60]!r}; give a text, a dictionary or an Item")
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        raise DataError(f"an item has the key '{unknown[0]}'; known: {', '.join(KEYS)}")
    text, instruction = value.get("text"), value.get("instruction")
    words = [instruction, *(text if isinstance(text, (list, tuple)) else [text])]
    odd = next((word for word in words if not (word is None or isinstance(word, str))), None)
    if odd is not None or (isinstance(text, (list, tuple)) and None in text):
        raise DataError(f"an item has the text or instruction {str(odd)[:60]!r}; it has to be a string")
    try:
        "".join(word or "" for word in words).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"an item has a text that is not valid Unicode ({error.reason}); correct it") from None
    media = (*_videos(value.get("video")), *_videos(value.get("videos")))
    images = (*_images(value.get("image")), *_images(value.get("images")))
    return Item(
        "".join(text) if isinstance(text, (list, tuple)) else text,
        media=(*images, *media),
        instruction=instruction,
    )


def _images(value: Any) -> Iterator[Still]:
    if value is None:
        return
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _images(one)
        return
    if not isinstance(value, (str, Path, bytes, Still, ImageRef)) and not hasattr(value, "getpalette"):
        raise DataError(f"an item has the image {str(value)[:60]!r}; give a path, encoded bytes or a PIL image")
    yield value if isinstance(value, Still) else Still(value)


def _videos(value: Any) -> Iterator[Video]:
    if value is None:
        return
    if isinstance(value, Video):
        yield value
    elif isinstance(value, (str, Path)):
        yield video_at(value)
    elif not isinstance(value, (list, tuple)):
        raise DataError(f"an item has the video {str(value)[:60]!r}; give a folder, a file or a list of frames")
    elif value and (isinstance(value[0], (list, tuple, Video)) or _is_video(value[0])):
        for one in value:
            yield Video() if isinstance(one, (list, tuple)) and not one else next(_videos(one))
    elif value:
        yield Video(tuple(_images(value)))


def _is_video(value: Any) -> bool:
    """Whether a path is a folder of frames or has a suffix of a video."""
    return isinstance(value, (str, Path)) and (Path(value).suffix.lower() in VIDEO_SUFFIXES or Path(value).is_dir())


VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg"}


def video_at(path: str | Path) -> Video:
    """The video in a folder of frames or a file. Raises `DataError` if there is none."""
    path = Path(path)
    if path.is_dir():
        frames = frame_files(path)
        if not frames:
            raise DataError(f"video {path} has no frames (.jpg, .jpeg, .png); check the folder or drop the row")
        return Video(tuple(Still(file) for file in frames))
    if not path.is_file():
        raise DataError(f"video {path} does not exist; give a folder of frames, a list of frames, or a file")
    return Video(file=str(path))
