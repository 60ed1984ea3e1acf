"""The masked-latent objective: the student's prediction against a teacher's latents of the whole image."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config import MaskedLatentObjective
from pretrain.losses.masked_latent import cosine_distance, normalised_smooth_l1
from pretrain.models.dual_encoder import Encoded
from pretrain.objectives.base import Term
from pretrain.objectives.features import working_dtype


class MaskedLatent:
    """Needs no other image and no text, so it is computed in each micro-batch by itself."""

    def __init__(self, config: MaskedLatentObjective) -> None:
        self.label = config.label
        self.weight = config.weight

    def __call__(
        self, encoded: Encoded, target_BTW: Tensor, visible_BV: Tensor | None, masked_BM: Tensor | None
    ) -> Term:
        """Every image counts the same number of tokens, so the mean over ranks is the mean over the global batch.

        Args:
            encoded: `predicted_BMW` and, with a frozen teacher, `seen_BTW`.
            target_BTW: the teacher's latents of the whole image, its prefix tokens (class, registers) first.
            visible_BV, masked_BM: patch positions.
        """
        predicted_BMW, seen_BTW = encoded.predicted_BMW, encoded.seen_BTW
        assert predicted_BMW is not None and visible_BV is not None and masked_BM is not None
        dtype = working_dtype(predicted_BMW)
        num_prefix = target_BTW.shape[1] - visible_BV.shape[1] - masked_BM.shape[1]
        masked_target = _take(target_BTW, masked_BM, num_prefix).to(dtype)
        if seen_BTW is not None:  # frozen teacher: what the student saw is compared too
            visible_target = _take(target_BTW, visible_BV, num_prefix).to(dtype)
            num_class = seen_BTW.shape[1] - visible_BV.shape[1]  # 1 where student and teacher have a class token
            target = torch.cat([target_BTW[:, :num_class].to(dtype), visible_target, masked_target], dim=1)
            loss = cosine_distance(torch.cat([seen_BTW, predicted_BMW], dim=1).to(dtype), target)
        else:
            loss = normalised_smooth_l1(predicted_BMW.to(dtype), masked_target)
        # a collapsed teacher gives every patch of an image the same latent: watch their spread
        spread_B = masked_target.std(dim=1, correction=0).mean(1)
        return Term(loss, {"target_std": (spread_B.sum(), spread_B.new_full((), len(spread_B)))})


def _take(latent_BTW: Tensor, patch_BX: Tensor, num_prefix: int) -> Tensor:
    """The latents of some patches."""
    index_BXW = (patch_BX + num_prefix).unsqueeze(-1).expand(-1, -1, latent_BTW.shape[-1])
    return latent_BTW.gather(1, index_BXW)
