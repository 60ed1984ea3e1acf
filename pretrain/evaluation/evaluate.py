"""One model on one data set: the tasks it has something for, their numbers and their page. `dermvlp evaluate`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.files import disk_errors, lock
from pretrain.evaluation.config import EvaluationConfig, ProbeTask, TaskConfig
from pretrain.evaluation.datasets import EvalSet
from pretrain.evaluation.datasets.data import write_rejected
from pretrain.evaluation.encoding.features import image_features
from pretrain.evaluation.interfaces import JOINT, Encoder, EvalData, TaskInput
from pretrain.evaluation.leakage import overlap
from pretrain.evaluation.reports.evaluation import write_evaluation_report
from pretrain.evaluation.reports.extras import report_extras
from pretrain.evaluation.results import (
    RESULT_NAME,
    TABLES,
    TRAINED_ON_NAME,
    DatasetInfo,
    EvaluationResult,
    Leakage,
    Metric,
    TaskResult,
    read_result,
    write_result,
)
from pretrain.evaluation.tables import write_table
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
    other tasks encodes nothing again. An image that cannot be decoded is left out of every task, and listed in
    rejected.jsonl. A task that ends in an error is named in `failed` of the result, and the others' numbers stay.

    Args:
        training_dirs: splits of shards that the model was trained on; images that they hold too are counted, and the
            numbers given without them as well.
        num_pictures: examples on the page for each of its galleries; 0: none.

    Raises InputError where there is nothing for any task, none succeeds, or another process evaluates into `out_dir`.
    """
    config = config or EvaluationConfig()
    started = time.monotonic()
    with lock(out_dir / ".lock", "another evaluation"), disk_errors(out_dir):
        before = _result_before(encoder, data, out_dir, config)
        given, leakage = _task_input(encoder, data, out_dir, config, training_dirs, with_pictures=num_pictures > 0)
        left_out = _left_out(given.data, config)
        tasks, failed = _run([task for task in config.tasks if task.kind not in left_out], given)
        if not tasks:
            raise InputError("; ".join(f"{kind}: {reason}" for kind, reason in (left_out | failed).items()))
        before = _still_true(before, config, leakage)
        earlier = before.tasks if before else ()
        result = EvaluationResult(
            model=encoder.info,
            dataset=_dataset_info(given.data),
            tasks=tuple(sorted([*tasks, *earlier], key=lambda task: list(_MODULES).index(task.task))),
            left_out=(before.left_out if before else {}) | left_out,
            failed=(before.failed if before else {}) | failed,
            leakage=leakage,
            confidence=config.settings.confidence,
            seconds=round(time.monotonic() - started, 1),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=_versions(),
        )
        _write_trained_on(out_dir / TRAINED_ON_NAME, given.data, given.overlap_N)
        write_result(out_dir, result)
        write_evaluation_report(out_dir, report_extras(given, num_pictures) if num_pictures else None)
    return result


def _task_input(
    encoder: Encoder,
    data: EvalSet,
    out_dir: Path,
    config: EvaluationConfig,
    training_dirs: Sequence[Path],
    with_pictures: bool,
) -> tuple[TaskInput, Leakage | None]:
    """Features of the images that can be decoded, and which of these the training data holds; rejected.jsonl."""
    write_rejected(out_dir / "rejected.jsonl", data.rejected)
    cache_dir = out_dir / "features"
    layers = _layers(config, _left_out(data, config), with_pictures)
    encoded = image_features(encoder, data, layers, cache_dir, config.settings)
    overlap_N, leakage = None, None
    if training_dirs:
        num_workers = config.settings.num_workers
        overlap_N, leakage = overlap(data, training_dirs, cache_dir, num_workers=num_workers, left_out=encoded.rejected)
    data = data.without(encoded.rejected)
    write_rejected(out_dir / "rejected.jsonl", data.rejected)
    given = TaskInput(
        encoder=encoder,
        data=data,
        features=encoded.by_layer.__getitem__,
        overlap_N=overlap_N,
        settings=config.settings,
        out_dir=out_dir,
    )
    return given, leakage


