"""Inputs of every kind that b3 reads, changed at random: their structure (JSON, YAML) or their bytes (files)."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from golden_data import GOLDEN, checkpoint  # noqa: E402

from b3.errors import InputError  # noqa: E402

KINDS = "image frames item_dict rows parquet yaml adapter model_folder npy plan settings template archive".split()
Case = Callable[[np.random.Generator, Path], Callable[[], object]]  # writes the damaged input; what reads it

ODD: list[Any] = [
    None, True, False, 0, -1, 2**70, 1.5, float("nan"), float("inf"), "", "\0", "../../etc/passwd", "/etc/passwd",
    "a" * 5000, "\ud800", [], {}, [[]], [None], {"": None}, ["x", 1], {"path": 3}, {"bytes": "!!"}, "{{ 1/0 }}",
    "{% for i in range(10**9) %}{% endfor %}", "{{ ''.__class__.__mro__ }}", "1e999", "<|image_1|>", "\u202e",
    -(2**63), [1, [2, [3, [4]]]],
]  # fmt: skip


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trace), "w")


def bent(value: Any, rng: np.random.Generator) -> Any:
    """JSON with one or more of its parts changed."""
    value = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, 4))):
        places = list(_places(value))
        if not places:
            return ODD[int(rng.integers(len(ODD)))]
        holder, key = places[int(rng.integers(len(places)))]
        what = int(rng.integers(5))
        if what == 0 and isinstance(holder, dict):
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[f"{key}x"] = holder[key]
        elif what == 2 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif what == 3:
            holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(ODD[int(rng.integers(len(ODD)))])
    return value


def _places(value: Any) -> Any:
    if isinstance(value, dict):
        for key, part in value.items():
            yield value, key
            yield from _places(part)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield value, index
            yield from _places(part)


def torn(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with some of its bytes changed."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        size, what = len(data), int(rng.integers(7))
        if not size:
            return bytes(rng.integers(0, 256, 20, dtype=np.uint8))
        at = int(rng.integers(size)) if rng.random() < 0.5 else int(rng.integers(min(size, 200)))  # headers decide most
        length = int(rng.integers(1, 1 + min(64, size)))
        if what == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif what == 1:
            del data[at:]
        elif what == 2:
            data[at : at + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif what == 3:
            data[at : at + length] = b"\xff" * length
        elif what == 4:
            data[at:at] = data[at : at + length]
        elif what == 5:
            del data[at : at + length]
        else:
            data[at : at + 4] = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 65535])).to_bytes(4, "little")
    return bytes(data)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


class Kinds:
    """Valid inputs, made once, and for each kind how a damaged one is written and read."""

    def __init__(self, base: Path) -> None:
        from b3 import Embedder
        from b3.data.items import Item

        self.base = base
        (base / "model").mkdir()
        self.model = Embedder.from_pretrained(checkpoint(base / "model"), dtype="float32", device="cpu")
        self.item = Item
        self.images = [self._picture(form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
        self.trace = base / "executed"

    def _picture(self, form: str) -> bytes:
        from PIL import Image

        file = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        frames = [Image.fromarray(noise), Image.fromarray(noise[::-1])]
        more = {"save_all": True, "append_images": frames[1:]} if form in ("GIF", "WEBP", "TIFF") else {}
        frames[0].save(file, format=form, **more)
        return file.getvalue()

    def image(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        content = torn(self.images[int(rng.integers(len(self.images)))], rng)
        (folder / "x.png").write_bytes(content)
        return lambda: self.model.processor(self.item("<|image_1|>\nwhat?", folder / "x.png"))

    def frames(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        from b3.data.items import as_item

        (folder / "film").mkdir()
        for number in range(int(rng.integers(0, 5))):
            content = self.images[int(rng.integers(len(self.images)))]
            (folder / "film" / f"{number}.png").write_bytes(torn(content, rng) if rng.random() < 0.3 else content)
        return lambda: self.model.processor(as_item({"text": "<|video_1|>\nwhat?", "video": str(folder / "film")}))

    def item_dict(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        (folder / "a.png").write_bytes(self.images[0])
        valid = {"text": "<|image_1|>\nwhat?", "image": str(folder / "a.png"), "instruction": "Say."}
        several = {"text": "two", "images": [str(folder / "a.png")] * 2}
        given = bent([valid, several][int(rng.integers(2))], rng)
        return lambda: self.model.encode([given])

    def rows(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        from b3.data.datasets import load_pairs

        (folder / "a.png").write_bytes(self.images[0])
        row = {"qry": "<|image_1|>\nq", "qry_image_path": "a.png", "pos_text": "t", "pos_image_path": ""}
        rows = [row, {**row, "pos_text": "u"}, {**row, "qry": "text", "qry_image_path": ""}]
        content = b"\n".join(map(dumped, bent(rows, rng))) if rng.random() < 0.7 else b"\n".join(map(dumped, rows))
        if rng.random() < 0.3:
            content = torn(content, rng)
        (folder / "pairs.jsonl").write_bytes(content)
        return lambda: self._read_pairs(load_pairs(f"jsonl:{folder / 'pairs.jsonl'}", "pairs", image_dir=str(folder)))

    def parquet(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from b3.data.datasets import load_pairs

        columns = {"qry": ["q", "r"], "qry_image_path": ["a", ""], "pos_text": ["t", "u"], "pos_image_path": ["", ""]}
        pq.write_table(pa.table(columns), folder / "train.parquet")
        pq.write_table(pa.table({"path": ["a"], "bytes": [self.images[0]]}), folder / "images.parquet")
        name = ["train.parquet", "images.parquet"][int(rng.integers(2))]
        (folder / name).write_bytes(torn((folder / name).read_bytes(), rng))
        source = f"parquet:{folder / 'train.parquet'}"
        return lambda: self._read_pairs(load_pairs(source, "train", image_dir=str(folder / "images.parquet")))

    def _read_pairs(self, dataset: Any) -> None:
        for row in range(len(dataset)):
            for item in (dataset.query(row), dataset.target(row)):
                try:
                    self.model.processor(item)
                except InputError:
                    continue

    def yaml(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        import yaml

        from b3.config import load_config

        recipes = sorted((TESTS.parent / "configs").glob("*.yaml"))
        file = recipes[int(rng.integers(len(recipes)))]
        content = file.read_bytes()
        if rng.random() < 0.7:
            tree = bent(yaml.safe_load(content), rng)
            content = yaml.safe_dump(tree).encode("utf-8", "surrogatepass")
        else:
            content = torn(content, rng)
        for other in recipes:
            shutil.copy(other, folder / other.name)
        (folder / "x.yaml").write_bytes(content)
        return lambda: load_config(folder / "x.yaml")

    def adapter(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        from b3.model.adapter import merge_adapter

        shutil.copytree(GOLDEN / "adapter-dora", folder / "a")
        self._damage(folder / "a", ["adapter_config.json", "adapter_model.safetensors"], rng)
        if rng.random() < 0.1:
            (folder / "a" / "adapter_model.safetensors").unlink()
            (folder / "a" / "adapter_model.bin").write_bytes(pickle.dumps(Payload(self.trace)))
        weights = copy.deepcopy(self.model.backbone)
        return lambda: merge_adapter(weights, folder / "a")

    def model_folder(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        from b3 import Embedder

        shutil.copytree(self.base / "model", folder / "m")
        self.model.save_settings(folder / "m")
        names = ["config.json", "model.safetensors", "tokenizer.json", "b3_settings.json", "preprocessor_config.json"]
        self._damage(folder / "m", [name for name in names if (folder / "m" / name).exists()], rng)
        return lambda: Embedder.from_pretrained(folder / "m", dtype="float32", device="cpu")

    def _damage(self, folder: Path, names: list[str], rng: np.random.Generator) -> None:
        file = folder / names[int(rng.integers(len(names)))]
        if file.suffix == ".json" and file.name != "tokenizer.json" and rng.random() < 0.6:
            file.write_bytes(dumped(bent(json.loads(file.read_text()), rng)))
        else:
            file.write_bytes(torn(file.read_bytes(), rng))

    def npy(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        from b3.mining import mine
        from b3.mining.teacher import load_matrix

        file = io.BytesIO()
        kinds: list[Any] = [
            rng.standard_normal((64, 8)).astype("float32"),
            rng.standard_normal((64, 8)),
            np.zeros((0, 8)),
            np.zeros((64, 0)),
            np.full((64, 8), np.nan),
            np.arange(64),
            np.array([Payload(self.trace)] * 3, dtype=object),
            np.ones((64, 8), dtype="complex64"),
            np.array([["a", "b"]]),
            np.ones((64, 8), order="F"),
        ]
        np.save(file, kinds[int(rng.integers(len(kinds)))], allow_pickle=True)
        (folder / "q.npy").write_bytes(torn(file.getvalue(), rng) if rng.random() < 0.7 else file.getvalue())

        def read() -> None:
            matrix = load_matrix(folder / "q.npy")
            if matrix.size < 10**6:
                mine(matrix, matrix, p=2, m=8, community_size=4)

        return read

    def plan(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        from b3.files import sha256
        from b3.mining.plan import BatchPlan

        if not (self.base / "plan").exists():
            from b3.mining import mine

            vectors = np.random.default_rng(0).standard_normal((64, 8)).astype("float32")
            mine(vectors, vectors, p=2, m=8, community_size=4, hard_negatives=2).save(self.base / "plan")
        shutil.copytree(self.base / "plan", folder / "plan")
        names = sorted(file.name for file in (folder / "plan").iterdir() if file.suffix in (".json", ".npy"))
        self._damage(folder / "plan", names, rng)
        manifest = folder / "plan" / "manifest.json"
        if rng.random() < 0.5:  # whoever edits a plan can also write its checksums
            try:
                facts = json.loads(manifest.read_text())
                facts["sha256"] = {name: sha256(manifest.parent / name) for name in facts["sha256"]}
                manifest.write_text(json.dumps(facts))
            except (ValueError, KeyError, TypeError, AttributeError, OSError):
                pass
        return lambda: BatchPlan.load(folder / "plan")

    def settings(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        from b3.model.settings import resolve_settings

        valid = {
            "format": 1,
            "prompt": "vlm2vec",
            "positions": "1d",
            "pooling": "last",
            "max_pixels": 1003520,
            "min_pixels": 3136,
            "max_length": 512,
            "max_frames": 8,
            "fps": 1.0,
            "dim": 16,
        }
        (folder / "b3_settings.json").write_bytes(dumped(bent(valid, rng)))
        return lambda: resolve_settings("x", {}, folder)

    def template(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        from b3.model.prompts import prompt_rule

        parts = [
            "{{ text }}",
            "{{ instruction }}",
            "{% for i in range(99999999) %}x{% endfor %}",
            "{{ ().__class__.__base__.__subclasses__() }}",
            "{{ 'x' * 10**10 }}",
            "{% include '/etc/passwd' %}",
            "{{ cycler.__init__.__globals__.os.system('true') }}",
            "{% if %}",
            "{{ text.format(text) }}",
            "{{ '%s'|format(text) }}",
            "{{ nothing.more }}",
            "<|image_pad|>",
            "{{ images }}",
            "{{ 1/0 }}",
        ]
        source = "{{ text }}" + "".join(rng.choice(parts, int(rng.integers(1, 4))))
        if rng.random() < 0.3:
            source = torn(source.encode(), rng).decode("utf-8", "replace")

        def read() -> None:
            from dataclasses import replace

            rule = prompt_rule(source)
            processor = replace(self.model.processor, settings=replace(self.model.processor.settings, prompt=source))
            assert rule is not None
            processor(self.item("hello", None))

        return read

    def archive(self, rng: np.random.Generator, folder: Path) -> Callable[[], object]:
        from b3.data.archives import RemoteFile, extract

        names = [
            "a.png",
            "../up.png",
            "/abs.png",
            "x/../../up.png",
            "..\\up.png",
            "C:\\x.png",
            "d/",
            "a.png",
            "\0.png",
            "x" * 300 + ".png",
            "train.parquet",
            ".hidden/x",
            "link",
        ]
        file = folder / "in" / "images.zip"
        file.parent.mkdir()
        with warnings.catch_warnings(), zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
            warnings.simplefilter("ignore")
            for name in rng.choice(names, int(rng.integers(1, 5))):
                info = zipfile.ZipInfo(str(name))
                if name == "link":
                    info.external_attr = 0o120777 << 16
                opened.writestr(info, b"/etc" if name == "link" else self.images[0])
        if rng.random() < 0.6:
            file.write_bytes(torn(file.read_bytes(), rng))
        out = folder / "out"
        out.mkdir()

        def read() -> None:
            try:
                extract(file, out, RemoteFile("images.zip", 1), {"a.png"}, None)
            finally:
                outside = [p for p in folder.rglob("*") if p.is_file() and not p.is_relative_to(out) and p != file]
                assert not outside, outside

        return read

    def all(self) -> dict[str, Case]:
        return {name: getattr(self, name) for name in KINDS}
