"""The programs that write folders, as commands on tiny data, and what of their folders has to be equal in every run."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TESTS = Path(__file__).resolve().parents[1]
PLACES = [str(place) for place in (TESTS / "train", TESTS, TESTS.parent, TESTS / "hardening")]
sys.path[:0] = PLACES
os.environ |= {
    "PYTHONPATH": os.pathsep.join(PLACES),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MPLBACKEND": "Agg",
    "PYTHONWARNINGS": "ignore",
}

import forks  # noqa: E402, F401
import processes  # noqa: E402, F401  also for the programs beside this one
import tiny  # noqa: E402
from forks import CONTEXT, Job  # noqa: E402, F401

# What depends on the machine and the moment, by the name of its JSON key. `items` counts what this start has encoded.
TIMED = set(
    "seconds peak_memory_bytes items items_per_second pairs_per_second tokens_per_second waiting_for_data"
    " tflops_per_rank mfu world_size date report_generated_date timestamp".split()
)
PAGES = ("report.html",)  # show seconds in their text
STEPS = 6


@dataclass(frozen=True)
class Run:
    """One command; it writes below `work`, and nowhere else. arguments: {root} and {work} are filled in."""

    name: str
    program: str  # a module
    arguments: str
    ranks: tuple[int, ...] = (1,)
    workers: str = ""  # the argument that says how many

    def command(self, root: Path, work: Path, workers: int = 0) -> list[str]:
        words = f"{self.arguments} {self.workers}".split()
        return [word.format(root=root, work=work, workers=workers) for word in words]


TRAIN = "{root}/recipe.yaml output_dir={work}/run"
V1 = "--model_name {root}/model --normalize True --dataset_name {root}/data --image_dir {root}/data/images.parquet"
V2 = (
    "--benchmark mmeb_v2 --model_name {root}/v2-model --normalize True --dataset_name {root}/v2/hub"
    " --data_basedir {root}/v2/data --subset_name WebQA MSVD ViDoSeek-doc"
)
EVAL_WORKERS = "--dataloader_num_workers {workers}"
RUNS = {
    run.name: run
    for run in (
        Run("mining", "scripts.mine", "{root}/recipe.yaml mining.dir={work}/plans", (1, 2, 3)),
        Run(
            "mining-arrays",
            "scripts.mine",
            "--queries {root}/queries.npy --targets {root}/targets.npy --out {work}/plan -p 2 -m 20 -k 8"
            " --hard-negatives 3",
        ),
        Run(
            "encoding",
            "scripts.embed",
            "--model {root}/model --input {root}/rows.jsonl --out {work}/index --batch-tokens 200",
            (1, 2, 3),
            "--workers {workers}",
        ),
        Run("training", "train", TRAIN, (1, 2, 3), "train.workers={workers}"),
        Run("training-full", "train", f"{TRAIN} model.train=full", (1, 2), "train.workers={workers}"),
        Run("training-sharded", "train", f"{TRAIN} model.shard=true", (2, 3), "train.workers={workers}"),
        Run(
            "evaluation-v1",
            "eval_mmeb",
            f"{V1} --subset_name words pictures --encode_output_path {{work}}/out",
            (1, 2, 3),
            EVAL_WORKERS,
        ),
        Run(
            "evaluation-v2",
            "eval_mmeb",
            f"{V2} --encode_output_path {{work}}/out",
            (1, 2, 3),
            EVAL_WORKERS,
        ),
        Run("export", "scripts.export", "--model {root}/model --adapter {root}/adapter --out {work}/exported"),
        Run("preparation", "scripts.prepare_mmeb", "eval --source {root}/hub --out {work}/mmeb"),
    )
}


def prepare(root: Path) -> None:
    """Write all that the commands read; takes some seconds."""
    from golden_data import checkpoint

    tiny.write_data(root / "data", rows=48)
    tiny.write_model(root / "model")
    tiny.write_recipe(
        root,
        data={"datasets": [{"subset": "words"}]},
        mining={"teacher": str(root / "model"), "p": 2, "m": 10, "k": 4, "batch_tokens": 200},
        adapter={"dropout": 0.1, "use_dora": True},
        train={"steps": STEPS, "save_every": 2, "log_every": 2},
    )
    rng = np.random.default_rng(0)
    for name in ("queries", "targets"):
        np.save(root / f"{name}.npy", rng.standard_normal((4000, 16), dtype=np.float32))
    rows = [{"id": n, "text": f"a {tiny.COLOURS[n % 8]} {tiny.SHAPES[n % 4]} number {n}"} for n in range(60)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _write_hub(root / "hub")
    (root / "v2-model").mkdir()
    checkpoint(root / "v2-model")
    with tarfile.open(TESTS / "golden" / "mmeb_v2" / "reference.tar.xz") as archive:
        archive.extractall(root / "v2", filter="data")
    _write_adapter(root)


def _write_hub(root: Path) -> None:
    """A copy of the hub with two subsets, whose images are in one archive."""
    root.mkdir()
    with zipfile.ZipFile(root / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for subset in ("CIRR", "N24News"):
            paths = [f"{subset}/{n}.png" for n in range(200)]
            columns = {"qry_img_path": paths, "qry_text": ["what?"] * 200, "tgt_text": [["a"]] * 200}
            buffer = io.BytesIO()
            pq.write_table(pa.table(columns | {"tgt_img_path": [[""]] * 200}), buffer)
            (root / subset).mkdir()
            (root / subset / "test-00000-of-00001.parquet").write_bytes(buffer.getvalue())
            for n, path in enumerate(paths):
                archive.writestr(path, tiny.image(tiny.COLOURS[n % 8], tiny.SHAPES[n % 4], n))


def _write_adapter(root: Path) -> None:
    from b3 import Embedder
    from b3.model.adapter import AdapterSpec, attach_adapter

    model = Embedder.from_pretrained(root / "model", dtype="float32", device="cpu")
    model.backbone = attach_adapter(model.backbone, AdapterSpec(r=4))
    model.save(root / "adapter")


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(part) for key, part in value.items() if key not in TIMED}
    return [_untimed(part) for part in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    """All that a run has left, hidden files too, without what may differ (`TIMED`) and free locks."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")):
        name, data = str(file.relative_to(folder)), file.read_bytes()
        if file.name in PAGES:
            found[name] = "a page"
        elif file.suffix in (".json", ".jsonl"):
            lines = data.decode().splitlines() if file.suffix == ".jsonl" else [data.decode()]
            found[name] = [_untimed(json.loads(line)) for line in lines]
        elif file.name == "summary.md":
            found[name] = re.sub(r"[\d,]+ distinct items .*", "", data.decode())
        elif file.suffix in (".yaml", ".md"):
            text = re.sub(r"workers: \d+", "", data.decode())
            found[name] = text.replace("/elsewhere/", f"/{folder.name}/")  # a finished run tells where it was
        else:
            found[name] = data
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of files that are missing, more, or differ."""
    lines = [f"{name} is missing" for name in one.keys() - other.keys()]
    lines += [f"{name} is left over" for name in other.keys() - one.keys()]
    return sorted(lines + [f"{name} differs" for name in one.keys() & other.keys() if one[name] != other[name]])
