"""Soft targets over related diagnoses (after O-MAKE, arXiv 2512.03445, whose code is not released).

Shapes: B images, G distinct diagnosis texts of the global batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def related_diagnoses_loss(logits_BG: Tensor, distance_BG: Tensor, temperature: float) -> Tensor:
    """(B,) cross-entropy of q_i against the softmax over all G texts; 0 for an image whose diagnosis is unknown.

    q_i(g) ~ exp(-distance(i, g) / temperature). A text at an infinite distance gets no mass and stays in the
    denominator of the softmax.

    Args:
        logits_BG: scaled similarities, float.
        distance_BG: edges between the image's diagnosis and the text's in the hierarchy; inf where either is unknown.
    """
    is_known_B = is_diagnosis_known(distance_BG)
    # a softmax over nothing but minus infinity is NaN
    distance_BG = torch.where(is_known_B.unsqueeze(1), distance_BG, 0.0).to(logits_BG.dtype)
    target_BG = torch.softmax(-distance_BG / temperature, dim=1)
    loss_B = -(target_BG * F.log_softmax(logits_BG, dim=1)).sum(1)
    return torch.where(is_known_B, loss_B, 0.0)


def is_diagnosis_known(distance_BG: Tensor) -> Tensor:
    """(B,) bool: the image's diagnosis has a node, so at least its own text is at a finite distance."""
    return distance_BG.isfinite().any(1)
