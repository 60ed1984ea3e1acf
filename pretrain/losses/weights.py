"""Weights of an image's captions. No gradient flows through a weight.

Shapes: B images, K caption slots, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def diagnosis_guided(
    text_BKD: Tensor, diagnosis_BD: Tensor, has_diagnosis_B: Tensor, is_subcaption_BK: Tensor, temperature: float
) -> Tensor:
    """Weights by closeness to the diagnosis (MAKE, knowledge-guided weights): (B, K) in (0, 1].

    w_k = softmax over the image's sub-captions of cos(diagnosis, sub-caption k) / temperature, divided by its
    largest, so the closest sub-caption weighs 1; that quotient is exp((c_k - max c) / temperature).
    Slots that are no sub-captions, and images without a diagnosis, weigh 1.

    Args:
        text_BKD: unit text features of the slots.
        diagnosis_BD: unit feature of the diagnosis sentence; ignored where `has_diagnosis_B` is False.
        has_diagnosis_B, is_subcaption_BK: bool.
    """
    closeness_BK = torch.einsum("bkd,bd->bk", text_BKD, diagnosis_BD)
    lowest = torch.finfo(closeness_BK.dtype).min
    largest_B1 = closeness_BK.masked_fill(~is_subcaption_BK, lowest).amax(1, keepdim=True)
    weight_BK = ((closeness_BK - largest_B1) / temperature).exp()
    guided_BK = is_subcaption_BK & has_diagnosis_B.unsqueeze(1)
    return torch.where(guided_BK, weight_BK, torch.ones_like(weight_BK))


@torch.no_grad()
def once_per_text(text_BK: Tensor, weight_BK: Tensor) -> Tensor:
    """A string that stands in several slots of an image counts once, in its first slot, with the largest weight."""
    same_BKK = text_BK.unsqueeze(2) == text_BK.unsqueeze(1)
    largest_BK = torch.where(same_BKK, weight_BK.unsqueeze(1), torch.zeros_like(weight_BK).unsqueeze(1)).amax(2)
    repeats_earlier_BK = torch.tril(same_BKK, diagonal=-1).any(2)
    return largest_BK.masked_fill(repeats_earlier_BK, 0.0)
