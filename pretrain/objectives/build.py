"""From the config's list to objectives."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.config import (
    ClipObjective,
    LocalAlignmentObjective,
    MaskedLatentObjective,
    MultiAspectObjective,
    ObjectiveConfig,
    SiglipObjective,
)
from pretrain.objectives.base import Objective
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.local_alignment import LocalAlignment
from pretrain.objectives.siglip import Siglip


def build_objectives(configs: Sequence[ObjectiveConfig]) -> list[Objective]:
    """The contrastive ones, in the config's order; for the other see `find_masked_latent`."""
    return [_build(config) for config in configs if not isinstance(config, MaskedLatentObjective)]


def _build(
    config: ClipObjective | MultiAspectObjective | SiglipObjective | LocalAlignmentObjective,
) -> Objective:
    if isinstance(config, SiglipObjective):
        return Siglip(config)
    if isinstance(config, LocalAlignmentObjective):
        return LocalAlignment(config)
    return Contrastive(config)


def find_masked_latent(configs: Sequence[ObjectiveConfig]) -> MaskedLatentObjective | None:
    return next((config for config in configs if isinstance(config, MaskedLatentObjective)), None)
