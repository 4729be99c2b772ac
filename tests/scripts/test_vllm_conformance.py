"""The conformance script against a stand-in of vLLM's server that answers with our vectors, right or off by 1 %."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import tiny
from PIL import Image

from b3 import Embedder
from b3.data.items import Item
from b3.model.batch import Processed, Tokens, collate
from scripts.vllm_conformance import main

TEMPLATE = Path(__file__).parents[2] / "configs" / "vllm_plain.jinja"


def vector(model: Embedder, body: dict[str, Any]) -> np.ndarray:
    """As the server would: token ids through the model, or messages through the template and one image."""
    if "input" in body:
        ids = np.asarray(body["input"], dtype=np.int64)
        return model(collate([Processed(Tokens.of_text(ids))])).detach().numpy()[0]
    text = jinja2.Template(TEMPLATE.read_text()).render(messages=body["messages"])
    parts = body["messages"][0]["content"]
    (url,) = (part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return model.encode([Item(text, image)])[0]


@contextmanager
def server(model: Embedder, error: float = 0.0) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

        def answer(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.answer({"data": [{"id": "served"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/embeddings" and body["model"] == "served" and body["encoding_format"] == "float"
            found = vector(model, body)
            found = found + error * np.roll(found, 1) * np.sqrt(1 / max(1e-9, (np.roll(found, 1) ** 2).sum()))
            self.answer({"data": [{"embedding": (3 * found).tolist()}]})

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}"
    finally:
        running.shutdown()
        running.server_close()


@pytest.mark.parametrize("kind", ["image", "text"])
def test_equal_vectors_conform_and_others_do_not(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    make = tiny.write_model if kind == "image" else tiny.write_text_model
    folder = make(tmp_path / "model")
    model = Embedder.from_pretrained(folder, dtype="float32")
    arguments = ["--model", str(folder), "--dtype", "float32", "--least", "0.99999"]
    with server(model) as url:
        assert main([*arguments, "--url", url]) == 0
    out = capsys.readouterr().out
    assert "conforms: worst cosine 1.0000" in out and len(out.splitlines()) == (23 if kind == "image" else 22)
    assert ("worst of 12 images" in out) == (kind == "image")
    with server(model, error=0.01) as url:
        assert main([*arguments, "--url", url]) == 3
    assert "does not conform: worst cosine 0.99" in capsys.readouterr().out


def test_the_template_is_the_raw_prompt() -> None:
    template = jinja2.Template(TEMPLATE.read_text())
    parts = [{"type": "image_url"}, {"type": "text", "text": "\n a cat \n"}]
    assert template.render(messages=[{"role": "user", "content": parts}]) == "<|image_pad|>\n a cat \n"
    assert template.render(messages=[{"role": "user", "content": " a cat\n"}]) == " a cat\n"


def test_no_server_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.write_text_model(tmp_path / "model")
    assert main(["--model", str(folder), "--url", "http://127.0.0.1:9"]) == 2
    assert "does not answer as vLLM does" in capsys.readouterr().err
