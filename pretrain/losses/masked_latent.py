"""Masked-latent losses: a student that saw part of an image predicts what a teacher saw of the whole.

Shapes: B images, M masked patches, T tokens, D teacher width. Targets carry no gradient.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cosine_distance(predicted_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Frozen teacher (CAEv2 / PanDerm): mean of 1 - cos over class, visible and masked tokens. Scalar."""
    return (1.0 - F.cosine_similarity(predicted_BTD, target_BTD.detach(), dim=-1)).mean()


def normalised_smooth_l1(predicted_BMD: Tensor, target_BMD: Tensor, beta: float = 1.0) -> Tensor:
    """EMA teacher (data2vec / I-JEPA): smooth L1 to the layer-normalised target, mean over masked tokens. Scalar."""
    target_BMD = F.layer_norm(target_BMD.detach(), target_BMD.shape[-1:])
    return F.smooth_l1_loss(predicted_BMD, target_BMD, beta=beta)
