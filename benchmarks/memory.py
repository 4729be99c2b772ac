"""How memory grows with the rows: the peak of each stage of scripts/embed.py and scripts/mine.py, and bytes per row.

    python -m benchmarks.memory --rows 50000 200000 [--programs embed search mine] [--dim 32]
    python -m benchmarks.memory --folder DIR                    mine DIR/recipe.yaml, of `python -m benchmarks.rows`

Each program runs on jsonl files of that many distinct short texts with a tiny random text encoder. Counted is memory
that belongs to the process alone (RssAnon), not files that it maps, which the system takes back as it needs. A stage
is told by the functions that the program is in. With PYTHONPATH another version of b3 is measured. --folder also says
the most that was resident, mapped files included, and the seconds of each stage.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind PYTHONPATH

STAGES = {  # function -> stage; the innermost one counts
    "read_rows": "read rows",
    "identity_of": "identity",
    "load_dataset": "load data",
    "fingerprint": "fingerprint",
    "_fingerprint": "fingerprint",
    "teacher_embeddings": "encode",
    "embed": "encode",
    "unique_items": "equal rows",
    "key_digests": "equal rows",
    "first_seen": "equal rows",
    "measure_over_ranks": "measure",
    "_fill": "encode",
    "save_index": "write index",
    "load_index": "load index",
    "nearest": "search",
    "show": "show",
    "normalise": "normalise",
    "rank_targets": "rank",
    "build_graph": "graph",
    "refine": "swaps",
    "balanced_kmeans": "pieces",
    "find_communities": "communities",
    "draw_negatives": "negatives",
    "make_report": "report",
}
PAUSE = 0.0025  # seconds between two looks at the stage; memory is looked at half as often
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "pu", "ro", "sa", "te", "vu", "zi") for b in "bcdfghjklm"]


def write_rows(folder: Path, rows: int) -> None:
    """rows.jsonl of texts to embed, pairs.jsonl of texts to mine, recipe.yaml."""
    rng = random.Random(rows)

    def text(row: int) -> str:
        return f"{row} " + " ".join(rng.choices(WORDS, k=8))

    with (folder / "rows.jsonl").open("w") as own, (folder / "pairs.jsonl").open("w") as pairs:
        for row in range(rows):
            query, target = text(row), text(row)
            own.write(json.dumps({"id": f"row-{row}", "text": query}) + "\n")
            pair = {"qry": query, "qry_image_path": "", "pos_text": target, "pos_image_path": ""}
            pairs.write(json.dumps(pair) + "\n")


def recipe(folder: Path) -> str:
    model = folder.parent / "model"
    return f"""name: memory
model: {{name: {model}, train: full, dtype: float32}}
data: {{source: "jsonl:{folder}/pairs.jsonl", datasets: [{{subset: pairs}}]}}
mining: {{dir: {folder}/plans, teacher: {model}, p: 10, m: 30, community_size: 16, refine_passes: 4}}
batch: {{size: 64}}
train: {{steps: 1, lr: 1.0e-4}}
output_dir: {folder}/run
"""


def run_child(program: str, folder: Path) -> None:
    """One program, with a thread that notes when it goes from stage to stage."""
    main, notes = threading.main_thread().ident, [(time.monotonic(), "start")]
    if program == "embed":
        from scripts.embed import main as start

        model, out = str(folder.parent / "model"), str(folder / "index")
        arguments = ["--model", model, "--input", str(folder / "rows.jsonl"), "--out", out, "--dtype", "float32"]
    elif program == "search":  # a hundred queries, in what embed wrote
        from scripts.search import main as start

        queries = folder / "queries.jsonl"
        with (folder / "rows.jsonl").open() as lines:
            queries.write_text("".join(islice(lines, 100)))
        arguments = ["--index", str(folder / "index"), "--queries", str(queries), "--json"]
    else:
        from scripts.mine import main as start

        if not (folder / "recipe.yaml").exists():
            (folder / "recipe.yaml").write_text(recipe(folder))
        arguments = [str(folder / "recipe.yaml")]

    def watch() -> None:
        while True:
            frame, stage = sys._current_frames().get(main or 0), "start"
            while frame is not None:
                if frame.f_code.co_name in STAGES:
                    stage = STAGES[frame.f_code.co_name]
                    break
                frame = frame.f_back
            if stage != notes[-1][1]:
                notes.append((time.monotonic(), stage))
            time.sleep(PAUSE)

    threading.Thread(target=watch, daemon=True).start()
    code = start(arguments)
    (folder / f"{program}.json").write_text(json.dumps(notes))
    sys.exit(code)


def resident(process: int) -> tuple[int, int]:
    """Bytes of memory that belong to a process alone, and all that it has resident; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith("kB")}
    return sizes.get("RssAnon", 0), sizes.get("VmRSS", 0)


def peaks(program: str, folder: Path, index: int = 0) -> dict[str, int]:
    """The most bytes that a program had in each of its stages; index 0: of its own, 1: resident."""
    return {stage: sizes[index] for stage, sizes in watch(program, folder).items()}


def watch(program: str, folder: Path) -> dict[str, tuple[int, int, float]]:
    """By stage of a program: the most bytes of its own and resident, and seconds."""
    child = subprocess.Popen([sys.executable, __file__, "--child", program, "--folder", str(folder)])
    samples = []
    while child.poll() is None:
        samples.append((time.monotonic(), *resident(child.pid)))
        time.sleep(2 * PAUSE)
    if child.returncode:
        raise SystemExit(f"{program} ended with code {child.returncode}")
    notes = json.loads((folder / f"{program}.json").read_text())
    result: dict[str, tuple[int, int, float]] = {}
    last = samples[0][0]
    for at, own, whole in samples:
        stage = next((name for start, name in reversed(notes) if start <= at), "start")
        before = result.get(stage, (0, 0, 0.0))
        result[stage] = max(before[0], own), max(before[1], whole), before[2] + at - last
        last = at
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=(50_000, 200_000), help="two numbers of rows")
    programs = ["embed", "search", "mine"]
    parser.add_argument(
        "--programs", nargs="+", default=programs, choices=programs, help="search needs embed before it"
    )
    parser.add_argument("--dim", type=int, default=32, help="numbers of a vector")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="of benchmarks.rows: mine its recipe")
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child, arguments.folder)
    if arguments.folder:
        print("| stage | GB of its own | GB resident | seconds |\n|---|---:|---:|---:|")
        for stage, (own, whole, seconds) in watch("mine", arguments.folder).items():
            print(f"| {stage} | {own / 1e9:.2f} | {whole / 1e9:.2f} | {seconds:.0f} |")
        return
    from b3.model.backbones.tiny import make_tiny_text_model

    with tempfile.TemporaryDirectory() as name:
        texts = [" ".join(WORDS), *map(str, range(1000))]
        make_tiny_text_model(Path(name) / "model", texts, hidden=arguments.dim, vocab_size=512)
        found = {}
        for rows in arguments.rows:
            folder = Path(name) / str(rows)
            folder.mkdir()
            write_rows(folder, rows)
            found[rows] = {program: peaks(program, folder) for program in arguments.programs}
    few, many = arguments.rows
    print(f"| program | stage | MB at {few:,} rows | MB at {many:,} rows | bytes per row |\n|---|---|---|---|---|")
    for program in arguments.programs:
        for stage, size in found[many][program].items():
            before = found[few][program].get(stage, 0)
            grown = round((size - before) / (many - few)) if before else "?"
            print(f"| {program} | {stage} | {before / 1e6:.0f} | {size / 1e6:.0f} | {grown} |")


if __name__ == "__main__":
    main()
