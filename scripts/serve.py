"""The page of `scripts/search.py --serve`: a text or an image finds rows of an index.

It is for one person on this machine: bound to 127.0.0.1, and requests that name another host are refused, so that no
web page can ask through the browser. Requests name rows by number, never by path. Images leave as thumbnails.
"""

from __future__ import annotations

import base64
import json
import threading
from functools import cached_property, lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from b3.data.codes import Floats, Hits, nearest
from b3.data.index import Index, IndexedImages
from b3.data.items import Item, Still
from b3.data.own import instructed, prompt
from b3.errors import DataError, InputError
from b3.html import thumbnail

if TYPE_CHECKING:
    from b3 import Embedder

HOST = "127.0.0.1"
MOST_BYTES = 16 << 20  # of a request
MOST_TEXT = 8000
MOST_RESULTS = 100
SIDE = 320  # pixels of a thumbnail
SECONDS = 30.0  # that a client may take to send a request
PAGE = Path(__file__).with_name("serve.html")
POLICY = (  # nothing from elsewhere
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'"
)


class Searcher:
    """An index with its model; one request at a time."""

    def __init__(self, index: Index, model: Embedder, instruction: str = "") -> None:
        self.index, self.model, self.instruction = index, model, instruction
        self.images = IndexedImages(index.rows, index.manifest)
        self.lock = threading.Lock()
        self.thumbnail = lru_cache(maxsize=2000)(self._thumbnail)

    def search(self, asked: Any) -> dict[str, Any]:
        """Answer {"text", "image" (base64), "top", "contains", "kind"}. Raises `InputError` for what cannot be used."""
        item, top = self.query_of(asked)
        rows = self.rows_of(str(asked.get("contains") or ""), str(asked.get("kind") or "all"))
        with self.lock:
            query = self.model.encode([item], normalize=self.index.manifest["options"]["normalize"])
            hits = self.hits(query, rows, top)
            spread = self.spread(query[0])
        shown = self.index.rows
        results = [
            {"row": row, "id": shown[row]["id"], "text": shown[row]["text"], "image": self.has_image(row),
             "score": score, "above": None if spread is None else (score - spread[0]) / spread[1]}
            for row, score in hits
        ]  # fmt: skip
        return {"results": results, "rows": len(rows), "of": len(shown)}

    def query_of(self, asked: Any) -> tuple[Item, int]:
        if not isinstance(asked, dict):
            raise InputError("a request is a JSON object")
        text, image = asked.get("text") or "", asked.get("image")
        top = asked.get("top", 20)
        if not isinstance(text, str) or len(text) > MOST_TEXT:
            raise InputError(f"a text of at most {MOST_TEXT:,} characters is needed")
        if not isinstance(top, int) or not 1 <= top <= MOST_RESULTS:
            raise InputError(f"top is {top!r}; give 1 to {MOST_RESULTS}")
        if not image:
            if not text.strip():
                raise InputError("give a text, an image, or both")
            return self._instructed(Item(prompt(text, False))), top
        try:
            content = base64.b64decode(image, validate=True)
        except (ValueError, TypeError) as error:
            raise InputError(f"the image is not base64 ({error})") from None
        return self._instructed(Item(prompt(text, True), content)), top

    def _instructed(self, item: Item) -> Item:
        from b3.integrations.items import has_place_for_instructions

        return instructed(item, self.instruction, has_place_for_instructions(self.model))

    def has_image(self, row: int) -> bool:
        return self.images.source(row) is not None

    def rows_of(self, contains: str, kind: str) -> np.ndarray:
        """Rows that pass the filters: a part of the text, in any case, and with or without an image."""
        if kind not in ("all", "text", "image"):
            raise InputError(f"kind is {kind!r}; give all, text or image")
        rows = np.arange(len(self.index.rows))
        if part := contains.lower():
            as_written = json.dumps(part, ensure_ascii=False)[1:-1]  # a line without it need not be read as JSON
            likely = [row for row, line in enumerate(self.index.rows.texts()) if as_written in line.lower()]
            kept = [row for row in likely if part in str(self.index.rows[row]["text"]).lower()]
            rows = np.asarray(kept, dtype=np.int64)
        return rows if kind == "all" else rows[self.with_image[rows] == (kind == "image")]

    @cached_property
    def with_image(self) -> np.ndarray:
        """(N,) bool: which rows have an image."""
        num = len(self.index.rows)
        return np.fromiter(map(self.has_image, range(num)), dtype=bool, count=num)

    def hits(self, query: np.ndarray, rows: np.ndarray, top: int) -> Hits:
        index = self.index
        if len(rows) == len(index.rows):
            return nearest(index.vectors, query, top, index.bits)[0]
        if not len(rows):
            return []
        found = nearest(Floats(index.vectors.take(rows)), query, top)[0]
        return [(int(rows[row]), score) for row, score in found]

    def spread(self, query: np.ndarray) -> tuple[float, float] | None:
        """(mean, standard deviation) of the scores of all rows; None for an index that is not read whole."""
        if self.index.bits is not None:
            return None
        scores = self.index.vectors.product(query)
        return float(scores.mean()), max(float(scores.std()), 1e-9)

    def _thumbnail(self, row: int) -> tuple[str, bytes]:
        """("png" or "jpeg", bytes) of a row's image. Raises `DataError` if it has none."""
        source = self.images.source(row)
        if source is None:
            raise DataError(f"row {row} has no image")
        return thumbnail(Still(source).open(), SIDE)


