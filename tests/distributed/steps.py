"""Real training steps (reader, towers, objectives, engine) on the synthetic data, for tests that compare runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pretrain.config import TrainConfig
from pretrain.data.batch import Batch
from pretrain.data.reader import BatchDataset
from pretrain.distributed.engine import full_tensors
from pretrain.models.build import PixelNormaliser
from pretrain.train.metrics import reduce_terms
from pretrain.train.state import build_trainer
from pretrain.train.step import training_step
from pretrain.train.trainer import Trainer

CPU = torch.device("cpu")

Objective = dict[str, Any]  # an entry of the config's `objectives`

CLIP: Objective = {"kind": "clip"}
SECOND_CLIP: Objective = {
    "kind": "clip",
    "name": "findings",
    "aspects": ["visual_concepts", "morphology", "body_site"],
    "weight": 0.5,
    "own_captions_as_negatives": True,
}
MULTI_ASPECT: Objective = {"kind": "multi_aspect", "ontology": {"alpha": 0.3}}
SIGLIP: Objective = {"kind": "siglip", "weight": 0.2}
LOCAL_ALIGNMENT: Objective = {"kind": "local_alignment", "sigma": 0.0, "text_to_region": True}
MASKED_LATENT: Objective = {
    "kind": "masked_latent",
    "teacher": {"kind": "ema", "momentum_start": 0.9},
    "mask": {"kind": "random", "ratio": 0.5},
    "predictor_depth": 1,
    "predictor_width": 32,
    "predictor_heads": 2,
}
CONTRASTIVE = [CLIP, SECOND_CLIP, MULTI_ASPECT, SIGLIP, LOCAL_ALIGNMENT]
EVERYTHING = [*CONTRASTIVE, MASKED_LATENT]


def masked_latent(teacher_path: Path | None = None, share_view: bool = False) -> Objective:
    """With a frozen teacher of the structure at `teacher_path`, by default with the student's moving average."""
    teacher = MASKED_LATENT["teacher"] if teacher_path is None else {"kind": "frozen", "name": str(teacher_path)}
    return MASKED_LATENT | {"teacher": teacher, "share_view": share_view}


def run_config(
    prepared_dir: Path, model: Path | dict[str, Any], objectives: Sequence[Objective], **changes: Any
) -> TrainConfig:
    """Eight images a step over all ranks; the plain engine; gradients are clipped in every step."""
    model = model if isinstance(model, dict) else {"name": str(model)}
    values: dict[str, Any] = {
        "run_dir": "unused",
        "seed": 3,
        "data": {"train_dir": str(prepared_dir / "train"), "num_workers": 0},
        "model": {"max_logit_scale": None, **model},
        "objectives": objectives,
        "global_batch_size": 8,
        "num_steps": 4,
        # a large eps: AdamW's first steps would blow rounding in gradients that are zero up to the weights' own size
        "optimizer": {"lr": 3e-3, "warmup_steps": 1, "eps": 1e-4, "grad_clip_norm": 0.5},
        "engine": {"kind": "torch"},
    }
    return TrainConfig.model_validate(values | changes)


def build(config: TrainConfig, dtype: torch.dtype = torch.float64) -> tuple[Trainer, BatchDataset]:
    """The trainer of a run, with the same start in either precision: float64 under the plain engine alone."""
    trainer, reader = build_trainer(config, CPU)
    if dtype == torch.float64:
        trainer.model.double()
        trainer.normalise = PixelNormaliser(trainer.model.visual, CPU, torch.float64)
        if trainer.teacher is not None:
            trainer.teacher.double()
    return trainer, reader


def without_dropout(trainer: Trainer) -> None:
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def run_steps(config: TrainConfig, num_steps: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What `take_steps` says, of the first steps of a run without dropout."""
    trainer, reader = build(config, dtype)
    without_dropout(trainer)
    return take_steps(trainer, [reader[step] for step in range(num_steps)])


def take_steps(trainer: Trainer, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Values by name: `loss..` and `statistic/..` (num_steps,) over all ranks, `gradient/..` of the first step (plain
    engine), `update/..` of each weight over all steps, `teacher/..` the teacher's weights at the end."""
    start = {name: tensor.clone() for name, tensor in full_tensors(trainer.engine, trainer.model)}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    gradients: dict[str, Tensor] = {}

    def keep_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if id(parameter) in names and parameter.grad is not None:  # DeepSpeed steps copies in parts
                gradients.setdefault(f"gradient/{names[id(parameter)]}", parameter.grad.clone())

    values: dict[str, list[float]] = {}
    hook = register_optimizer_step_pre_hook(keep_gradients)
    try:
        for step, batch in enumerate(batches):
            loss, terms = training_step(trainer, batch, step)
            of_step = reduce_terms(loss, terms) | {"grad_norm": float(trainer.engine.grad_norm())}
            for name, value in of_step.items():
                values.setdefault(name if name.startswith("loss") else f"statistic/{name}", []).append(value)
    finally:
        hook.remove()
    result = {name: torch.tensor(series, dtype=torch.float64) for name, series in values.items()}
    result |= gradients
    result |= {f"update/{name}": tensor - start[name] for name, tensor in full_tensors(trainer.engine, trainer.model)}
    if trainer.teacher is not None:
        result |= {f"teacher/{name}": tensor.clone() for name, tensor in trainer.teacher.named_parameters()}
    return result


def compare(ours: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of the reference, relative to the length of its kind (all gradients, ...).

    Relative to a single tensor would ask for digits that rounding takes: a bias of attention keys has a gradient of
    zero, so whatever arrives there is rounding.
    """
    assert ours.keys() == reference.keys()
    squares: dict[str, float] = {}
    for name, tensor in reference.items():
        kind = name.split("/")[0]
        squares[kind] = squares.get(kind, 0.0) + float(tensor.double().square().sum())
    for name, tensor in reference.items():
        kind = name.split("/")[0]
        if kind in ("loss", "statistic"):
            torch.testing.assert_close(
                ours[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            error = float((ours[name].double() - tensor.double()).norm()) / squares[kind] ** 0.5
            assert error <= tolerance, f"{name}: relative error {error:.1e}"