def _run(tasks: Sequence[TaskConfig], given: TaskInput) -> tuple[list[TaskResult], dict[str, str]]:
    """The results, and by task the error that it ended in."""
    results: list[TaskResult] = []
    failed: dict[str, str] = {}
    for task in tasks:
        print(f"{task.kind} ...", flush=True)
        try:
            results.append(_MODULES[task.kind].run(task, given))
        except InputError as error:
            failed[task.kind] = str(error)
    return results, failed


def _result_before(encoder: Encoder, data: EvalSet, out_dir: Path, config: EvaluationConfig) -> EvaluationResult | None:
    """What an evaluation of the same model on the same data left here. Another model's numbers and tables are removed:
    a folder is one model's on one data set."""
    if not (out_dir / RESULT_NAME).is_file():
        return None
    try:
        found = read_result(out_dir)
    except InputError as error:  # of another version of dermvlp, or damaged
        print(f"{error}: replaced now")
        found = None
    if found is not None and found.dataset.digest != data.digest:
        raise InputError(
            f"{out_dir}: holds numbers of {found.model.name} on another data set ({found.dataset.name}, "
            f"{found.dataset.digest}; now {data.name}, {data.digest}); choose another --out, or remove it"
        )
    same = found is not None and found.model.digest == encoder.info.digest
    if found is not None and same and found.confidence == config.settings.confidence and found.versions == _versions():
        return found
    if found is not None:
        print(f"{out_dir}: replaces the numbers of {found.model.name} ({found.model.digest}) that were here")
    for name in (RESULT_NAME, TRAINED_ON_NAME, *TABLES.values()):
        (out_dir / name).unlink(missing_ok=True)
    return None


def _write_trained_on(path: Path, data: EvalData, overlap_N: NDArray[np.bool_] | None) -> None:
    """The rows that `Leakage` counts, also where there are none; no file where nothing was compared: a comparison of
    models must not take an earlier one's rows for this one's."""
    if overlap_N is None:
        path.unlink(missing_ok=True)
        return
    rows = (data.rows[position] for position in np.flatnonzero(overlap_N).tolist())
    write_table(path, ("key",), ([row.key] for row in rows if not row.is_train))


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def _still_true(
    before: EvaluationResult | None, config: EvaluationConfig, leakage: Leakage | None
) -> EvaluationResult | None:
    """What is not done again now. Numbers without the overlap hold for one comparison with training data."""
    if before is None:
        return None
    now = {task.kind for task in config.tasks}
    kept = tuple(task for task in before.tasks if task.task not in now)
    if kept and before.leakage != leakage:
        names = ", ".join(task.task for task in kept)
        print(f"{names}: compared with other training data before, or with none; left out, evaluate them again")
        return None
    left_out, failed = ({k: v for k, v in of.items() if k not in now} for of in (before.left_out, before.failed))
    return before.model_copy(update={"tasks": kept, "left_out": left_out, "failed": failed})


def _layers(config: EvaluationConfig, left_out: Mapping[str, str], with_pictures: bool) -> tuple[str, ...]:
    """What the tasks, and the pictures of the page, read: all of it comes from one pass over the images."""
    tasks = [task for task in config.tasks if task.kind not in left_out]
    of_tasks = [task.layer if isinstance(task, ProbeTask) else JOINT for task in tasks]
    return tuple(dict.fromkeys([JOINT, *of_tasks] if with_pictures else of_tasks))


def _left_out(data: EvalData, config: EvaluationConfig) -> dict[str, str]:
    """By task, why the data set has nothing for it."""
    reasons = {
        task.kind: hierarchy.lacks(data, task) if task.kind == "hierarchy" else _MODULES[task.kind].lacks(data)
        for task in config.tasks
    }
    if all(reason is not None for reason in reasons.values()):
        raise InputError(f"{data.name}: nothing to evaluate: " + "; ".join(f"{k}: {r}" for k, r in reasons.items()))
    return {kind: reason for kind, reason in reasons.items() if reason is not None}


def _dataset_info(data: EvalData) -> DatasetInfo:
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
        split=data.split,
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
    for task_name, reason in result.failed.items():
        print(f"\n{task_name}: FAILED: {reason}")


def _cell(metric: Metric) -> str:
    if metric.value is None:
        return f"{'undefined':>10} {'':18}"
    interval = "" if metric.low is None or metric.high is None else f"[{metric.low:.3f}, {metric.high:.3f}]"
    return f"{metric.value:10.3f} {interval:18}"
