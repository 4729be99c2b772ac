"""Damaged inputs by the ten thousand through the real loaders: each is read, or refused with an `InputError`.

    python tests/hardening/mutate_inputs.py [--cases 20000] [--minutes M] [--kinds image,plan] [--seed 0]
    python tests/hardening/mutate_inputs.py --kinds image --only 4711      one case again, with its traceback

A case is a function of (seed, kind, number): a valid input of that kind, changed in its structure (JSON and YAML:
values of other types, missing and unknown keys; files: bytes flipped, cut, doubled, replaced). It must end within
`SECONDS`, raise nothing but `InputError` with one line, leave memory below `GROWTH`, and run no code that the input
brings along. Prints a line for each finding and a table; exit code 1 if there is any finding. Not part of `make test`.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType

import numpy as np
from damaged import KINDS, Case, Kinds

from b3.errors import InputError

LEAST = 20  # cases of a kind, also where making its valid inputs took all of its time
SECONDS, GROWTH = 60, 3 * 2**30  # an image just below the 179 million pixels that Pillow allows takes 2.4 GiB


class TooLong(BaseException):
    """A case that does not end."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong


def one(case: Case, kind: str, number: int, seed: int, base: Path, trace: Path) -> str | None:
    """Run a case; what is wrong, or None."""
    digest = hashlib.sha256(f"{seed}/{kind}/{number}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    folder = Path(tempfile.mkdtemp(dir=base))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case(rng, folder)()
    except InputError as error:
        text = str(error)
        if "\n" in text.strip() or not text.strip():
            return f"a message of several lines or none: {text[:200]!r}"
    except TooLong:
        return f"took longer than {SECONDS} s: " + "".join(traceback.format_exc().splitlines(keepends=True)[-6:])
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "/b3/" in f.filename]
        return f"{type(error).__name__}: {str(error)[:150]!r} at {' '.join(ours[-3:])}"
    finally:
        signal.alarm(0)
        shutil.rmtree(folder, ignore_errors=True)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if grown > GROWTH:
        return f"memory grew by {grown / 2**30:.1f} GiB"
    return "code of the input was executed" if trace.exists() else None


def run(kind: str, numbers: range, seed: int, deadline: float, at: Path) -> tuple[int, int]:
    """Run cases of a kind in this process; (how many, how many findings). The file `at` says which one is running."""
    signal.signal(signal.SIGALRM, _too_long)
    count = findings = 0
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        made = Kinds(base)
        case = made.all()[kind]
        for number in numbers:
            if count >= LEAST and time.time() > deadline:
                break
            at.write_text(str(number))
            problem = one(case, kind, number, seed, base, made.trace)
            made.trace.unlink(missing_ok=True)
            count += 1
            if problem is not None:
                findings += 1
                print(f"{kind} {number}: {problem}", flush=True)
    return count, findings


def in_processes(kind: str, total: int, seed: int, deadline: float) -> tuple[int, int, list[int]]:
    """As `run`, in processes of their own, since a library may crash; and the cases that ended one."""
    count, findings, crashed, start = 0, 0, [], 0
    with tempfile.TemporaryDirectory() as name:
        at = Path(name) / "at"
        while start < total and time.time() < deadline:
            inner = ["--inner", str(at), "--start", str(start), "--cases", str(total), "--until", str(deadline)]
            command = [sys.executable, __file__, "--kinds", kind, "--seed", str(seed), *inner]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
            *lines, last = done.stdout.splitlines() or [""]
            if done.returncode == 0:
                print("".join(f"{line}\n" for line in lines), end="", flush=True)
                part, found = map(int, last.split())
                return count + part, findings + found, crashed
            lines += [last] if last else []
            number = int(at.read_text())
            print(
                "".join(f"{line}\n" for line in lines) + f"{kind} {number}: the process died ({done.returncode})",
                flush=True,
            )
            count, findings, start = count + number - start + 1, findings + len(lines), number + 1
            crashed.append(number)
    return count, findings, crashed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000, help="of all kinds together")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of them, by comma")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None, help="one case, in this process")
    for name, kind in (("--inner", Path), ("--start", int), ("--until", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if options.inner is not None:
        print(*run(kinds[0], range(options.start, options.cases), options.seed, options.until, options.inner))
        return 0
    if options.only is not None:
        with tempfile.TemporaryDirectory() as name:
            numbers = range(options.only, options.only + 1)
            return run(kinds[0], numbers, options.seed, 1e12, Path(name) / "at")[1]
    started, rows = time.time(), []
    for place, kind in enumerate(kinds):  # each its share of the time
        left = started + 60 * options.minutes - time.time()
        deadline = time.time() + left / (len(kinds) - place)
        rows.append((kind, *in_processes(kind, options.cases // len(kinds), options.seed, deadline)))
    print("| kind | cases | findings | crashes of a library |\n|---|---:|---:|---:|")
    for kind, count, findings, crashed in rows:
        print(f"| {kind} | {count:,} | {findings} | {len(crashed)} |")
    total = sum(row[1] for row in rows)
    print(f"{total:,} cases in {(time.time() - started) / 60:.1f} minutes, seed {options.seed}")
    return 1 if any(findings for _, _, findings, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
