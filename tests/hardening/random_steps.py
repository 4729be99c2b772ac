"""Random training steps against a plain graph and loops, and random runs resumed against straight ones.

    python tests/hardening/random_steps.py [--minutes 10] [--first 1000] [--cases 100000]
    python tests/hardening/random_steps.py --only 4711          one case again, with its traceback

A case is a function of its number (`tests/train/step_cases.py`): backbone (Qwen2-VL, Qwen3-VL with DeepStack, BERT),
adapter or full training, dropout, precision, chunks, 1 to 3 ranks, repeated items, hard negatives, masks, directions,
lengths, a teacher, several right targets. Every 50th is a run instead: killed after a random step and continued, it
must have the lines of the log and the weights of a straight one, bit by bit. Prints what fails; exit code 1 if any did.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "train"), str(TESTS), str(TESTS.parent)]

import conftest  # noqa: E402, F401  one thread, no network: before torch is imported
import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from step_cases import Models, check, draw  # noqa: E402

import train  # noqa: E402

EVERY = 50


def recipe_of(number: int) -> list[str]:
    """Overrides of a random recipe over `tiny.recipe`."""
    rng = np.random.default_rng(number)

    def one(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    keys = [f"seed={number % 1000}", f"adapter.dropout={one(0, 0.2)}", f"adapter.use_dora={one('true', 'false')}"]
    keys += [f"train.chunk_tokens={one(40, 128, 10000)}", f"train.kept_chunks={one(1, 2)}"]
    keys += [f"train.symmetric={one('true', 'false')}", f"train.log_every={one(1, 2)}", f"batch.size={one(4, 12)}"]
    keys += one([], ["train.matryoshka=[4,16]"], ["train.learn_temperature=true"])
    keys += one([], ["model.train=full", "train.lr=1e-3"]) if "false" in keys[2] and "=0" in keys[1][-2:] else []
    return [*keys, "batch.policy=" + one("random", "random_mixed")]


def resumed(root: Path, number: int) -> None:
    """A run that was cut off after a random step against a straight one. Raises `AssertionError` where they differ."""
    steps = 5
    at = int(np.random.default_rng(number).integers(1, steps))
    common = [str(root / "recipe.yaml"), *recipe_of(number), f"train.steps={steps}", "train.save_every=1"]
    common.append("train.keep_checkpoints=9")
    runs = root / f"straight-{number}", root / f"resumed-{number}"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        assert train.main([*common, f"output_dir={runs[0]}"]) == 0, said.getvalue()
        shutil.copytree(runs[0], runs[1])
        for later in range(at + 1, steps + 1):
            shutil.rmtree(runs[1] / f"checkpoint-{later}")
        for name in ("result.json", "config.yaml"):
            (runs[1] / name).unlink()
        text = (runs[0] / "config.yaml").read_text().replace(str(runs[0]), str(runs[1]))
        (runs[1] / "config.yaml").write_text(text)
        torch.manual_seed(number)  # whatever this process has drawn
        assert train.main([*common, f"output_dir={runs[1]}"]) == 0, said.getvalue()
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert tiny.without_times(logs[0]) == tiny.without_times(logs[1])
    for file in (runs[0] / f"checkpoint-{steps}").glob("*.safetensors"):
        mine, theirs = load_file(file), load_file(runs[1] / f"checkpoint-{steps}" / file.name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine), file.name
    for run in runs:
        shutil.rmtree(run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--first", type=int, default=1000)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed, done, runs, started = [], 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny.write_data(root / "data", rows=24)
        tiny.write_model(root / "model")
        tiny.write_recipe(root)
        models = Models(root / "models")
        numbers = range(arguments.first, arguments.first + arguments.cases)
        for number in [arguments.only] if arguments.only is not None else numbers:
            if time.monotonic() - started > 60 * arguments.minutes:
                break
            try:
                if number % EVERY == 0:
                    resumed(root, number)
                    runs += 1
                else:
                    check(draw(number), models)
                    done += 1
            except Exception:
                failed.append(number)
                print(f"case {number}: {draw(number)}\n{traceback.format_exc()}", flush=True)
    seconds = time.process_time()
    print(f"{done} steps and {runs} resumed runs, {len(failed)} failed {failed}; {seconds:.0f} s of processor time")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
