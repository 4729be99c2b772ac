"""Search a folder that scripts/embed.py wrote.

    python scripts/search.py --index my-index --query "a red car" --top 10
    python scripts/search.py --index my-index --query-image car.jpg --html results.html
    python scripts/search.py --index my-index --queries rows.jsonl
    python scripts/search.py --index my-index --serve                         a page on http://127.0.0.1:8000

The model of the index embeds the query. Scores are inner products (cosines, as vectors have unit length by default).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the programs beside it

import numpy as np

from b3 import html
from b3.data.codes import Floats, Hits, nearest
from b3.data.index import Index, IndexedImages, load_index, model_arguments
from b3.data.items import Item
from b3.data.lazy import Lazy
from b3.data.own import add_rows_arguments, columns_of, instructed, prompt, read_rows
from b3.errors import DataError, InputError, RunError, command
from b3.files import write_text
from b3.html import image_tag, shorten

if TYPE_CHECKING:
    from b3 import Embedder


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True, help="folder of scripts/embed.py")
    parser.add_argument("--query", help="a text; with --query-image both are one query")
    parser.add_argument("--query-image", type=Path, help="an image file")
    parser.add_argument(
        "--queries", type=Path, help=".jsonl or .parquet file of queries, read as scripts/embed.py does"
    )
    parser.add_argument(
        "--instruction",
        "--query-prompt",
        default="",
        help="of each query; put before its text, or where the prompt rule has its place",
    )
    parser.add_argument("--dim", type=int, help="compare only the first so many numbers of each vector")
    parser.add_argument("--top", type=int, default=10, help="results per query (default 10)")
    parser.add_argument("--serve", action="store_true", help="open a page on this machine to search with")
    parser.add_argument("--port", type=int, default=8000, help="of the page (default 8000; 0: any that is free)")
    parser.add_argument("--json", action="store_true", help="print a JSON object per query instead of a table")
    parser.add_argument("--html", type=Path, help="also write a page with thumbnails")
    parser.add_argument("--model", help="where the model is now, if the index was made elsewhere")
    parser.add_argument("--adapter", help="where the adapter is now")
    add_rows_arguments(parser)
    return parser


def read_queries(arguments: argparse.Namespace) -> tuple[Sequence[str], Sequence[Item]]:
    """Label and item of each query."""
    single = arguments.query is not None or arguments.query_image is not None
    if single == (arguments.queries is not None):
        raise InputError("give either --query and/or --query-image, or --queries")
    if arguments.queries is not None:
        data = read_rows(arguments.queries, columns_of(arguments), arguments.image_dir)

        def label_of(row: int) -> str:
            shown = data.shown[row]
            return f"{shown['id']}: {line_of(shown['text'] or shown['image'] or '(image)')}"

        return Lazy(label_of, range(len(data))), data.items
    text, image = arguments.query or "", arguments.query_image
    if image is None and not text.strip():
        raise InputError("--query is empty; give a text")
    if image is not None and not image.is_file():
        raise DataError(f"--query-image {image} does not exist")
    label = " + ".join(part for part in (text, image and str(image)) if part)
    return [label], [Item(prompt(text, image is not None), image)]


def model_of(arguments: argparse.Namespace, manifest: dict[str, Any]) -> Embedder:
    """The model of the index. Raises `RunError` if that is not there any more."""
    from b3 import Embedder
    from b3.model.checkpoint import adapter_key, checkpoint_key

    for part, key_of in (("model", checkpoint_key), ("adapter", adapter_key)):
        if getattr(arguments, part):
            if manifest[part] is None:
                raise RunError(f"{arguments.index} was made without an {part}; leave out --{part}")
            manifest[part]["name"] = getattr(arguments, part)
        if manifest[part] and key_of(manifest[part]["name"]) != manifest[part]["key"]:
            raise RunError(
                f"{part} {manifest[part]['name']} is not the one that made {arguments.index}; embed the rows again,"
                f" or give --{part}"
            )
    return Embedder.from_pretrained(**model_arguments(manifest))


def cut(vectors: np.ndarray, dim: int, manifest: dict[str, Any]) -> np.ndarray:
    """The first `dim` numbers of vectors (N, D), L2-normalised again if those of the index are."""
    from b3.model.encode import unit

    return unit(vectors[:, :dim]) if manifest["options"]["normalize"] else vectors[:, :dim]


def search(index: Index, queries: np.ndarray, top: int, dim: int | None = None) -> Iterator[Hits]:
    """The `top` rows per query (Q, D), compared by the first `dim` numbers; see `b3.data.codes.nearest`.

    Raises `InputError` for a `dim` that the index does not have.
    """
    if dim is None:
        return (nearest(index.vectors, query[None], top, index.bits)[0] for query in queries)
    if dim > index.vectors.width:
        raise InputError(f"--dim {dim} exceeds the {index.vectors.width} numbers of a vector of the index; lower it")
    if index.bits is not None:
        raise InputError(f"--dim {dim} is not for an index of signs; embed the rows with --dim {dim}")
    whole = index.vectors.take(slice(None))
    vectors = Floats(cut(whole, dim, index.manifest))
    return (nearest(vectors, query[None], top)[0] for query in cut(queries, dim, index.manifest))


def line_of(text: str, most: int = 70) -> str:
    return shorten(" ".join(text.split()), most)


def show(label: str, hits: Hits, rows: Sequence[dict[str, Any]], as_json: bool = False) -> None:
    """Print the results of one query, as a table or as a line of JSON."""
    if as_json:
        print(
            json.dumps({"query": label, "results": [{"score": s, **rows[row]} for row, s in hits]}, ensure_ascii=False)
        )
        return
    print(f"query: {line_of(label, 100)}")
    width = max(2, *(len(str(rows[row]["id"])) for row, _ in hits))
    print(f"{'rank':>4}  {'score':>7}  {'id':{width}}  text")
    for rank, (row, score) in enumerate(hits, 1):
        text = line_of(rows[row]["text"]) or rows[row]["image"] or "(image)"
        print(f"{rank:>4}  {score:7.4f}  {rows[row]['id']!s:{width}}  {text}")
    print()


def render(results: list[tuple[str, Item, Hits]], rows: Sequence[dict[str, Any]], manifest: dict[str, Any]) -> str:
    """A page without outside parts: each query, its results with thumbnails, and their texts if there are any."""
    images = IndexedImages(rows, manifest)
    keys = ["id", *(["text"] if any(rows[row]["text"] for _, _, hits in results for row, _ in hits) else [])]
    parts = ["<h1>Search results</h1>"]
    for label, item, hits in results:
        lines = []
        for rank, (row, score) in enumerate(hits, 1):
            texts = (escape(line_of(str(rows[row][key]), 300)) for key in keys)
            lines.append([str(rank), f"{score:.4f}", image_tag(images.source(row)), *texts])
        head = ["rank", "score", "image", *keys]
        parts += [f"<h2>{escape(line_of(label, 300))}</h2>", image_tag(item.image), html.table(head, lines)]
    return html.page("Search results", parts)


@command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    for name, value in (("top", arguments.top), ("dim", arguments.dim)):
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}; give at least 1")
    index = load_index(arguments.index)
    if arguments.serve:
        from scripts.serve import serve

        serve(index, model_of(arguments, index.manifest), arguments.port, arguments.instruction)
        return 0
    from b3.integrations.items import has_place_for_instructions
    from b3.model.encode import Encoder, unit

    labels, items = read_queries(arguments)
    model = model_of(arguments, index.manifest)
    has_place = has_place_for_instructions(model)
    asked = Lazy(lambda row: instructed(items[row], arguments.instruction, has_place), range(len(items)))
    vectors = Encoder(model, workers=0).encode(asked)
    vectors = unit(vectors) if index.manifest["options"]["normalize"] else vectors
    results = []
    for label, item, hits in zip(labels, asked, search(index, vectors, arguments.top, arguments.dim), strict=True):
        show(label, hits, index.rows, arguments.json)
        if arguments.html:
            results.append((label, item, hits))
    if arguments.html:
        write_text(arguments.html, render(results, index.rows, index.manifest))
        print(f"page: {arguments.html}", file=sys.stderr if arguments.json else sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
