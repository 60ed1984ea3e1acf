"""Contrastive losses over images and distinct texts with ownership.

Shapes: R rows (images or regions), C columns (distinct texts), K caption slots of a row.

A pair of a row and one of its own texts is contrasted with that text alone against what the row does not own:
an image's other captions are neither positives of this pair nor negatives. With one caption a row, no repeated
text and weights of 1 both functions give CLIP's softmax cross-entropy (Radford et al. 2021, figure 3).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _logsumexp_without(logits: Tensor, excluded: Tensor, dim: int) -> Tensor:
    """logsumexp over the entries not excluded; about -1e38 where nothing is left.

    The lowest finite number stands for minus infinity: a logsumexp over nothing has a NaN gradient, this one zero.
    """
    return logits.masked_fill(excluded, torch.finfo(logits.dtype).min).logsumexp(dim)


def row_losses(
    logits_RC: Tensor,
    owned_RC: Tensor,
    column_RK: Tensor,
    weight_RK: Tensor,
    own_captions_as_negatives: bool = False,
) -> Tensor:
    """Image to text: for each row the weighted mean over its own texts, (R,); 0 for a row without weight.

    Args:
        logits_RC: scaled similarities, float.
        owned_RC: bool, column c is a text of row r (under any aspect).
        column_RK: int64, the column of slot k; any valid column where the weight is 0.
        weight_RK: float >= 0; 0 where the slot is empty, not of this term, or repeats an earlier slot's text.
        own_captions_as_negatives: contrast with every other column, the row's own included.
    """
    positive_RK = logits_RC.gather(1, column_RK)
    if own_captions_as_negatives:
        denominator_RK = logits_RC.logsumexp(1, keepdim=True)
    else:
        negatives_R = _logsumexp_without(logits_RC, owned_RC, dim=1)
        denominator_RK = torch.logaddexp(negatives_R.unsqueeze(1), positive_RK)
    pair_RK = denominator_RK - positive_RK
    total_R = weight_RK.sum(1)
    return (weight_RK * pair_RK).sum(1) / total_R.clamp_min(torch.finfo(total_R.dtype).tiny)


def column_loss_sum(logits_RC: Tensor, excluded_RC: Tensor, column_RK: Tensor, weight_RK: Tensor) -> Tensor:
    """Text to image: the weighted sum over (row, own text) pairs, scalar. Divide by the sum of weights.

    Every pair's text is contrasted over the rows that are not excluded for it: the images that do not own it.

    Args:
        logits_RC: scaled similarities of ALL rows of the global batch with some of the columns.
        excluded_RC: bool, rows that are no negatives of the column: those that own it (and empty regions).
        column_RK: int64, as in `row_losses`, counted within these columns.
        weight_RK: float >= 0; 0 also where the slot's text is not among these columns.
    """
    negatives_C = _logsumexp_without(logits_RC, excluded_RC, dim=0)
    positive_RK = logits_RC.gather(1, column_RK)
    pair_RK = torch.logaddexp(negatives_C[column_RK], positive_RK) - positive_RK
    return (weight_RK * pair_RK).sum()


def ownership(column_RK: Tensor, num_columns: int) -> Tensor:
    """(R, C) bool from the columns of each row's slots; slots that hold `num_columns` own nothing."""
    owned = torch.zeros(column_RK.shape[0], num_columns + 1, dtype=torch.bool, device=column_RK.device)
    return owned.scatter_(1, column_RK, True)[:, :num_columns]
