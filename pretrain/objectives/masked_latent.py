"""The masked-latent objective: the student's prediction against a teacher's latents of the whole image."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config import MaskedLatentObjective
from pretrain.losses.masked_latent import cosine_distance, normalised_smooth_l1
from pretrain.objectives.base import Term
from pretrain.objectives.features import Features


class MaskedLatent:
    aspects = None

    def __init__(self, config: MaskedLatentObjective) -> None:
        self.config = config
        self.kind: str = config.kind
        self.weight = config.weight

    def __call__(self, features: Features) -> Term:
        """Every image counts the same number of tokens, so the mean over ranks is the mean over the global batch."""
        encoded, batch = features.encoded, features.batch
        predicted_BMW, target_BTW = encoded.predicted_BMW, features.target_BTW
        assert predicted_BMW is not None and target_BTW is not None
        assert batch.masked_BM is not None and batch.visible_BV is not None
        dtype = features.image_BD.dtype
        masked_target = _take(target_BTW, batch.masked_BM).to(dtype)
        if encoded.seen_BTW is not None:  # frozen teacher: what the student saw is compared too
            seen_target = torch.cat([target_BTW[:, :1], _take(target_BTW, batch.visible_BV)], dim=1).to(dtype)
            predicted = torch.cat([encoded.seen_BTW, predicted_BMW], dim=1).to(dtype)
            loss = cosine_distance(predicted, torch.cat([seen_target, masked_target], dim=1))
        else:
            loss = normalised_smooth_l1(predicted_BMW.to(dtype), masked_target)
        # a collapsed teacher gives every patch the same latent: watch its spread
        spread = masked_target.std(dim=(0, 1)).mean()
        return Term(loss, {"target_std": (spread, torch.ones_like(spread))})


def _take(latent_BTW: Tensor, patch_BX: Tensor) -> Tensor:
    """The latents of some patches; the class token stands first."""
    return latent_BTW.gather(1, (patch_BX + 1).unsqueeze(-1).expand(-1, -1, latent_BTW.shape[-1]))
