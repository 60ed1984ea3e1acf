"""What a run knows of itself, gathered for its card: data, recipe, hardware, hours. Nothing of the machine's paths."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.schema import ShardManifest
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset, read_manifest
from pretrain.publish.private import without_paths
from pretrain.publish.training_sources import samples_by_source_and_licence
from pretrain.train.metrics import read_metrics
from pretrain.train.retention import list_checkpoints, read_meta


@dataclass(frozen=True)
class Validation:
    """How the run was validated, which makes results on that split no independent test."""

    every: int  # steps
    best_by: str  # as in checkpoint.best_by
    keeps_best: bool  # and has one
    is_best: bool  # the published checkpoint is the one that validation chose
    split: str | None  # DATASET-SPLIT, as an evaluation of it is named; None: it is not there any more


@dataclass(frozen=True)
class RunFacts:
    config: TrainConfig  # its paths cut to their last part
    manifest: ShardManifest  # of the training split
    step: int
    samples_seen: int
    num_ranks: int
    hardware: str | None  # of rank 0; None: a checkpoint of before it was noted
    hours: float | None  # of training steps; None: no training log
    year: int  # of the checkpoint
    starts: tuple[str, ...]  # published weights and teachers that the run began with
    #: of the training split; None: the manifest does not say it, and its shards could not be read
    samples_by_source_and_licence: dict[tuple[str, str], int] | None = None
    validation: Validation | None = None


def read_run(checkpoint: Path, data_dir: Path | None = None) -> RunFacts:
    """The facts of a checkpoint and of the data that it was trained on.

    Args:
        data_dir: where the training split lies now; by default where the run read it.

    Raises InputError where that split is not to be found, or is another one than the run was trained on.
    """
    meta = read_meta(checkpoint)
    config = TrainConfig.model_validate(meta["config"])
    towers = json.loads((checkpoint / "model.json").read_text(encoding="utf-8"))
    records = read_metrics(checkpoint.parent.parent / "metrics.jsonl")
    train_dir = data_dir or config.data.train_dir
    manifest = _training_manifest(train_dir, meta["data_digest"])
    return RunFacts(
        config=TrainConfig.model_validate(without_paths(config.model_dump(mode="json"))),
        manifest=manifest,
        step=int(meta["step"]),
        samples_seen=int(meta.get("samples_seen", meta["step"] * config.global_batch_size)),
        num_ranks=int(meta["num_ranks"]),
        hardware=meta.get("hardware"),
        hours=training_hours([r for r in records if r["step"] <= meta["step"]], config.global_batch_size),
        year=datetime.datetime.fromtimestamp((checkpoint / "meta.json").stat().st_mtime, datetime.UTC).year,
        starts=_starts(without_paths(meta["config"]), towers["model_cfg"]["text_cfg"]),
        samples_by_source_and_licence=samples_by_source_and_licence(train_dir, manifest),
        validation=_validation(config, checkpoint),
    )


def _training_manifest(train_dir: Path, data_digest: str) -> ShardManifest:
    try:
        data = ShardedDataset(train_dir, with_tars=False)
    except InputError as error:
        raise InputError(
            f"training data: {error}; its licences decide the weights' licence: say where the split lies now with "
            "--data FOLDER (manifest.json and index.npy are enough)"
        ) from None
    if data.digest != data_digest:
        raise InputError(
            f"{train_dir}: holds other samples than the run was trained on; give the right split with --data FOLDER"
        )
    return data.manifest


def _validation(config: TrainConfig, checkpoint: Path) -> Validation | None:
    if config.validation is None:
        return None
    try:
        manifest = read_manifest(config.validation.val_dir)
    except (InputError, OSError):
        split = None
    else:
        split = f"{manifest.dataset}-{manifest.split}"
    best_step = _best_step(checkpoint)
    return Validation(
        every=config.validation.every,
        best_by=config.checkpoint.best_by,
        keeps_best=config.checkpoint.keep_best and best_step is not None,
        is_best=best_step == read_meta(checkpoint)["step"],
        split=split,
    )


def _best_step(checkpoint: Path) -> int | None:
    """By the run's newest checkpoint that is whole, for an earlier one does not know of a better later; None before
    the first validation."""
    for path in (*reversed(list_checkpoints(checkpoint.parent.parent)), checkpoint):
        try:
            step: int | None = read_meta(path)["record"].get("best_step")
        except InputError:
            continue
        return step
    return None


def training_hours(records: Sequence[Mapping[str, Any]], global_batch_size: int) -> float | None:
    """Hours of training steps by the training log: without validation, saving and the time between two attempts.

    `records` are those of metrics.jsonl; each tells the speed since the logged step before it.
    """
    seconds, previous = 0.0, 0
    for record in records:
        if record.get("samples_per_s", 0) > 0:
            seconds += (record["step"] - previous) * global_batch_size / record["samples_per_s"]
            previous = record["step"]
    return seconds / 3600 if previous else None


def _starts(config: Mapping[str, Any], text_cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the weights came from that training began with, for a reader."""
    model = config["model"]
    if model["tiny"]:
        return ()
    found = [f"{model['name']}, weights {model['pretrained']}"] if model["pretrained"] else []
    for tower in ("image", "text"):
        if model[tower]["weights"]:
            found.append(f"{tower} tower: {model[tower]['weights']['source']}")
    if text_cfg.get("hf_model_name") and not model["pretrained"] and not model["text"]["weights"]:
        found.append(f"text tower: {without_paths(text_cfg['hf_model_name'])}")
    for objective in config["objectives"]:
        teacher = objective.get("teacher") or {}
        if teacher.get("kind") == "frozen":
            weights = (teacher.get("weights") or {}).get("source") or teacher.get("pretrained")
            found.append(f"teacher: {teacher['name']}" + (f", weights {weights}" if weights else ""))
    return tuple(found)
