"""`dermvlp demo`: the whole way once, from raw pairs to an evaluated, exported checkpoint and a report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from data_prep.config import PrepareConfig
from data_prep.config_file import load_config
from data_prep.errors import InputError
from data_prep.prepare import prepare
from data_prep.schema import ShardManifest
from data_prep.summary import print_summary
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset, diagnoses
from pretrain.evaluation.config import EvaluationConfig, EvaluationSettings, RetrievalTask, ZeroShotTask
from pretrain.evaluation.datasets import open_data
from pretrain.evaluation.encoding.encoders import load_encoder, untrained_encoder
from pretrain.evaluation.evaluate import evaluate, print_result
from pretrain.evaluation.interfaces import Encoder
from pretrain.evaluation.reports.gallery import gallery
from pretrain.evaluation.reports.run import MetricRow, ReportData, write_report
from pretrain.evaluation.results import EvaluationResult
from pretrain.publish.export import check_export, export
from pretrain.train.curves import loss_curves
from pretrain.train.launch import launch

_RECIPES = Path(__file__).parents[1] / "configs" / "pretrain"
_MAX_EXPORT_DIFFERENCE = 1e-4
#: in this process: to start readers would take longer than to decode
_TASKS = EvaluationConfig(tasks=(ZeroShotTask(), RetrievalTask()), settings=EvaluationSettings(num_workers=0))
_LIMITS = (
    "A demonstration: small towers, few steps, one seed. The numbers show that the whole way works, "
    "not what the method can do.",
    "Not a medical device, and not fit for any decision about a person.",
    "Intervals are percentile bootstraps over lesions or patients; they do not cover another training run.",
)


class _Stages:
    """Says what runs and how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started
        print(f"== {name}: {self.seconds[name]:.1f} s", flush=True)


def demo(source: str, recipe: str | None, out_dir: Path) -> int:
    """Prints stages, a table before / after and, as the last line, one JSON object. Returns the exit status."""
    started = time.monotonic()
    torch.set_num_threads(os.cpu_count() or 1)
    data_config = load_config(source, [], PrepareConfig)
    is_synthetic = data_config.source.kind == "synthetic"
    recipe = recipe or str(_RECIPES / ("demo_synthetic.yaml" if is_synthetic else "demo_real.yaml"))
    run_dir = out_dir / data_config.name
    train_dir, val_dir = data_config.out_dir / "train", data_config.out_dir / "val"
    overrides = [f"run_dir={run_dir}", f"data.train_dir={train_dir}"]
    config = load_config(recipe, overrides, TrainConfig)
    if torch.cuda.is_available():  # the recipes are for two CPU cores
        overrides.append(f"launch.num_ranks={min(config.launch.num_ranks, torch.cuda.device_count())}")
    print(f"{data_config.name}{' (synthetic images and captions, not medical data)' if is_synthetic else ''}, {recipe}")

    stage = _Stages()
    with stage("prepare"):
        manifests = prepare(data_config)
        print_summary(data_config.out_dir, manifests, time.monotonic() - started)
    if "val" not in manifests:
        raise InputError(f"{source}: no sample is in the split `val`, so nothing can be evaluated; set val_fraction")
    val_data = ShardedDataset(val_dir)
    classnames = diagnoses(ShardedDataset(train_dir), val_data)
    evaluation_data = open_data(val_dir, [f"classnames={json.dumps(classnames)}"])
    with stage("evaluate before training"):
        before = evaluate(untrained_encoder(config), evaluation_data, run_dir / "before", _TASKS, num_pictures=0)
    with stage("train"):
        if status := launch(recipe, overrides):
            return status
    with stage("evaluate after training"):
        encoder = load_encoder(run_dir)
        out_dir = run_dir / "evaluations" / evaluation_data.name
        after = evaluate(encoder, evaluation_data, out_dir, _TASKS, [train_dir])
        print_result(after)
    with stage("export"):
        folder = export(run_dir, run_dir / "export")
        difference = check_export(folder, encoder, val_data)
        print(f"{folder}: open_clip loads it; largest difference of a feature {difference:.1e}")
        if difference > _MAX_EXPORT_DIFFERENCE:
            raise RuntimeError(f"{folder}: open_clip gives other features than training did")
    with stage("report"):
        report_path = run_dir / "report.html"
        data = _report(
            config, manifests, before, after, stage.seconds, loss_curves(run_dir), encoder, val_data, is_synthetic
        )
        write_report(report_path, data)
    print(json.dumps(_result(before, after, time.monotonic() - started, report_path)))
    return 0


def _result(
    before: EvaluationResult, after: EvaluationResult, seconds: float, report: Path
) -> dict[str, str | int | float | None]:
    values = {
        f"{name}_{when}": result.tasks[number].metrics[metric].value
        for number, (name, metric) in enumerate((("zero_shot", "balanced_accuracy"), ("retrieval", "mean_recall")))
        for when, result in (("before", before), ("after", after))
    }
    classified = after.tasks[0]
    return {
        **{name: None if value is None else round(value, 4) for name, value in values.items()},
        "num_classes": len(classified.per_class),
        "num_test": classified.metrics["balanced_accuracy"].n,
        "seconds": round(seconds, 1),
        "report": str(report),
    }


def _report(
    config: TrainConfig,
    manifests: dict[str, ShardManifest],
    before: EvaluationResult,
    after: EvaluationResult,
    stages_s: dict[str, float],
    losses: dict[str, list[tuple[int, float]]],
    encoder: Encoder,
    val_data: ShardedDataset,
    is_synthetic: bool,
) -> ReportData:
    train = manifests["train"]
    facts = {
        "data": f"{train.dataset}: {train.num_samples} training, {manifests['val'].num_samples} validation samples",
        "licences": ", ".join(f"{name} {count}" for name, count in train.samples_by_licence.items()),
        "rejected rows": str(train.num_rejected),
        "sub-captions by": train.decomposer,
        "towers": f"{config.model.name}, {encoder.info.num_parameters / 1e6:.1f} M parameters",
        "objectives": ", ".join(f"{objective.label} x {objective.weight:g}" for objective in config.objectives),
        "steps": f"{config.steps} of {config.global_batch_size} images",
        "engine": f"{config.engine.kind}, ZeRO {config.engine.zero_stage}, {config.engine.precision}, "
        f"{config.launch.num_ranks} rank(s), {'GPU' if torch.cuda.is_available() else 'CPU'}",
    }
    rows = [
        MetricRow(name, metric, earlier.metrics.get(name), metric.chance, metric.is_share)
        for task, earlier in zip(after.tasks, before.tasks, strict=True)
        for name, metric in task.metrics.items()
    ]
    classified = after.tasks[0]
    assert classified.confusion is not None
    classnames = classified.confusion.classnames
    return ReportData(
        title=f"dermvlp demo: {train.dataset}",
        subtitle="Synthetic images and captions, drawn by a program: not medical data." if is_synthetic else "",
        facts=facts,
        stages_s=stages_s,
        metrics=tuple(rows),
        losses=losses,
        per_class_recall=classified.per_class,
        confusion=np.array(classified.confusion.counts),
        classnames=classnames,
        gallery=gallery(encoder, val_data, classnames, config),
        limits=_LIMITS,
    )
