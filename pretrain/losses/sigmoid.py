"""The sigmoid loss of SigLIP over images and distinct texts with ownership.

Shapes: R rows (images), C columns (distinct texts), X = C + 1 (a spare column, see contrastive.py), K caption slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss_sum(logits_RX: Tensor, own_RK: Tensor) -> Tensor:
    """Sum of -logsigmoid(z logit) over all pairs, z = 1 where the row owns the text, else -1 (Zhai et al. 2023, eq. 2).

    A scalar; divide by the number of images of the global batch. With one distinct caption an image it is
    `open_clip.loss.SigLipLoss`.

    Args:
        logits_RX: scale * similarity + bias, float.
        own_RK: int64, the columns of all the row's texts, under any aspect; C for one that is no column.
    """
    sign_RX = torch.full_like(logits_RX, -1.0).scatter_(1, own_RK, 1.0)
    return -F.logsigmoid((sign_RX * logits_RX)[:, :-1]).sum()
