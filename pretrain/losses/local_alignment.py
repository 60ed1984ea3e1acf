"""Regions: what a sub-caption selects among its own image's patches (MAKE, fine-grained alignment).

Shapes: B images, K caption slots, P patches, D embedding width. The patch-text tensor is (B, K, P) over an image's
own captions; a (patches x all texts) tensor is never built.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def region_features(patch_BPD: Tensor, text_BKD: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Each caption's region of its own image: (region_BKD unit, selected_BKP bool).

    a_p = cos(patch p, text k) where it is at least sigma, else 0; the region is normalise(sum_p a_p patch_p).
    A caption that selects no patch has a zero region: give it no weight.

    Args:
        patch_BPD: unit patch features in the joint space.
        text_BKD: unit text features.
        sigma: threshold on the cosine.
    """
    cosine_BKP = torch.einsum("bkd,bpd->bkp", text_BKD, patch_BPD)
    selected_BKP = cosine_BKP >= sigma
    attention_BKP = torch.where(selected_BKP, cosine_BKP, torch.zeros_like(cosine_BKP))
    region_BKD = F.normalize(torch.einsum("bkp,bpd->bkd", attention_BKP, patch_BPD), dim=-1)
    return region_BKD, selected_BKP
