"""Embed your own rows.

    python scripts/embed.py --model Qwen/Qwen2-VL-2B-Instruct --adapter runs/b3 --input rows.jsonl --out my-index

A row of the .jsonl or .parquet file has a text, an image, or both. The image is a path, bytes, or the struct
{bytes, path}; in jsonl bytes are base64 text under image_base64. Shards of webdataset (0001.jpg, 0001.txt) are read as
they are: --input 'shards/*.tar'. --out then holds embeddings.npy, ids.json, rows.jsonl
and manifest.json, and scripts/search.py searches it. An interrupted run continues; a finished one has nothing to do.
Several processes share the rows: torchrun --nproc_per_node=8 scripts/embed.py ...
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from b3 import distributed
from b3.data.codes import PRECISIONS
from b3.data.digests import digest, first_seen, joined
from b3.data.index import KIND, is_done, model_arguments, save_index
from b3.data.lazy import Lazy
from b3.data.own import OwnData, add_rows_arguments, columns_of, instructed, read_rows
from b3.errors import InputError, command
from b3.files import sha256, tidy
from b3.locks import alone


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name or folder of a model, or of an adapter repository")
    parser.add_argument("--adapter", help="folder or hub name of an adapter to merge")
    parser.add_argument(
        "--input", type=Path, required=True, help=".jsonl or .parquet file, .tar shard, or a pattern of them"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--instruction",
        "--query-prompt",
        default="",
        help="put before each text, or where the prompt rule has its place",
    )
    add_rows_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    model.add_argument("--min-pixels", type=int, help="fewest pixels of an image (default: the checkpoint's)")
    model.add_argument("--max-pixels", type=int, help="most pixels of an image (default: the checkpoint's)")
    model.add_argument("--dim", type=int, help="cut vectors to their first so many numbers (default: the checkpoint's)")
    model.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="what is stored: float32, int8 (a quarter), or binary: signs to search and int8 to score what they find;"
        " the recall against float32 is measured, printed and kept in the manifest",
    )
    model.add_argument("--batch-tokens", type=int, help="tokens of one forward pass")
    model.add_argument("--workers", type=int, help="processes that decode images ahead (default: by the device)")
    model.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=True, help="unit length")
    return parser


def identity_of(arguments: argparse.Namespace, data: OwnData) -> dict[str, Any]:
    """What decides the vectors, in the form that the manifest keeps."""
    from b3.model.checkpoint import adapter_key, checkpoint_key

    root = arguments.image_dir or arguments.input.parent
    images = hashlib.sha256()  # over the paths and sizes of those that are files
    rows = np.asarray([row for row, shown in enumerate(data.shown) if shown["image"]], dtype=np.int64)
    for row in rows[first_seen(joined(digest(data.shown[row]["image"]) for row in rows.tolist()))[0]].tolist():
        path = data.shown[row]["image"]
        images.update(f"{os.path.relpath(path, root)}\0{os.path.getsize(path)}\n".encode())
    options = ["dtype", "min_pixels", "max_pixels", "dim", "normalize", "instruction"]
    options += ["precision"] if arguments.precision != "float32" else []
    return {
        "kind": KIND,
        "model": checkpoint_facts(arguments.model, checkpoint_key),
        "adapter": None if arguments.adapter is None else checkpoint_facts(arguments.adapter, adapter_key),
        "input": {
            "path": str(arguments.input.resolve()),
            "path_images": str(root.resolve()),
            "sha256": content_of(data.files),
            "images_sha256": images.hexdigest(),
        },
        "options": {name: getattr(arguments, name) for name in options} | asdict(columns_of(arguments)),
    }


def content_of(files: list[Path]) -> str:
    """SHA-256 of a file; of several, that of their names and digests."""
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("".join(f"{file.name}\0{sha256(file)}\n" for file in files).encode()).hexdigest()


def checkpoint_facts(name: str, key_of: Callable[[str], str]) -> dict[str, str]:
    """{"name", "key"} of a checkpoint; a folder's name becomes absolute."""
    folder = Path(name).expanduser()
    return {"name": str(folder.resolve()) if folder.is_dir() else name, "key": key_of(name)}


def embed(arguments: argparse.Namespace, data: OwnData, identity: dict[str, Any]) -> dict[str, Any]:
    """Encode all rows and write the folder; returns the manifest."""
    import torch
    import transformers

    import b3
    from b3 import Embedder
    from b3.integrations.items import has_place_for_instructions
    from b3.model.cache import EmbeddingCache
    from b3.model.encode import Encoder, unit

    start = time.monotonic()
    embedder = Embedder.from_pretrained(**model_arguments(identity))
    folder = arguments.out / ".partial"
    facts = {part: identity[part] for part in ("model", "adapter", "options")}
    facts["numerics"] = embedder.numerics
    encoder = Encoder(embedder, arguments.batch_tokens, workers=arguments.workers, cache=EmbeddingCache(folder, facts))
    has_place = has_place_for_instructions(embedder)
    items = Lazy(lambda row: instructed(data.items[row], arguments.instruction, has_place), range(len(data)))
    vectors = encoder.encode(items, progress="embed")
    vectors = unit(vectors, in_place=True) if arguments.normalize else vectors
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    manifest = {
        **identity,
        "rows": len(vectors),
        "dim": int(vectors.shape[1]),
        "batch_tokens": arguments.batch_tokens,
        "device": embedder.device.type,
        "dtype": str(embedder.dtype).removeprefix("torch."),
        "seconds": round(time.monotonic() - start, 2),
        "versions": {"b3": getattr(b3, "__version__", "unknown"), **versions},
    }
    if distributed.rank() == 0:
        manifest = save_index(arguments.out, vectors, data, manifest)
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def begin(out: Path, identity: dict[str, Any], held: ExitStack) -> bool:
    """Whether there is something to do; the first rank decides for all, and locks the folder as long as `held` is."""
    todo = False
    if distributed.rank() == 0 and not is_done(out, identity):
        held.enter_context(alone(out, "index", "choose another --out"))
        tidy(out)
        todo = not is_done(out, identity)  # another process may have ended meanwhile
    return distributed.any_rank(todo)


@partial(command, memory="lower --batch-tokens, or give fewer --workers")
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.batch_tokens is not None and arguments.batch_tokens < 1:
        raise InputError(f"--batch-tokens is {arguments.batch_tokens}; give at least 1")
    data = read_rows(arguments.input, columns_of(arguments), arguments.image_dir)
    identity = identity_of(arguments, data)
    distributed.start()
    with ExitStack() as held:
        todo = begin(arguments.out, identity, held)
        manifest = embed(arguments, data, identity) if todo else {}
        distributed.barrier()
    distributed.stop()
    if not distributed.is_first():
        return 0
    if not todo:
        print(f"{arguments.out} holds these {len(data):,} embeddings already; nothing to do")
        return 0
    print(f"{arguments.out}: {manifest['rows']:,} rows, {manifest['dim']} dimensions, {manifest['seconds']:.1f} s")
    if measured := manifest.get("recall"):
        print(
            f"{arguments.precision}: recall@{measured['at']} against float32 is {measured['value']}, over"
            f" {measured['queries']} rows as queries"
        )
    return 0


if __name__ == "__main__":
    distributed.leave(main())
