"""Does a vLLM server give the vectors that b3 gives: 20 items, the worst cosine, a verdict.

    vllm serve exported --runner pooling --chat-template configs/vllm_plain.jinja       in another terminal
    python scripts/vllm_conformance.py --model exported --url http://127.0.0.1:8000

Texts are sent as token ids, so that only the model is compared; items with images as a chat message, through the
server's chat template and image processing. Exit code 3 if a cosine lies below --least. docs/integrations.md has the
command line of each backbone.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from b3.data.items import Item
from b3.data.own import add_rows_arguments, columns_of, read_rows
from b3.data.prompts import PLACEHOLDER
from b3.errors import InputError, RunError, command

if TYPE_CHECKING:
    from b3 import Embedder

DIFFERS = 3
SECONDS = 120.0


def embedded_items(with_images: bool) -> list[Item]:
    """20 items of the embedded data: texts, and for a model that reads them images alone and with a text."""
    from b3.data.datasets import load_pairs

    pairs = load_pairs("embedded:emoji", "emoji_i2t", prefix_targets=False)
    texts = [pairs.target(row) for row in range(8 if with_images else 20)]
    if not with_images:
        return texts
    images = [pairs.query(row) for row in range(12)]
    return [*texts, *images[:6], *(Item(f"{PLACEHOLDER}\n", item.image) for item in images[6:])]


def request_of(embedder: Embedder, item: Item, name: str) -> dict[str, Any]:
    """The body of a request to /v1/embeddings. Raises `InputError` for an item with more than one image, or a video."""
    facts = {"model": name, "encoding_format": "float"}
    if not item.media:
        return {**facts, "input": embedder.processor(item).input_ids.tolist()}
    image = item.open_image()
    if image is None or len(item.media) > 1:
        raise InputError(f"{item.describe()}: at most one image and no video can be compared")
    before, _, after = (item.text or "").partition(PLACEHOLDER)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")  # alpha is dropped here as it is when we read it
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts: list[dict[str, Any]] = [{"type": "text", "text": before}, {"type": "image_url", "image_url": {"url": url}},
             {"type": "text", "text": after}]  # fmt: skip
    content = [part for part in parts if part.get("text") != ""]
    return {**facts, "messages": [{"role": "user", "content": content}], "add_generation_prompt": False}


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that the server answers. Raises `RunError` naming what went wrong."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        what = error.read(500).decode(errors="replace").replace("\n", " ")
        raise RunError(f"{url}{path} answers {error.code}: {what}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{url} does not answer as vLLM does ({error}); start the server, or give --url") from None


def theirs(url: str, embedder: Embedder, items: Sequence[Item], name: str | None) -> np.ndarray:
    """(N, D) float32 unit vectors of the server, one request an item."""
    name = name or str(ask(url, "/v1/models")["data"][0]["id"])
    rows = [ask(url, "/v1/embeddings", request_of(embedder, item, name))["data"][0]["embedding"] for item in items]
    vectors = np.asarray(rows, dtype=np.float32)[:, : embedder.dim]
    norms: np.ndarray = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / norms


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder that vLLM serves")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--name", help="of the model there (default: the first that it lists)")
    parser.add_argument("--input", type=Path, help=".jsonl or .parquet rows to compare instead of the embedded ones")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of our vectors")
    parser.add_argument("--least", type=float, default=0.999, help="cosine that every item must reach (default 0.999)")
    add_rows_arguments(parser)
    arguments = parser.parse_args(argv)

    from b3 import Embedder

    embedder = Embedder.from_pretrained(arguments.model, dtype=arguments.dtype)
    if arguments.input is None:
        items = embedded_items(embedder.reads_images)
    else:
        items = list(read_rows(arguments.input, columns_of(arguments), arguments.image_dir).items[:20])
    cosines = (embedder.encode(items) * theirs(arguments.url, embedder, items, arguments.name)).sum(axis=1)
    for cosine, item in zip(cosines, items, strict=True):
        print(f"{cosine:9.6f}  {item.describe()}")
    for kind, chosen in (("texts", [not i.media for i in items]), ("images", [bool(i.media) for i in items])):
        if any(chosen):
            print(f"worst of {sum(chosen)} {kind}: {cosines[np.asarray(chosen)].min():.6f}")
    conforms = bool(cosines.min() >= arguments.least)
    print(
        f"{'conforms' if conforms else 'does not conform'}: worst cosine {cosines.min():.6f}, least {arguments.least}"
    )
    return 0 if conforms else DIFFERS


if __name__ == "__main__":
    sys.exit(main())