class Handler(BaseHTTPRequestHandler):
    server: SearchServer
    timeout = SECONDS

    def log_message(self, *arguments: Any) -> None:
        """Nothing: what is searched stays with the person."""

    def do_GET(self) -> None:
        if not self._is_from_here():
            return
        address = urlsplit(self.path)
        if address.path == "/":
            self._send(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif address.path == "/image":
            self._image(parse_qs(address.query).get("row", [""])[0])
        else:
            self._error(HTTPStatus.NOT_FOUND, "there is / and /image?row=N")

    def do_POST(self) -> None:
        if not self._is_from_here():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/search":
            self._error(HTTPStatus.NOT_FOUND, "there is /search")
        elif self.headers.get_content_type() != "application/json":
            self._error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        elif not length.isdigit():
            self._error(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        elif int(length) > MOST_BYTES:
            self._error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MOST_BYTES >> 20} MiB")
        else:
            self._search(self.rfile.read(int(length)))

    def _search(self, content: bytes) -> None:
        try:
            answer = self.server.searcher.search(json.loads(content))
        except (InputError, ValueError) as error:
            self._error(HTTPStatus.BAD_REQUEST, str(error).splitlines()[0])
            return
        self._send(json.dumps(answer, ensure_ascii=False).encode(), "application/json")

    def _image(self, row: str) -> None:
        searcher = self.server.searcher
        if not (row.isascii() and row.isdigit() and len(row) < 12 and int(row) < len(searcher.index.rows)):
            self._error(HTTPStatus.NOT_FOUND, "there is no such row")
            return
        try:
            kind, content = searcher.thumbnail(int(row))
        except (InputError, OSError) as error:
            self._error(HTTPStatus.NOT_FOUND, str(error).splitlines()[0])
            return
        self._send(content, f"image/{kind}")

    def _is_from_here(self) -> bool:
        """Refuse a request whose Host is another name: a page elsewhere that a browser was led to take for this."""
        port = self.server.server_address[1]
        if self.headers.get("Host") in (f"{HOST}:{port}", f"localhost:{port}"):
            return True
        self._error(HTTPStatus.FORBIDDEN, f"ask http://{HOST}:{port}/")
        return False

    def _send(self, content: bytes, kind: str, code: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(content)), "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": POLICY, "Cache-Control": "no-store",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _error(self, code: HTTPStatus, message: str) -> None:
        self.close_connection = True
        self._send(json.dumps({"error": message}).encode(), "application/json", code)


class SearchServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, searcher: Searcher, port: int) -> None:
        self.searcher = searcher
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} cannot be used ({error}); give another --port, or 0") from None


def serve(index: Index, model: Embedder, port: int, instruction: str = "") -> None:
    """Answer until Ctrl-C."""
    server = SearchServer(Searcher(index, model, instruction), port)
    print(f"http://{HOST}:{server.server_address[1]}/  {len(index.rows):,} rows; Ctrl-C ends it", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
