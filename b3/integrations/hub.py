"""Put a run on the Hugging Face hub: weights, plans, evaluations, and a card that states the results.

    python -m b3.integrations.hub runs/b3 --repo OWNER/NAME --eval runs/b3/eval

Private unless --public. Results become the card's `model-index`, which the hub shows beside the model. A folder of
`scripts/export.py` goes the same way. Log in first: hf auth login.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b3.errors import InputError, RunError, command
from b3.mining.plan import FILES as PLAN_FILES
from b3.model.adapter import CONFIG_FILE as ADAPTER_CONFIG
from b3.model.checkpoint import read_json

LEFT_OUT = re.compile(r"\.|bad_rows|nonfinite-")  # names that begin so: leftovers, and rows of the user's data
MODULE_FOLDERS = ("1_Pooling", "2_Dense")


def push(
    folder: str | Path, repo: str, evaluations: Sequence[str | Path] = (), public: bool = False, merged: bool = False
) -> str:
    """Create `repo` if it is not there, put everything there in one commit, and return its address.

    Args:
        folder: of a finished run, or of an export.
        repo: OWNER/NAME.
        evaluations: folders of eval_mmeb.py.
        merged: take the run's `merged` folder instead of its adapter.

    Raises:
        InputError: the folder is not finished, or others could not load what it holds.
        RunError: the hub refuses, or is not reached.
    """
    folder = Path(folder)
    weights = folder / "merged" if merged else folder
    check(weights)
    files = files_of(folder, weights) | plans_of(folder) | evaluations_of(evaluations)
    card = card_of(folder, repo, evaluations)
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import HfHubHTTPError

    operations = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        info = api.create_commit(repo, operations, commit_message=f"{folder.resolve().name}, from b3")
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"the hub did not take {repo} ({what}); check the name and log in: hf auth login") from None
    return str(info.repo_url)


def check(weights: Path) -> None:
    """Raise `InputError` if a folder holds no weights, or an adapter whose base others do not have."""
    names = {file.name for file in weights.glob("*.safetensors")} if weights.is_dir() else set()
    if not any(name.startswith(("model", "adapter_model")) for name in names):
        raise InputError(f"{weights} holds no weights; give the folder of a finished run, or of scripts/export.py")
    if (weights / ADAPTER_CONFIG).is_file():
        base = str(read_json(weights / ADAPTER_CONFIG)["base_model_name_or_path"])
        if not is_hub_name(base):
            raise InputError(
                f"the adapter in {weights} needs the local folder {base}, which others do not have; export it"
                " (scripts/export.py) and push that, or give --merged"
            )


def is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def files_of(folder: Path, weights: Path) -> dict[str, Path]:
    """Files of the repository, by name: all in the folder of the weights, the run's own, modules; no checkpoints."""
    found = {}
    for place in dict.fromkeys((folder, weights)):
        for file in sorted(place.iterdir()):
            is_other = place != weights and (file.suffix == ".safetensors" or file.name == ADAPTER_CONFIG)
            if file.is_file() and not LEFT_OUT.match(file.name) and not is_other:
                found[file.name] = file
    modules = [file for name in MODULE_FOLDERS for file in sorted((weights / name).glob("*"))]
    found |= {f"{file.parent.name}/{file.name}": file for file in modules}
    found.pop("README.md", None)
    return found


def plans_of(folder: Path) -> dict[str, Path]:
    """The batch plans of a run, below plans/."""
    if not (folder / "config.yaml").is_file():
        return {}
    from b3.config import load_config

    config = load_config(folder / "config.yaml")
    if not config.needs_plan:
        return {}
    names = [entry.subset for entry in config.data.datasets]
    places = {name: Path(config.mining.dir) / name for name in names}
    missing = [name for name, place in places.items() if not (place / "manifest.json").is_file()]
    if missing:
        print(f"note: the plans of {', '.join(missing)} are not in {config.mining.dir} and stay out", file=sys.stderr)
    return {
        f"plans/{name}/{file}": place / file
        for name, place in places.items()
        if name not in missing
        for file in PLAN_FILES
        if (place / file).is_file()
    }


def evaluations_of(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Summaries and score files, below evaluation/."""
    found = {}
    for folder in map(Path, folders):
        if not (folder / "summary.json").is_file():
            raise InputError(f"{folder} holds no summary.json; give a folder of eval_mmeb.py")
        for file in sorted([*folder.glob("summary.*"), folder / "manifest.json", *folder.rglob("*_score.json")]):
            if file.is_file():
                found[f"evaluation/{folder.name}/{file.relative_to(folder)}"] = file
    return found


def card_of(folder: Path, repo: str, evaluations: Sequence[str | Path]) -> str:
    """The run's card under its new name, with the results as model-index; a local base goes unnamed."""
    from huggingface_hub import ModelCard

    file = folder / "README.md"
    card: Any = ModelCard(file.read_text() if file.is_file() else f"---\ntags: [b3]\n---\n# {repo}\n")
    card.text = card.text.replace(f'"{folder}', f'"{repo}')
    base = card.data.base_model
    if isinstance(base, str) and not is_hub_name(base):
        card.data.base_model = None
    results = [result for evaluation in evaluations for result in results_of(Path(evaluation))]
    if results:
        card.data.model_name = repo.partition("/")[2]
        card.data.eval_results = results
    return str(card)


def results_of(folder: Path) -> list[Any]:
    """Scores of an evaluation in percent: its mean and each subset, as huggingface_hub's `EvalResult`."""
    from huggingface_hub import EvalResult

    from b3 import registry
    from b3.data.tables import at_revision
    from b3.eval.benchmark import OTHER

    summary, manifest = read_json(folder / "summary.json"), read_json(folder / "manifest.json")
    benchmark = registry.load("benchmark", manifest["benchmark"])
    source, revision = at_revision(str(manifest["source"]).removeprefix("hub:"))

    def result(name: str, metric: str, score: float, config: str | None) -> Any:
        return EvalResult(
            task_type="retrieval",
            dataset_type=source,
            dataset_revision=revision,
            dataset_name=name,
            dataset_config=config,
            dataset_split=manifest["split"],
            metric_type=metric,
            metric_value=round(100 * score, 2),
        )

    metrics = {name: benchmark.task(name).metric for name in summary["subsets"]}
    title = benchmark.name.upper() if any(benchmark.task(n).family != OTHER for n in metrics) else "own data"
    kinds = set(metrics.values())
    mean = result(f"{title}, mean of {len(metrics)}", kinds.pop() if len(kinds) == 1 else "mean", summary["mean"], None)
    return [mean, *(result(f"{title} {n}", metrics[n], score, n) for n, score in summary["subsets"].items())]


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m b3.integrations.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a finished run, or of scripts/export.py")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME")
    parser.add_argument("--eval", type=Path, nargs="+", default=[], metavar="DIR", help="folders of eval_mmeb.py")
    parser.add_argument("--merged", action="store_true", help="whole weights from FOLDER/merged instead of the adapter")
    parser.add_argument("--public", action="store_true", help="for everyone to see (default: private)")
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.repo):
        raise InputError(f"--repo '{arguments.repo}' is not of the form OWNER/NAME")
    url = push(arguments.folder, arguments.repo, arguments.eval, arguments.public, arguments.merged)
    print(f"{url} ({'public' if arguments.public else 'private'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
