"""Contrastive objectives: `clip`, `multi_aspect` and `local_alignment`.

Shapes: B images on this rank, N = W * B, K slots, C columns (distinct texts of the term), S columns of this rank's
share, D width, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from data_prep.schema import ASPECT_CODE, NO_ASPECT_CODE, Aspect
from pretrain.config import ClipObjective, DiagnosisWeights, LocalAlignmentObjective, MultiAspectObjective
from pretrain.distributed import comm
from pretrain.losses.contrastive import column_loss_sum, ownership, row_losses
from pretrain.losses.local_alignment import region_features
from pretrain.losses.weights import diagnosis_guided, once_per_text
from pretrain.objectives.base import Term
from pretrain.objectives.features import Features


def slot_weights(features: Features, aspects: tuple[Aspect, ...], guided: DiagnosisWeights | None) -> Tensor:
    """(B, K): the weight of each slot in a term that uses `aspects`; 0 where it has none."""
    aspect_BK = features.batch.aspect_BK
    weight_BK = _is_used(aspects, features.text_BKD.dtype, aspect_BK.device)[aspect_BK]
    if guided is not None:
        diagnosis_BD, has_diagnosis_B = features.diagnosis()
        is_used_subcaption_BK = features.is_subcaption_BK & (weight_BK > 0)
        weight_BK = weight_BK * diagnosis_guided(
            features.text_BKD, diagnosis_BD, has_diagnosis_B, is_used_subcaption_BK, guided.temperature
        )
    return once_per_text(features.batch.text_BK, weight_BK)


@lru_cache
def _is_used(aspects: tuple[Aspect, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256,) 1.0 at the codes of the aspects; made once, so that no step copies it to the device."""
    table = torch.zeros(NO_ASPECT_CODE + 1, dtype=dtype)
    table[[ASPECT_CODE[aspect] for aspect in aspects]] = 1.0
    return table.to(device)


@dataclass
class _Share:
    """This rank's equal part S of a term's columns, for text to image; the last parts can be short."""

    column_S: Tensor  # into the C columns; past the last one it wraps around, so that no rank's part is empty
    owned_NS: Tensor  # bool; a wrapped column is owned by nobody and has no pairs
    position_NK: Tensor  # each slot's column within the part; 0 where it is elsewhere
    in_share_NK: Tensor  # bool


