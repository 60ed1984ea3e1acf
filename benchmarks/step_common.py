"""What the parts of `benchmarks.step` share: sizes, configs, timed sides, figures."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.side_by_side import bootstrap_interval
from pretrain.config import DataConfig, EngineConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from pretrain.data.batch import Batch
from pretrain.train.step import training_step
from pretrain.train.trainer import Trainer

TOLERANCE = 1e-5  # between the losses of both sides, relative where they are over 1
#: AdamW does all its work, and no weight moves: losses can be compared in every round
_OPTIMIZER = OptimizerConfig(lr=1e-30, warmup_steps=0)
_NUM_STEPS = 1000


@dataclass(frozen=True)
class Sizes:
    """What is run; the defaults are those of the bars."""

    tower_77: str = "ViT-B-16"
    tower_256: dict[str, Any] = field(default_factory=dict)  # open_clip's model config
    bert: dict[str, Any] = field(default_factory=dict)  # transformers' config of its text tower
    num_images: int = 32  # text part; step at 77 tokens
    num_images_256: int = 4
    num_images_plain: int = 8  # against open_clip; masked latent
    num_images_losses: int = 512
    num_patches_losses: int = 49
    width_losses: int = 512
    min_block: int = 16  # patches, of the block mask
    num_rounds: int = 3  # where the ratio is far from 1
    num_rounds_text: int = 5  # batches differ most in their texts
    num_rounds_near: int = 20

    def with_changes(self, changes: dict[str, int]) -> Sizes:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Row:
    """One figure: in each round `values` are made of what both sides took."""

    key: str
    is_dense: bool
    rival: float  # median over the rounds, seconds or MB
    ours: float
    value: float
    interval: tuple[float, float]


def make_row(
    key: str,
    pairs: Sequence[tuple[float, float]],
    value: Callable[[float, float], float] = lambda rival, ours: rival / ours,
    is_dense: bool = False,
) -> Row:
    """From (rival, ours), one pair a round."""
    values = [value(rival, ours) for rival, ours in pairs]
    rival, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Row(key, is_dense, rival, ours, statistics.median(values), bootstrap_interval(values))


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def check_equal(what: str, ours: Tensor, theirs: Tensor) -> None:
    own, rival = ours.item(), theirs.item()
    if not abs(own - rival) <= TOLERANCE * max(1.0, abs(rival)):
        raise SystemExit(f"{what}: {own:.7f} is not the rival's {rival:.7f}")


class Timer:
    """Sides for `in_turns` that keep what they computed, by round."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.results: dict[tuple[str, int], Tensor] = {}

    def side(self, name: str, run: Callable[[int], Tensor]) -> Callable[[int], float]:
        def timed(number: int) -> float:
            start_s = time.perf_counter()
            result = run(number)
            elapsed_s = time.perf_counter() - start_s
            self.results[name, number] = result.detach()
            say(f"{self.key}: round {number + 1}, {name} {elapsed_s:.2f} s")
            return elapsed_s

        return timed

    def check(self, ours: str, theirs: str) -> None:
        for name, number in list(self.results):
            if name == ours:
                check_equal(f"{self.key}, round {number + 1}", self.results[ours, number], self.results[theirs, number])


def train_config(
    folder: Path, data_dir: Path, model: str, objectives: Sequence[ObjectiveConfig], num_images: int, **data: Any
) -> TrainConfig:
    return TrainConfig(
        run_dir=folder / "run",
        data=DataConfig(train_dir=data_dir, num_workers=0, **data),
        model=ModelConfig(name=model),
        objectives=tuple(objectives),
        global_batch_size=num_images,
        num_steps=_NUM_STEPS,
        optimizer=_OPTIMIZER,
        engine=EngineConfig(kind="torch"),
    )


def our_step(trainer: Trainer, batch: Batch, step: int) -> Tensor:
    """The loss before the update."""
    return training_step(trainer, batch, step)[0]
