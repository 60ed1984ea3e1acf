"""One model on one data set: the tasks it has something for, their numbers and their page. `dermvlp evaluate`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from data_prep.errors import InputError
from data_prep.files import disk_errors, lock, write_atomically
from pretrain.evaluation.config import EvaluationConfig
from pretrain.evaluation.datasets import EvalSet
from pretrain.evaluation.features import features
from pretrain.evaluation.interfaces import Encoder, TaskInput
from pretrain.evaluation.leakage import overlap
from pretrain.evaluation.report_evaluation import write_evaluation_report
from pretrain.evaluation.report_extras import report_extras
from pretrain.evaluation.results import (
    RESULT_NAME,
    DatasetInfo,
    EvaluationResult,
    Metric,
    TaskResult,
    read_result,
    write_result,
)
from pretrain.evaluation.statistics import Floats
from pretrain.evaluation.tasks import concepts, hierarchy, multiple_choice, probe, retrieval, zero_shot

_MODULES: dict[str, ModuleType] = {
    "zero_shot": zero_shot,
    "retrieval": retrieval,
    "probe": probe,
    "concepts": concepts,
    "multiple_choice": multiple_choice,
    "hierarchy": hierarchy,
}
_PACKAGES = ("dermvlp", "torch", "open_clip_torch", "timm", "transformers", "scikit-learn", "numpy")


def evaluate(
    encoder: Encoder,
    data: EvalSet,
    out_dir: Path,
    config: EvaluationConfig | None = None,
    training_dirs: Sequence[Path] = (),
    num_pictures: int = 8,
) -> EvaluationResult:
    """Every task of `config` that `data` has something for, into `out_dir` (see results.py); says what it does.

    Features are kept in `out_dir`, so that an evaluation that was interrupted goes on, and one that is repeated with
    other tasks encodes nothing again.

    Args:
        training_dirs: splits of shards that the model was trained on; images that they hold too are counted, and the
            numbers given without them as well.
        num_pictures: examples on the page for each of its galleries; 0: none.

    Raises InputError where there is nothing for any task, another process evaluates into `out_dir`, or for bad data.
    """
    config = config or EvaluationConfig()
    started = time.monotonic()
    with lock(out_dir / ".lock", "another evaluation"), disk_errors(out_dir):
        earlier = _earlier_tasks(encoder, data, out_dir, config)
        lines = [json.dumps(dict(row), ensure_ascii=False) for row in data.rejected]
        write_atomically(out_dir / "rejected.jsonl", "".join(f"{line}\n" for line in lines).encode())
        left_out = _left_out(data, config)
        overlap_N, leakage = None, None
        if training_dirs:
            cache_dir, num_workers = out_dir / "features", config.settings.num_workers
            overlap_N, leakage = overlap(data, training_dirs, cache_dir, num_workers=num_workers)
        given = TaskInput(
            encoder=encoder,
            data=data,
            features=partial(_features, encoder, data, out_dir / "features", config),
            overlap_N=overlap_N,
            settings=config.settings,
            out_dir=out_dir,
        )
        tasks = []
        for task in config.tasks:
            if task.kind not in left_out:
                print(f"{task.kind} ...", flush=True)
                try:
                    tasks.append(_MODULES[task.kind].run(task, given))
                except InputError as error:  # the others' numbers stay
                    left_out[task.kind] = str(error)
        if not tasks:
            raise InputError("; ".join(f"{kind}: {reason}" for kind, reason in left_out.items()))
        result = EvaluationResult(
            model=encoder.info,
            dataset=_dataset_info(data),
            tasks=tuple(sorted([*tasks, *earlier], key=lambda task: list(_MODULES).index(task.task))),
            left_out=left_out,
            leakage=leakage,
            confidence=config.settings.confidence,
            seconds=round(time.monotonic() - started, 1),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={name: version(name) for name in _PACKAGES},
        )
        write_result(out_dir, result)
        write_evaluation_report(out_dir, report_extras(given, num_pictures) if num_pictures else None)
    return result


def _earlier_tasks(encoder: Encoder, data: EvalSet, out_dir: Path, config: EvaluationConfig) -> list[TaskResult]:
    """What an evaluation of the same model on the same data left here, of the tasks that are not done now."""
    if not (out_dir / RESULT_NAME).is_file():
        return []
    found = read_result(out_dir)
    if found.dataset.digest != data.digest:
        raise InputError(
            f"{out_dir}: holds numbers of {found.model.name} on another data set ({found.dataset.name}, "
            f"{found.dataset.digest}; now {data.name}, {data.digest}); choose another --out, or remove it"
        )
    if found.model.digest != encoder.info.digest or found.confidence != config.settings.confidence:
        print(f"{out_dir}: replaces the numbers of {found.model.name} ({found.model.digest}) that were here")
        return []
    now = {task.kind for task in config.tasks}
    return [task for task in found.tasks if task.task not in now]


def _left_out(data: EvalSet, config: EvaluationConfig) -> dict[str, str]:
    """By task, why the data set has nothing for it."""
    reasons = {
        task.kind: hierarchy.lacks(data, task) if task.kind == "hierarchy" else _MODULES[task.kind].lacks(data)
        for task in config.tasks
    }
    if all(reason is not None for reason in reasons.values()):
        raise InputError(f"{data.name}: nothing to evaluate: " + "; ".join(f"{k}: {r}" for k, r in reasons.items()))
    return {kind: reason for kind, reason in reasons.items() if reason is not None}


def _features(encoder: Encoder, data: EvalSet, folder: Path, config: EvaluationConfig, layer: str) -> Floats:
    return features(encoder, data, layer, folder, config.settings)


def _dataset_info(data: EvalSet) -> DatasetInfo:
    licences: dict[str, int] = {}
    for row in data.rows:
        licence = row.licence or "unknown"
        licences[licence] = licences.get(licence, 0) + 1
    return DatasetInfo(
        name=data.name,
        num_images=len(data.rows),
        num_rejected=len(data.rejected),
        licences=dict(sorted(licences.items())),
        digest=data.digest,
        notes=data.notes,
    )


def print_result(result: EvaluationResult) -> None:
    """A table a task: each metric with its interval and what guessing gives, and without the overlap where there is."""
    model, dataset = result.model, result.dataset
    print(f"\n{model.name} ({model.digest}) on {dataset.name}: {dataset.num_images} images", end="")
    print(f", {dataset.num_rejected} rejected (rejected.jsonl)" if dataset.num_rejected else "")
    for note in dataset.notes:
        print(f"  note: {note}")
    if result.leakage is not None:
        leak = result.leakage
        print(f"  also in the training data {leak.training_data}: {leak.num_same_pixels} with equal pixels, ", end="")
        print(f"{leak.num_near} near copies" + (f"; {leak.num_without_hash} unknown" * bool(leak.num_without_hash)))
    else:
        print("  not compared with the training data (--training-data SPLIT): images may have been trained on")
    for task in result.tasks:
        heading = f"{task.task} (ranked by {task.primary})"
        print(f"\n{heading:44}{'value':>10} {f'{result.confidence:.0%} interval':18}{'n':>7}  chance", end="")
        print("   without overlap" if task.without_overlap else "")
        for name, metric in task.metrics.items():
            chance = "" if metric.chance is None else f"{metric.chance:8.3f}"
            without = ""
            if (rest := task.without_overlap.get(name)) is not None:
                without = f"{_cell(rest)} n {rest.n}"
            print(f"  {name:42}{_cell(metric)}{metric.n:>7}{chance:8}  {without}".rstrip())
        for note in task.notes:
            print(f"  note: {note}")
    for task_name, reason in result.left_out.items():
        print(f"\n{task_name}: left out: {reason}")


def _cell(metric: Metric) -> str:
    if metric.value is None:
        return f"{'undefined':>10} {'':18}"
    interval = "" if metric.low is None or metric.high is None else f"[{metric.low:.3f}, {metric.high:.3f}]"
    return f"{metric.value:10.3f} {interval:18}"
