"""Does it learn better? Plain CLIP against multi-aspect training with one thing more at a time, on real images.

    python -m benchmarks.learning [--quick] [--out runs/learning]

Six arms on five grouped folds from three seeds, then, on the full recipe and one seed, five changes of a setting; two
runs at a time, one thread each. Needs DERMVLP_DATA. `--quick`: one seed, two folds; the whole goes on from its results.
Killed at any moment, the same command goes on. Ends with a table and one JSON object. See docs/learning.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.learning_analysis import METRICS, Rows, common_cells, compare, read_results
from benchmarks.learning_data import prepare_folds
from benchmarks.learning_run import ARMS, EXPLORATORY, SCALES, Run, specification
from data_prep.errors import InputError
from data_prep.files import lock, remove_stale_partials

_REPOSITORY = Path(__file__).parents[1]
_NUM_SEEDS = 3
_NUM_QUICK_FOLDS = 2
_FULL = list(ARMS)[-1]


def plan(out_dir: Path, size: str) -> list[Run]:
    """The runs in their order: all arms of a fold before the next fold, so that what is finished is paired.

    `size`: "whole", "quick" (the beginning of the whole), or "tiny" (other, far smaller runs).
    """
    if size == "tiny":
        return [Run(out_dir, arm, 0, 0, "tiny") for arm in ARMS]
    folds = range(SCALES["whole"].num_folds)
    if size == "quick":
        return [Run(out_dir, arm, fold, 0) for fold in folds[:_NUM_QUICK_FOLDS] for arm in ARMS]
    runs = [Run(out_dir, arm, fold, seed) for seed in range(_NUM_SEEDS) for fold in folds for arm in ARMS]
    return runs + [Run(out_dir, arm, fold, 0) for fold in folds for arm in EXPLORATORY]


# ---------------------------------------------------------------------------------------------- running


def unfinished(runs: Sequence[Run]) -> list[Run]:
    """Those without a result. Raises InputError for a result of other settings or other data."""
    missing = []
    for run in runs:
        if not run.result_path.is_file():
            missing.append(run)
        elif json.loads(run.result_path.read_text(encoding="utf-8"))["specification"] != specification(run):
            raise InputError(f"{run.result_path}: of other settings or other data; choose another --out, or remove it")
    return missing


class _Processes:
    """Runs in processes of their own; the first that fails ends the experiment."""

    def __init__(self, num_runs: int) -> None:
        self._num_runs, self._num_done, self._started = num_runs, 0, time.monotonic()
        self._lock, self.failure = threading.Lock(), ""

    def execute(self, run: Run) -> None:
        if self.failure:
            return
        log_path = run.out_dir / "logs" / f"{run.name}.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.learning_run", str(run.out_dir.resolve()), run.arm]
        command += [str(run.fold), str(run.seed), "--scale", run.scale, "--end-with-parent"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log_path.open("wb") as log:
            # its stdin stays open as long as this process lives: the run notices when it is killed, and ends
            process = subprocess.Popen(
                command, cwd=_REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
            status = process.wait()
        with self._lock:
            self._num_done += 1
            if status != 0:
                tail = log_path.read_text(encoding="utf-8", errors="replace")[-2000:]
                self.failure = self.failure or f"{run.name} ended with status {status} ({log_path}):\n{tail}"
                return
            self._say(run)

    def _say(self, run: Run) -> None:
        result = json.loads(run.result_path.read_text(encoding="utf-8"))
        rows = Rows.of({(run.fold, run.seed): result}, [(run.fold, run.seed)])
        values = "  ".join(f"{name} {_value(rows, name):.3f}" for name in METRICS)
        left_s = (time.monotonic() - self._started) / self._num_done * (self._num_runs - self._num_done)
        print(
            f"{self._num_done}/{self._num_runs}  {run.name}: {values}  "
            f"({result['train_s']:.0f} s + {result['evaluate_s']:.0f} s; {left_s / 60:.0f} minutes left)",
            flush=True,
        )


def _value(rows: Rows, metric: str) -> float:
    statistic, columns = METRICS[metric]
    return statistic(*columns(rows))


def execute_all(runs: Sequence[Run], num_jobs: int) -> None:
    """Raises SystemExit with the end of the log where a run fails."""
    processes = _Processes(len(runs))
    with ThreadPoolExecutor(num_jobs) as pool:
        list(pool.map(processes.execute, runs))
    if processes.failure:
        raise SystemExit(processes.failure)


# ---------------------------------------------------------------------------------------------- command


def report(out_dir: Path) -> dict[str, Any]:
    """Prints the tables of what is finished under `out_dir`; returns their numbers."""
    results = read_results(out_dir / "results")
    arms = list(ARMS)
    references = {arm: list(dict.fromkeys((before, arms[0]))) for before, arm in pairwise(arms)}
    print("\nArms, each the one before it and one thing more")
    tables = {"main": compare(results, arms, references)}
    found = [arm for arm in EXPLORATORY if common_cells(results, [_FULL, arm])]
    if found:
        print(f"\nExploratory: changes to {_FULL}, one seed")
        tables["exploratory"] = compare(results, [_FULL, *found], {arm: [_FULL] for arm in found})
    chances = [run["mean_recall_chance"] for runs in results.values() for run in runs.values()]
    num_classes = {len(run["classnames"]) for runs in results.values() for run in runs.values()}
    if chances:
        tables["chance"] = {"zero_shot": round(1 / max(num_classes), 4), "mean_recall": round(max(chances), 4)}
        print(f"\nguessing: zero_shot {1 / max(num_classes):.3f}, mean_recall {max(chances):.4f}")
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.partition("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const="quick", dest="size", help="one seed, two folds")
    size.add_argument("--tiny", action="store_const", const="tiny", dest="size", help="a minute: does it run?")
    size.add_argument("--report", action="store_const", const="report", dest="size", help="only what is finished")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.set_defaults(size="whole")
    arguments = parser.parse_args()
    out_dir: Path = arguments.out
    started = time.monotonic()
    try:
        with lock(out_dir / ".lock", "the learning experiment"):
            if arguments.size != "report":
                runs = plan(out_dir, arguments.size)
                scale = SCALES[runs[0].scale]
                prepare_folds(out_dir, sorted({run.fold for run in runs}), scale.num_folds, scale.num_images)
                remove_stale_partials(out_dir / "results")
                missing = unfinished(runs)
                print(f"{len(runs)} runs, {len(runs) - len(missing)} finished before", flush=True)
                execute_all(missing, arguments.jobs)
            tables = report(out_dir)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(tables | {"size": arguments.size, "seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
