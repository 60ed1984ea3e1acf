"""From the config's list to objectives."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.config import LocalAlignmentObjective, MaskedLatentObjective, ObjectiveConfig
from pretrain.objectives.base import Objective
from pretrain.objectives.contrastive import Contrastive, LocalAlignment
from pretrain.objectives.masked_latent import MaskedLatent


def build_objectives(configs: Sequence[ObjectiveConfig]) -> list[Objective]:
    return [_build(config) for config in configs]


def _build(config: ObjectiveConfig) -> Objective:
    if isinstance(config, MaskedLatentObjective):
        return MaskedLatent(config)
    if isinstance(config, LocalAlignmentObjective):
        return LocalAlignment(config)
    return Contrastive(config)


def find_masked_latent(configs: Sequence[ObjectiveConfig]) -> MaskedLatentObjective | None:
    return next((config for config in configs if isinstance(config, MaskedLatentObjective)), None)
