"""What an objective is: an object that turns the step's features into a loss and declared statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from data_prep.schema import Aspect
from pretrain.objectives.features import Features


@dataclass
class Term:
    """One objective's value on this rank.

    `loss` is W x (this rank's share of the global loss): the mean over ranks is the loss of one process with the
    whole batch, and so is the mean of its gradients, which the engine takes. `statistics` are (sum, count) pairs,
    summed over ranks only when they are logged.
    """

    loss: Tensor
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    """A contrastive one: computed once a step, over the features of the whole global batch.

    The masked-latent objective needs no other image; it is computed in each micro-batch by itself and has its own call.
    """

    label: str  # names its columns in the batch, its term and its logs
    weight: float
    aspects: tuple[Aspect, ...]  # of the texts it contrasts

    def __call__(self, features: Features) -> Term: ...
