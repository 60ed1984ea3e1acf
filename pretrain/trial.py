"""`trial=true`: the one override that lets any recipe run anywhere in a minute, to see that it works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.config import (
    CheckpointConfig,
    EngineConfig,
    FrozenTeacher,
    LocalAlignmentObjective,
    MaskedLatentObjective,
    ModelConfig,
    ObjectiveConfig,
    TowerConfig,
    TrainConfig,
)

IMAGES_PER_RANK = 4
MAX_RANKS = 2  # enough for every collective
_SUFFIX = "-trial"


def as_trial(config: TrainConfig) -> TrainConfig:
    """The same run on towers of a few million parameters: two steps of four images a rank, from random weights.

    What a recipe is made of stays: objectives, aspects, structure of the towers, engine and ZeRO stage, cached
    accumulation (two micro-batches where the recipe has micro-batches), frozen towers, learning rates. What goes: the
    width, every download (weights, teacher, the hub's tokenizers), ranks above two, the length. sigma of local
    alignment becomes 0, because from random towers a higher one selects no patch. The run lands in `RUN_DIR-trial`.
    """
    num_ranks = min(config.launch.num_ranks, MAX_RANKS)
    changes: dict[str, Any] = {
        "run_dir": _trial_dir(config.run_dir),
        "data": config.data.model_copy(update={"num_workers": min(config.data.num_workers, 1)}),
        "model": _tiny_model(config.model),
        "objectives": tuple(_tiny_objective(objective) for objective in config.objectives),
        "global_batch_size": IMAGES_PER_RANK * num_ranks,
        "micro_batch_size": None if config.micro_batch_size is None else IMAGES_PER_RANK // 2,
        "num_steps": 2,
        "num_epochs": None,
        "optimizer": config.optimizer.model_copy(update={"warmup_steps": 1}),
        "engine": _engine_here(config.engine),
        "launch": config.launch.model_copy(update={"num_ranks": num_ranks, "threads_per_rank": 1}),
        "log_every": 1,
        "checkpoint": CheckpointConfig(every=2),
        "validation": None,
    }
    return TrainConfig.model_validate(config.model_copy(update=changes).model_dump())


def _trial_dir(run_dir: Path) -> Path:
    """Once: the resolved config of a trial can be run again."""
    return run_dir if run_dir.name.endswith(_SUFFIX) else run_dir.with_name(run_dir.name + _SUFFIX)


def _tiny_model(model: ModelConfig) -> ModelConfig:
    return model.model_copy(
        update={"tiny": True, "pretrained": None, "image": _tiny_tower(model.image), "text": _tiny_tower(model.text)}
    )


def _tiny_tower(tower: TowerConfig) -> TowerConfig:
    return tower.model_copy(update={"weights": None, "freeze_layers": min(tower.freeze_layers, 1)})


def _tiny_objective(objective: ObjectiveConfig) -> ObjectiveConfig:
    if isinstance(objective, LocalAlignmentObjective):
        return objective.model_copy(update={"sigma": min(objective.sigma, 0.0)})
    if isinstance(objective, MaskedLatentObjective):
        teacher = objective.teacher
        if isinstance(teacher, FrozenTeacher):
            teacher = teacher.model_copy(update={"tiny": True, "pretrained": None, "weights": None})
        sizes = {"predictor_depth": 1, "predictor_width": 64, "predictor_heads": 2}
        return objective.model_copy(update={"teacher": teacher, **sizes})
    return objective


def _engine_here(engine: EngineConfig) -> EngineConfig:
    """fp32 on a GPU without bf16, and for fp16 on a CPU."""
    import torch  # not for those who only read a config

    lacks_bf16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
    if (engine.precision == "bf16" and lacks_bf16) or (engine.precision == "fp16" and not torch.cuda.is_available()):
        return engine.model_copy(update={"precision": "fp32"})
    return engine
