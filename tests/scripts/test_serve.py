"""The page of an index: finds what the command finds, filters, and answers nobody but this machine."""

from __future__ import annotations

import base64
import html
import http.client
import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from b3 import Embedder
from b3.data.codes import Floats
from b3.data.index import Index, load_index
from b3.data.lines import Lines
from scripts import embed, search
from scripts.serve import HOST, MOST_BYTES, Searcher, SearchServer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(index, folder of images): texts, an image in a file, and one inside the rows."""
    root = tmp_path_factory.mktemp("serve")
    model = tiny.write_model(root / "model")
    (root / "images").mkdir()
    (root / "images" / "red.png").write_bytes(tiny.image("red", "disc", 1))
    packed = base64.b64encode(tiny.image("green", "bar", 2)).decode()
    rows = [
        {"id": "a", "text": "a red disc"},
        {"id": "b", "image": "images/red.png", "text": "what is it?"},
        {"id": "c", "image_base64": packed},
        {"id": "<i>d</i>", "text": "a blue frame number 12"},
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert embed.main(["--model", str(model), "--input", str(root / "rows.jsonl"), "--out", str(root / "index")]) == 0
    return root / "index", root / "images"


@pytest.fixture(scope="module")
def server(place: tuple[Path, Path]) -> Iterator[SearchServer]:
    index = load_index(place[0])
    model = Embedder.from_pretrained(index.manifest["model"]["name"], dtype="float32")
    with SearchServer(Searcher(index, model), 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def ask(
    server: SearchServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(HOST, server.server_address[1], timeout=30)
    content = None if body is None else json.dumps(body) if not isinstance(body, bytes) else body
    connection.request(method, path, content, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    result = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return result


def find(server: SearchServer, **asked: Any) -> dict[str, Any]:
    code, _, content = ask(server, "POST", "/search", asked)
    assert code == 200, content
    return json.loads(content)


def test_it_finds_what_the_command_finds(
    server: SearchServer, place: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.main(["--index", str(place[0]), "--query", "a red disc", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["results"]
    found = find(server, text="a red disc")["results"]
    assert [(hit["id"], hit["score"]) for hit in found] == [(hit["id"], hit["score"]) for hit in expected]
    assert found[0]["id"] == "a" and found[0]["above"] > found[1]["above"]


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_a_browser_shows_what_an_address_asks_for(server: SearchServer, tmp_path: Path) -> None:
    """The page's own script runs: what it shows is text, also where a row holds marks."""
    address = f"http://{HOST}:{server.server_address[1]}/?text=a%20red%20disc"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=20000",
    ]
    done = subprocess.run(
        [str(BROWSER), *options, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    )
    shown = re.findall(r'class="id">id (.*?)</div>', done.stdout)
    assert [html.unescape(one) for one in shown] == [hit["id"] for hit in find(server, text="a red disc")["results"]]
    assert shown[0] == "a" and "&lt;i&gt;d&lt;/i&gt;" in shown
    assert '<p id="message" role="status">4 of 4 rows</p>' in done.stdout


def test_an_image_finds_itself(server: SearchServer, place: tuple[Path, Path]) -> None:
    packed = base64.b64encode((place[1] / "red.png").read_bytes()).decode()
    (best, *_), alone = find(server, image=packed, text="what is it?")["results"], find(server, image=packed)
    assert best["id"] == "b" and best["score"] == pytest.approx(1, abs=1e-5) and len(alone["results"]) == 4


def test_filters(server: SearchServer) -> None:
    found = find(server, text="red", kind="image")
    assert {hit["id"] for hit in found["results"]} == {"b", "c"} and (found["rows"], found["of"]) == (2, 4)
    assert [hit["id"] for hit in find(server, text="red", contains="FRAME")["results"]] == ["<i>d</i>"]
    assert find(server, text="red", contains="nothing")["results"] == []
    assert len(find(server, text="red", top=1)["results"]) == 1
    whole = {hit["id"]: hit["score"] for hit in find(server, text="red")["results"]}
    part = {hit["id"]: hit["score"] for hit in find(server, text="red", kind="text")["results"]}
    assert part == {name: whole[name] for name in part} and len(part) == 2


@pytest.mark.parametrize("part", ['say "no"', "A\\b", "ΌΔΟΣ", "line\nbreak", "é\t", "x"])
def test_a_filter_finds_what_json_writes_otherwise(tmp_path: Path, part: str) -> None:
    texts = ['You say "NO" now', "a\\B", "όδος", "ΌΔΟΣ\nend", "a line\nbreak", "É\ttab", "none of these"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": 0, "text": t, "image": None}, ensure_ascii=False) + "\n" for t in texts))
    searcher = Searcher(Index(Floats(np.zeros((7, 1))), None, Lines(file), {}), None)  # type: ignore[arg-type]
    plain = [row for row, text in enumerate(texts) if part.lower() in text.lower()]
    assert searcher.rows_of(part, "all").tolist() == plain
    assert bool(plain) == (part != "x")


def test_only_rows_that_are_shown_are_read(
    place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[int] = []
    row_at = Lines._row
    monkeypatch.setattr(Lines, "_row", lambda self, start: read.append(start) or row_at(self, start))
    assert search.main(["--index", str(place[0]), "--query", "a red disc", "--json", "--top", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == len(read) == 2


@pytest.mark.parametrize("row", [1, 2])
def test_images_come_as_thumbnails(server: SearchServer, row: int) -> None:
    code, headers, content = ask(server, "GET", f"/image?row={row}")
    assert code == 200 and headers["Content-Type"] in ("image/png", "image/jpeg")
    assert max(Image.open(io.BytesIO(content)).size) <= 320


def test_the_page_needs_nothing_from_elsewhere(server: SearchServer) -> None:
    code, headers, content = ask(server, "GET", "/")
    assert code == 200 and "connect-src 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    page = content.decode()
    assert "http://" not in page and "https://" not in page and "innerHTML" not in page


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("GET", "/image?row=0", None, 404),
        ("GET", "/image?row=4", None, 404),
        ("GET", "/image?row=-1", None, 404),
        ("GET", "/image?row=../../../../etc/passwd", None, 404),
        ("GET", "/image?row=%2fetc%2fpasswd", None, 404),
        ("GET", "/../../etc/passwd", None, 404),
        ("GET", "/images/red.png", None, 404),
        ("POST", "/", {"text": "x"}, 404),
        ("POST", "/search", b"{", 400),
        ("POST", "/search", [], 400),
        ("POST", "/search", {}, 400),
        ("POST", "/search", {"text": 3}, 400),
        ("POST", "/search", {"text": "x" * 8001}, 400),
        ("POST", "/search", {"text": "x", "top": 101}, 400),
        ("POST", "/search", {"text": "x", "top": "9"}, 400),
        ("POST", "/search", {"text": "x", "kind": "z"}, 400),
        ("POST", "/search", {"image": "/etc/passwd"}, 400),
        ("POST", "/search", {"image": base64.b64encode(b"no image").decode()}, 400),
        ("POST", "/search", {"text": "<|image_1|> twice <|image_1|>", "image": "aGk="}, 400),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_an_error(
    server: SearchServer, method: str, path: str, body: Any, code: int
) -> None:
    found, _, content = ask(server, method, path, body)
    assert found == code and json.loads(content)["error"] and b"root:" not in content
    assert find(server, text="a red disc")["results"], "and the server goes on"


def test_it_answers_nobody_else(server: SearchServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "GET", "/", Host="example.com")[0] == 403
    assert ask(server, "POST", "/search", {"text": "x"}, Host="example.com:80")[0] == 403
    assert ask(server, "POST", "/search", {"text": "x"}, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(server, "POST", "/search", b"", **{"Content-Length": str(MOST_BYTES + 1)})[0] == 413
    assert ask(server, "GET", "/", Host=f"localhost:{server.server_address[1]}")[0] == 200


def test_a_port_that_is_taken_is_one_line(
    server: SearchServer, place: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(server.server_address[1])
    assert search.main(["--index", str(place[0]), "--serve", "--port", port]) == 2
    assert f"port {port} cannot be used" in capsys.readouterr().err
