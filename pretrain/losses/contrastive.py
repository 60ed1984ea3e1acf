"""Contrastive losses over images and distinct texts with ownership.

Shapes: R rows (images or regions), C columns (distinct texts), X = C + 1, K caption slots of a row.

A pair of a row and one of its own texts is contrasted with that text alone against what the row does not own:
an image's other captions are neither positives of this pair nor negatives. With one caption a row, no repeated
text and weights of 1 rows and columns together give CLIP's softmax cross-entropy (Radford et al. 2021, figure 3).

Logits have a spare last column. A slot whose text is no column points there, so that every row has K columns of its
own and none needs a (R, C) mask. Its values reach no loss, as long as such slots have no weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hide_own(logits_RX: Tensor, own_RK: Tensor) -> Tensor:
    """The logits of each row's negatives, (R, X): its own columns and the spare one at the lowest finite number.

    Not at minus infinity: a logsumexp over nothing has a NaN gradient, over lowest numbers it has none to pass on.

    Args:
        logits_RX: scaled similarities, float.
        own_RK: int64, the columns of all the row's texts, under any aspect; C for one that is no column.
    """
    spare_R1 = own_RK.new_full((own_RK.shape[0], 1), logits_RX.shape[1] - 1)
    return logits_RX.scatter(1, torch.cat([own_RK, spare_R1], dim=1), torch.finfo(logits_RX.dtype).min)


def row_pair_losses(positive_RK: Tensor, negative_RX: Tensor) -> Tensor:
    """Image to text, (R, K): -log of the softmax of each own text among itself and the row's negatives.

    A row without negatives has loss 0 and gradient 0.

    Args:
        positive_RK: logits of the row with its own texts.
        negative_RX: from `hide_own`.
    """
    return -F.logsigmoid(positive_RK - negative_RX.logsumexp(1, keepdim=True))


def column_pair_losses(positive_RK: Tensor, negative_RX: Tensor, column_RK: Tensor) -> Tensor:
    """Text to image, (R, K): -log of the softmax of the row among itself and the rows that do not own its text.

    Args:
        positive_RK: logits of the row with its own texts.
        negative_RX: from `hide_own`, of ALL rows of the global batch.
        column_RK: int64, the column of each slot's text.
    """
    return -F.logsigmoid(positive_RK - negative_RX.logsumexp(0)[column_RK])


def row_pair_losses_among_all(positive_RK: Tensor, negative_RX: Tensor, is_column_RK: Tensor) -> Tensor:
    """As `row_pair_losses`, the row's own other texts being negatives, too.

    Args:
        is_column_RK: bool, once for each of the row's columns: False in slots that repeat one or have none.
    """
    lowest = torch.finfo(positive_RK.dtype).min
    negatives_R1 = negative_RX.logsumexp(1, keepdim=True)
    everything_R1 = torch.cat([negatives_R1, positive_RK.masked_fill(~is_column_RK, lowest)], dim=1).logsumexp(1, True)
    return everything_R1 - positive_RK


def weighted_mean(value_RK: Tensor, weight_RK: Tensor) -> Tensor:
    """(R,) mean over each row's slots with weights >= 0; 0 for a row without weight."""
    total_R = weight_RK.sum(1)
    return (weight_RK * value_RK).sum(1) / total_R.clamp_min(torch.finfo(total_R.dtype).tiny)