def _share_of_columns(column_NK: Tensor, num_columns: int) -> _Share:
    size = -(-num_columns // comm.world_size())
    first = comm.rank() * size
    in_share_NK = (column_NK >= first) & (column_NK < min(first + size, num_columns))
    return _Share(
        column_S=torch.arange(first, first + size, device=column_NK.device) % num_columns,
        owned_NS=ownership(torch.where(in_share_NK, column_NK - first, size), size),
        position_NK=torch.where(in_share_NK, column_NK - first, 0),
        in_share_NK=in_share_NK,
    )


class Contrastive:
    """Images against the distinct texts of a term's aspects, both ways (docs/objectives.md, ownership)."""

    def __init__(self, config: ClipObjective | MultiAspectObjective) -> None:
        self.config = config
        self.kind: str = config.kind
        self.weight = config.weight
        self.aspects = config.aspects

    def __call__(self, features: Features) -> Term:
        config, batch = self.config, features.batch
        guided = config.diagnosis_weights if isinstance(config, MultiAspectObjective) else None
        weight_BK = slot_weights(features, config.aspects, guided)
        weight_NK = comm.gather(weight_BK)
        columns = batch.columns[self.kind]
        num_columns = columns.text_C.shape[0]
        text_CD = features.text_UD[columns.text_C]

        column_BK = columns.column_of_text[batch.text_BK]
        losses_B = row_losses(
            features.logit_scale * features.image_BD @ text_CD.T,
            ownership(column_BK, num_columns),
            column_BK.clamp(max=num_columns - 1),
            weight_BK,
            config.own_captions_as_negatives,
        )
        num_images = (weight_NK.sum(1) > 0).sum().clamp_min(1)

        share = _share_of_columns(columns.column_of_text[batch.text_NK], num_columns)
        text_to_image = column_loss_sum(
            features.logit_scale * features.image_ND @ text_CD[share.column_S].T,
            share.owned_NS,
            share.position_NK,
            weight_NK * share.in_share_NK,
        )
        total_weight = weight_NK.sum().clamp_min(torch.finfo(weight_NK.dtype).tiny)
        loss = comm.world_size() * (losses_B.sum() / num_images + text_to_image / total_weight) / 2
        used_BK = weight_BK > 0
        return Term(
            loss,
            {
                "texts_per_image": (used_BK.sum(), torch.ones_like(weight_BK[:, 0]).sum()),
                "mean_weight": (weight_BK.sum(), used_BK.sum()),
            },
        )


class LocalAlignment:
    """Each sub-caption's region of its image against the texts (MAKE's fine-grained alignment)."""

    def __init__(self, config: LocalAlignmentObjective) -> None:
        self.config = config
        self.kind: str = config.kind
        self.weight = config.weight
        self.aspects = config.aspects

    def __call__(self, features: Features) -> Term:
        config, batch = self.config, features.batch
        assert features.encoded.patch_BPD is not None
        patch_BPD = features.encoded.patch_BPD.to(features.text_BKD.dtype)
        region_BKD, selected_BKP = region_features(patch_BPD, features.text_BKD, config.sigma)
        weight_BK = slot_weights(features, config.aspects, config.diagnosis_weights)
        used_BK = weight_BK > 0
        weight_BK = weight_BK * selected_BKP.any(2)  # a sub-caption that selects no patch is skipped
        columns = batch.columns[self.kind]
        num_columns = columns.text_C.shape[0]
        text_CD = features.text_UD[columns.text_C]

        # a region is a row with one text of its own; what its image owns is no negative
        column_BK = columns.column_of_text[batch.text_BK]
        B, K = column_BK.shape
        losses_BK = row_losses(
            features.logit_scale * region_BKD.reshape(B * K, -1) @ text_CD.T,
            ownership(column_BK, num_columns).repeat_interleave(K, dim=0),
            column_BK.reshape(B * K, 1).clamp(max=num_columns - 1),
            (weight_BK > 0).to(weight_BK.dtype).reshape(B * K, 1),
        ).view(B, K)
        total_B = weight_BK.sum(1)
        losses_B = (weight_BK * losses_BK).sum(1) / total_B.clamp_min(torch.finfo(total_B.dtype).tiny)
        num_images = comm.sum_over_ranks((total_B > 0).sum()).clamp_min(1)
        loss = comm.world_size() * losses_B.sum() / num_images
        if config.text_to_region:
            loss = (loss + self._text_to_region(features, region_BKD, weight_BK, text_CD)) / 2
        selected = (selected_BKP & used_BK.unsqueeze(2)).sum()
        possible = used_BK.sum() * selected_BKP.shape[2]
        return Term(loss, {"selected_fraction": (selected, possible), "mean_weight": (weight_BK.sum(), used_BK.sum())})

    def _text_to_region(self, features: Features, region_BKD: Tensor, weight_BK: Tensor, text_CD: Tensor) -> Tensor:
        """Each text over the regions of images that do not own it."""
        region_NKD, weight_NK = comm.gather_with_grad(region_BKD), comm.gather(weight_BK)
        column_NK = features.batch.columns[self.kind].column_of_text[features.batch.text_NK]
        share = _share_of_columns(column_NK, text_CD.shape[0])
        N, K = column_NK.shape
        total = column_loss_sum(
            features.logit_scale * region_NKD.reshape(N * K, -1) @ text_CD[share.column_S].T,
            # empty regions are no negatives either
            share.owned_NS.repeat_interleave(K, dim=0) | (weight_NK.reshape(N * K, 1) == 0),
            share.position_NK.reshape(N * K, 1),
            (weight_NK * share.in_share_NK).reshape(N * K, 1),
        )
        return comm.world_size() * total / weight_NK.sum().clamp_min(torch.finfo(weight_NK.dtype).tiny)
