"""One run of the learning experiment: an arm trained on a fold from a seed, evaluated on the fold's held-out images.

    python -m benchmarks.learning_run OUT ARM FOLD SEED [--scale tiny]

Writes OUT/results/ARM-fold-K-seed-S.json when all is done, and goes on from its own checkpoint when it was killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.learning_data import WORDINGS
from data_prep.files import lock, write_atomically
from pretrain.config import (
    AugmentationConfig,
    BlockMask,
    CheckpointConfig,
    ClipObjective,
    DataConfig,
    DiagnosisWeights,
    EmaTeacher,
    EngineConfig,
    LaunchConfig,
    LocalAlignmentObjective,
    MaskedLatentObjective,
    ModelConfig,
    MultiAspectObjective,
    ObjectiveConfig,
    OntologyTargets,
    OptimizerConfig,
    TrainConfig,
)
from pretrain.data.manifest import ShardedDataset, diagnoses
from pretrain.evaluation.encoding.encoders import load_encoder
from pretrain.evaluation.encoding.features import shard_features
from pretrain.evaluation.interfaces import Encoder
from pretrain.evaluation.methods import retrieval, zero_shot
from pretrain.prompts import TEMPLATES_PATH, load_templates
from pretrain.train.loop import train
from pretrain.train.metrics import read_metrics

RECALL_AT = (1, 5, 10)

#: A ViT of 0.5 M parameters at 128 px and a causal text tower of two layers, both from random weights.
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 128, "patch_size": 16, "width": 96, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
}


@dataclass(frozen=True)
class Scale:
    """How much of everything. `tiny` shows that the experiment runs, and resolves nothing."""

    num_images: int | None  # None: all
    num_folds: int
    num_steps: int
    batch_size: int
    warmup_steps: int
    checkpoint_every: int


SCALES = {
    "whole": Scale(num_images=None, num_folds=5, num_steps=400, batch_size=64, warmup_steps=30, checkpoint_every=100),
    "tiny": Scale(num_images=180, num_folds=2, num_steps=6, batch_size=16, warmup_steps=2, checkpoint_every=2),
}

# ---------------------------------------------------------------------------------------------- arms


def _local(temperature: float = 1.0, sigma: float = 0.0) -> LocalAlignmentObjective:
    # from random towers cosines are near 0: the published 0.3 would select nothing
    return LocalAlignmentObjective(sigma=sigma, diagnosis_weights=DiagnosisWeights(temperature=temperature))


_MASKED = MaskedLatentObjective(
    weight=0.5,
    teacher=EmaTeacher(momentum_start=0.99),  # as in demo_synthetic: the published 0.996 is for far longer runs
    mask=BlockMask(ratio=0.5),
    predictor_depth=1,
    predictor_width=96,
    predictor_heads=3,
)


def _full(temperature: float = 1.0, sigma: float = 0.0, own_captions_as_negatives: bool = False) -> tuple[Any, ...]:
    contrastive = MultiAspectObjective(
        diagnosis_weights=DiagnosisWeights(temperature=temperature),
        ontology=OntologyTargets(),
        own_captions_as_negatives=own_captions_as_negatives,
    )
    return (contrastive, _local(temperature, sigma), _MASKED)


#: Each arm is the one before it and one thing more (the second takes the place of the first).
ARMS: dict[str, tuple[ObjectiveConfig, ...]] = {
    "clip": (ClipObjective(),),
    "multi_aspect": (MultiAspectObjective(diagnosis_weights=None),),
    "weights": (MultiAspectObjective(),),
    "local_alignment": (MultiAspectObjective(), _local()),
    "masked_latent": (MultiAspectObjective(), _local(), _MASKED),
    "ontology": _full(),
}
#: Changes to the last arm, one seed: too few runs to decide anything, enough to say where to look.
EXPLORATORY: dict[str, tuple[ObjectiveConfig, ...]] = {
    "own_captions_as_negatives": _full(own_captions_as_negatives=True),
    "temperature_0.5": _full(temperature=0.5),
    "temperature_0.25": _full(temperature=0.25),
    "sigma_0.1": _full(sigma=0.1),
    "sigma_0.2": _full(sigma=0.2),
}


@dataclass(frozen=True)
class Run:
    out_dir: Path
    arm: str
    fold: int
    seed: int
    scale: str = "whole"

    @property
    def name(self) -> str:
        return f"{self.arm}-fold-{self.fold}-seed-{self.seed}"

    @property
    def result_path(self) -> Path:
        return self.out_dir / "results" / f"{self.name}.json"

    @property
    def data_dir(self) -> Path:
        return self.out_dir / "data" / f"fold-{self.fold}"


def train_config(run: Run) -> TrainConfig:
    """Equal for all arms but for the objectives: the same images in the same order, the same first weights."""
    scale = SCALES[run.scale]
    run_dir = run.out_dir / "runs" / run.name
    return TrainConfig(
        run_dir=run_dir,
        seed=run.seed,
        data=DataConfig(
            train_dir=run.data_dir / "train",
            num_workers=0,  # a run has one core
            augmentation=AugmentationConfig(crop_scale_min=0.6, color_jitter=0.0),
        ),
        model=ModelConfig(name=str(run_dir / "model.json")),
        objectives=(ARMS | EXPLORATORY)[run.arm],
        global_batch_size=scale.batch_size,
        num_steps=scale.num_steps,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=scale.warmup_steps),
        engine=EngineConfig(kind="torch"),
        launch=LaunchConfig(threads_per_rank=1),
        log_every=50,
        trackers=(),
        checkpoint=CheckpointConfig(every=scale.checkpoint_every, keep_last=1),
    )


def specification(run: Run) -> str:
    """Names everything that the result depends on but the code: results of two specifications cannot be compared."""
    # what is left at its default is not named: a new key of TrainConfig must not make results of the same run differ
    left_out = {"run_dir": True, "model": {"name"}, "data": {"train_dir"}, "checkpoint": True, "trackers": True}
    config = train_config(run).model_dump(mode="json", exclude=left_out, exclude_defaults=True)
    data = ShardedDataset(run.data_dir / "train").digest, ShardedDataset(run.data_dir / "val").digest
    return hashlib.sha256(json.dumps([config, MODEL, data], sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- one run


def execute(run: Run) -> None:
    """Trains, evaluates, writes the result, removes the checkpoints."""
    config = train_config(run)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with lock(run.out_dir / "locks" / run.name, run.name, wait_s=60):
        started = time.perf_counter()
        write_atomically(config.run_dir / "model.json", json.dumps({"model_cfg": MODEL}).encode())
        train(config)
        train_s = time.perf_counter() - started
        train_data, held_out = ShardedDataset(run.data_dir / "train"), ShardedDataset(run.data_dir / "val")
        classnames = diagnoses(train_data, held_out)
        result = {
            **{"arm": run.arm, "fold": run.fold, "seed": run.seed, "specification": specification(run)},
            "train_s": round(train_s, 1),  # of the last process, where one was killed
            "last_logged": read_metrics(config.run_dir / "metrics.jsonl")[-1],
            "classnames": classnames,
            **evaluate(load_encoder(config.run_dir), held_out, classnames),
        }
        result["cpu_s"] = round(time.process_time(), 1)  # what the run costs on an idle core
        result["evaluate_s"] = round(time.perf_counter() - started - train_s, 1)
        run.result_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(run.result_path, json.dumps(result).encode())
        shutil.rmtree(config.run_dir)


def evaluate(encoder: Encoder, data: ShardedDataset, classnames: tuple[str, ...]) -> dict[str, Any]:
    """What each held-out image gives, in the order of the shards' index.

    `predicted`: class by the dermatology templates, whose words a text tower from scratch has hardly read;
    `predicted_own_wording`: by the sentences in which the captions name the diagnosis.
    `image_hit`: the share of k in RECALL_AT at which the image finds its whole caption among the distinct ones;
    `text_hit`: the same of the caption, which finds one of its images among all; `num_owners`: images of that caption.
    """
    samples = [data.read_sample(position) for position in range(len(data))]
    image_ND = shard_features(encoder, data)
    templates = load_templates(TEMPLATES_PATH)
    wordings = [wording.rstrip(".") for wording in WORDINGS["label"]]
    predicted = {
        name: zero_shot.probabilities(
            image_ND, zero_shot.build_classifier(encoder.encode_texts, classnames, prompts), encoder.logit_scale
        ).argmax(1)
        for name, prompts in (("predicted", templates), ("predicted_own_wording", wordings))
    }
    texts = sorted({sample.caption for sample in samples})
    position = {text: i for i, text in enumerate(texts)}
    owner_text = np.array([position[sample.caption] for sample in samples])
    image_rank, text_rank = retrieval.retrieval_ranks(image_ND, encoder.encode_texts(texts), owner_text)
    return {
        "group": [sample.group for sample in samples],
        "label": [classnames.index(str(sample.diagnosis)) for sample in samples],
        **{name: classes.tolist() for name, classes in predicted.items()},
        "image_hit": _hits(image_rank).tolist(),
        "text_hit": _hits(text_rank)[owner_text].tolist(),
        "mean_recall_chance": retrieval.chance_levels(owner_text, len(texts), RECALL_AT)["mean_recall"],
        "num_owners": np.bincount(owner_text)[owner_text].tolist(),
    }


def _hits(rank: NDArray[np.int64]) -> NDArray[np.float64]:
    hits: NDArray[np.float64] = np.mean([rank < k for k in RECALL_AT], axis=0)
    return hits


# ---------------------------------------------------------------------------------------------- command


def _end_with_parent() -> None:
    """The parent holds the other end of this process's stdin: where it is killed, this run ends as well."""
    os.read(0, 1)  # not sys.stdin.read: its lock would be held when the interpreter shuts down
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_run", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("arm", choices=[*ARMS, *EXPLORATORY])
    parser.add_argument("fold", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--scale", choices=SCALES, default="whole")
    parser.add_argument("--end-with-parent", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.end_with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    execute(Run(arguments.out, arguments.arm, arguments.fold, arguments.seed, arguments.scale))


if __name__ == "__main__":
    main()
