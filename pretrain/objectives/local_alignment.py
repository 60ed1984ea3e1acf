"""The local-alignment objective (MAKE's fine-grained alignment).

Shapes: B images on this rank, N = W * B, K slots, C columns (distinct texts of the term), S columns of this rank's
share, X = C + 1 or S + 1 (a spare column, see losses/contrastive.py), D width.
"""

from __future__ import annotations

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
        config, regions = self.config, features.regions
        assert regions is not None
        columns = features.batch.columns[self.label]
        text_XD = with_spare_column(features.text_UD[columns.text_C])
        weight_BK = slot_weights(features, config.aspects, config.diagnosis_weights)
        used_BK = weight_BK > 0
        weight_BK = weight_BK * (regions.num_selected_BK > 0)  # a sub-caption that selects no patch is skipped

        # a region is a row with one text; whatever its image owns is no negative
        column_BK = columns.column_of_text[features.batch.text_BK]
        B, K = column_BK.shape
        logits_RX = (features.logit_scale * regions.region_BKD.reshape(B * K, -1)) @ text_XD.T
        positive_R1 = logits_RX.gather(1, column_BK.reshape(B * K, 1))
        pair_R1 = row_pair_losses(positive_R1, hide_own(logits_RX, column_BK.repeat_interleave(K, dim=0)))
        losses_B = weighted_mean(pair_R1.view(B, K), weight_BK)
        num_images = comm.sum_over_ranks((weight_BK.sum(1) > 0).sum()).clamp_min(1)
        loss = comm.world_size() * losses_B.sum() / num_images
        if config.text_to_region:
            loss = (loss + self._text_to_region(features, weight_BK, text_XD)) / 2
        selected = (regions.num_selected_BK * used_BK).sum()
        possible = used_BK.sum() * regions.num_patches
        return Term(loss, {"selected_fraction": (selected, possible), "mean_weight": (weight_BK.sum(), used_BK.sum())})

    def _text_to_region(self, features: Features, weight_BK: Tensor, text_XD: Tensor) -> Tensor:
        """Each text over the regions of images that do not own it; empty regions are no negatives either."""
        assert features.regions is not None
        region_NKD, weight_NK = comm.gather_with_grad(features.regions.region_BKD), comm.gather(weight_BK)
        column_NK = features.batch.columns[self.label].column_of_text[features.batch.text_NK]
        share = share_of_columns(column_NK, text_XD.shape[0] - 1)
        N, K = column_NK.shape
        own_R1, weight_R1 = share.own_NK.reshape(N * K, 1), weight_NK.reshape(N * K, 1)
        logits_RX = (features.logit_scale * region_NKD.reshape(N * K, -1)) @ text_XD[share.column_X].T
        negative_RX = hide_own(logits_RX, share.own_NK.repeat_interleave(K, dim=0))
        negative_RX = negative_RX.masked_fill(weight_R1 == 0, torch.finfo(logits_RX.dtype).min)
        pair_R1 = column_pair_losses(logits_RX.gather(1, own_R1), negative_RX, own_R1)
        total = (weight_R1 * share.is_in_NK.reshape(N * K, 1) * pair_R1).sum()
        return comm.world_size() * total / weight_NK.sum().clamp_min(torch.finfo(weight_NK.dtype).tiny)
