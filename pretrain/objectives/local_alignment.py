"""The local-alignment objective (MAKE's fine-grained alignment).

Shapes: B images on this rank, N = W * B, K slots, C columns (distinct texts of the term), S columns of this rank's
share, X = C + 1 or S + 1 (a spare column, see losses/contrastive.py), D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config import LocalAlignmentObjective
from pretrain.distributed import comm
from pretrain.losses.contrastive import column_pair_losses, hide_own, row_pair_losses, weighted_mean
from pretrain.objectives.base import Term
from pretrain.objectives.contrastive import share_of_columns, slot_weights, with_spare_column
from pretrain.objectives.features import Features


class LocalAlignment:
    """Each sub-caption's region of its image against the texts."""

    def __init__(self, config: LocalAlignmentObjective) -> None:
        self.config = config
        self.label = config.label
        self.weight = config.weight
        self.aspects = config.aspects

    def __call__(self, features: Features) -> Term:
        config, batch, regions = self.config, features.batch, features.regions
        assert regions is not None
        columns = batch.columns[self.label]
        text_XD = with_spare_column(features.text_UD[columns.text_C])
        weight_BK = slot_weights(features, config.aspects, config.diagnosis_weights)
        used_BK = weight_BK > 0
        weight_BK = weight_BK * (regions.num_selected_BK > 0)  # a sub-caption that selects no patch is skipped

        column_BK = columns.column_of_text[batch.text_BK]
        slot_R = torch.split(columns.slot_M, columns.num_slots_by_rank)[comm.rank()] - comm.rank() * column_BK.numel()
        rows = _Rows.of(features.logit_scale, regions.region_BKD, slot_R, text_XD, column_BK)
        pair_R = row_pair_losses(rows.positive_R1, rows.negative_RX).squeeze(1)
        pair_BK = pair_R.new_zeros(column_BK.numel()).scatter(0, slot_R, pair_R).view_as(column_BK)
        num_images = comm.sum_over_ranks((weight_BK.sum(1) > 0).sum()).clamp_min(1)
        loss = comm.world_size() * weighted_mean(pair_BK, weight_BK).sum() / num_images
        if config.text_to_region:
            loss = (loss + self._text_to_region(features, weight_BK, text_XD)) / 2
        selected = (regions.num_selected_BK * used_BK).sum()
        possible = used_BK.sum() * regions.num_patches
        return Term(loss, {"selected_fraction": (selected, possible), "mean_weight": (weight_BK.sum(), used_BK.sum())})

    def _text_to_region(self, features: Features, weight_BK: Tensor, text_XD: Tensor) -> Tensor:
        """Each text over the regions of images that do not own it; empty regions are no negatives either."""
        assert features.regions is not None
        region_NKD, weight_NK = comm.gather_with_grad(features.regions.region_BKD), comm.gather(weight_BK)
        columns = features.batch.columns[self.label]
        share = share_of_columns(columns.column_of_text[features.batch.text_NK], text_XD.shape[0] - 1)
        text_XD = text_XD[share.column_X]
        rows = _Rows.of(features.logit_scale, region_NKD, columns.slot_M, text_XD, share.own_NK)
        weight_M1 = weight_NK.view(-1, 1)[columns.slot_M]
        negative_MX = rows.negative_RX.masked_fill(weight_M1 == 0, torch.finfo(text_XD.dtype).min)
        pair_M1 = column_pair_losses(rows.positive_R1, negative_MX, rows.own_R1)
        total = (weight_M1 * share.is_in_NK.view(-1, 1)[columns.slot_M] * pair_M1).sum()
        return comm.world_size() * total / weight_NK.sum().clamp_min(torch.finfo(weight_NK.dtype).tiny)


@dataclass
class _Rows:
    """Regions as rows: each has one text of its own, and whatever its image owns is no negative."""

    own_R1: Tensor  # column of the region's text
    positive_R1: Tensor
    negative_RX: Tensor

    @classmethod
    def of(cls, scale: Tensor, region_BKD: Tensor, slot_R: Tensor, text_XD: Tensor, column_BK: Tensor) -> _Rows:
        """Of the slots `slot_R`, flat positions in (B, K)."""
        own_R1 = column_BK.view(-1, 1)[slot_R]
        logits_RX = (scale * region_BKD.flatten(0, 1).index_select(0, slot_R)) @ text_XD.T
        negative_RX = hide_own(logits_RX, column_BK[slot_R // column_BK.shape[1]])
        return cls(own_R1, logits_RX.gather(1, own_R1), negative_RX)
