"""The softmax objectives: `clip` and `multi_aspect`.

Shapes: B images on this rank, N = W * B, K slots, U distinct texts, C columns (those of the term), S columns of this
rank's share, X = C + 1 or S + 1 (a spare column, see losses/contrastive.py), G diagnosis texts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.schema import ASPECT_CODE, NO_ASPECT_CODE, Aspect
from pretrain.config import ClipObjective, DiagnosisWeights, MultiAspectObjective, OntologyTargets
from pretrain.distributed import comm
from pretrain.losses.contrastive import (
    column_pair_losses,
    hide_own,
    row_pair_losses,
    row_pair_losses_among_all,
    weighted_mean,
)
from pretrain.losses.soft_targets import is_diagnosis_known, related_diagnoses_loss
from pretrain.losses.weights import diagnosis_guided, once_per_text
from pretrain.objectives.base import Term
from pretrain.objectives.features import Features


def slot_weights(features: Features, aspects: tuple[Aspect, ...], guided: DiagnosisWeights | None) -> Tensor:
    """(B, K): the weight of each slot in a term that uses `aspects`; 0 where it has none."""
    aspect_BK = features.batch.aspect_BK
    weight_BK = _is_used(aspects, features.text_BKD.dtype, aspect_BK.device)[aspect_BK]
    if guided is not None:
        diagnosis_BD, has_diagnosis_B = features.diagnosis()
        is_used_subcaption_BK = features.is_subcaption_BK & (weight_BK > 0)
        weight_BK = weight_BK * diagnosis_guided(
            features.text_BKD, diagnosis_BD, has_diagnosis_B, is_used_subcaption_BK, guided.temperature
        )
    return once_per_text(features.batch.text_BK, weight_BK)


@lru_cache
def _is_used(aspects: tuple[Aspect, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256,) 1.0 at the codes of the aspects; made once, so that no step copies it to the device."""
    table = torch.zeros(NO_ASPECT_CODE + 1, dtype=dtype)
    table[[ASPECT_CODE[aspect] for aspect in aspects]] = 1.0
    return table.to(device)


def with_spare_column(text_CD: Tensor) -> Tensor:
    """(X, D): one more text, of zeros."""
    return F.pad(text_CD, (0, 0, 0, 1))


@dataclass
class Share:
    """This rank's equal part of a term's columns, for text to image; the last parts can be short."""

    column_X: Tensor  # into the C columns and their spare one; the part's own spare one, the last, may be any of them
    own_NK: Tensor  # each slot's column within the part; S, the spare one, where it is elsewhere
    is_in_NK: Tensor  # bool


def share_of_columns(column_NK: Tensor, num_columns: int) -> Share:
    """Splits the columns among ranks. In a single process the share is everything."""
    size = -(-num_columns // comm.world_size())
    first = comm.rank() * size
    is_in_NK = (column_NK >= first) & (column_NK < min(first + size, num_columns))
    return Share(
        column_X=torch.arange(first, first + size + 1, device=column_NK.device).clamp(max=num_columns),
        own_NK=torch.where(is_in_NK, column_NK - first, size),
        is_in_NK=is_in_NK,
    )


def _positives_and_negatives(row_RD: Tensor, text_XD: Tensor, own_RK: Tensor) -> tuple[Tensor, Tensor]:
    logits_RX = row_RD @ text_XD.T
    return logits_RX.gather(1, own_RK), hide_own(logits_RX, own_RK)


def _soft_diagnoses(features: Features, ontology: OntologyTargets | None) -> tuple[Tensor, Tensor]:
    """(alpha_BK, loss_B1): the share of each pair's loss that the image's soft targets take, and their loss.

    The share is `ontology.alpha` for an image with its known diagnosis, 0 for any other pair.
    """
    batch, image_BD = features.batch, features.image_BD
    if ontology is None:
        return image_BD.new_zeros(batch.text_BK.shape), image_BD.new_zeros(image_BD.shape[0], 1)
    assert batch.diagnoses is not None
    distance_BG = batch.diagnoses.distance_BG
    logits_BG = (features.logit_scale * image_BD) @ features.text_UD[batch.diagnoses.text_G].T
    loss_B = related_diagnoses_loss(logits_BG, distance_BG, ontology.temperature)
    # by text, not by slot: the weight of a string under several aspects stands in its first slot
    slot_B1 = (batch.aspect_BK == ASPECT_CODE[Aspect.DIAGNOSIS]).int().argmax(1, keepdim=True)
    is_diagnosis_BK = batch.text_BK == batch.text_BK.gather(1, slot_B1)
    is_soft_BK = is_diagnosis_BK & is_diagnosis_known(distance_BG).unsqueeze(1)
    return ontology.alpha * is_soft_BK.to(image_BD.dtype), loss_B.unsqueeze(1)


class Contrastive:
    """Images against the distinct texts of a term's aspects, both ways (docs/objectives.md, ownership)."""

    def __init__(self, config: ClipObjective | MultiAspectObjective) -> None:
        self.config = config
        self.label = config.label
        self.weight = config.weight
        self.aspects = config.aspects

    def __call__(self, features: Features) -> Term:
        batch, scale, columns = features.batch, features.logit_scale, features.batch.columns[self.label]
        guided = self.config.diagnosis_weights if isinstance(self.config, MultiAspectObjective) else None
        weight_BK = slot_weights(features, self.config.aspects, guided)
        alpha_BK, soft_B1 = _soft_diagnoses(features, self.config.ontology)
        hard_BK = weight_BK * (1 - alpha_BK)  # of a pair's weight, what its own loss keeps
        weight_NK, hard_NK = comm.gather(torch.stack([weight_BK, hard_BK], dim=1)).unbind(1)

        text_XD = with_spare_column(features.text_UD[columns.text_C])
        column_BK = columns.column_of_text[batch.text_BK]
        logits = _positives_and_negatives(scale * features.image_BD, text_XD, column_BK)
        pair_BK = self._image_to_text(*logits, features, column_BK)
        losses_B = weighted_mean((1 - alpha_BK) * pair_BK + alpha_BK * soft_B1, weight_BK)
        num_images = (weight_NK.sum(1) > 0).sum().clamp_min(1)

        share = share_of_columns(columns.column_of_text[batch.text_NK], columns.text_C.shape[0])
        if comm.world_size() > 1:  # alone, they are the same
            logits = _positives_and_negatives(scale * features.image_ND, text_XD[share.column_X], share.own_NK)
        text_to_image = (hard_NK * share.is_in_NK * column_pair_losses(*logits, share.own_NK)).sum()
        text_to_image = text_to_image + (weight_BK * alpha_BK * soft_B1).sum()
        total_weight = weight_NK.sum().clamp_min(torch.finfo(weight_NK.dtype).tiny)
        loss = comm.world_size() * (losses_B.sum() / num_images + text_to_image / total_weight) / 2
        return Term(loss, self._statistics(weight_BK, alpha_BK, soft_B1))

    def _image_to_text(self, positive_BK: Tensor, negative_BX: Tensor, features: Features, column_BK: Tensor) -> Tensor:
        if not self.config.own_captions_as_negatives:
            return row_pair_losses(positive_BK, negative_BX)
        is_column_BK = (column_BK < negative_BX.shape[1] - 1).to(positive_BK.dtype)
        return row_pair_losses_among_all(
            positive_BK, negative_BX, once_per_text(features.batch.text_BK, is_column_BK) > 0
        )

    def _statistics(self, weight_BK: Tensor, alpha_BK: Tensor, soft_B1: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        used_BK = weight_BK > 0
        statistics = {
            "texts_per_image": (used_BK.sum(), weight_BK.new_full((), weight_BK.shape[0])),
            "mean_weight": (weight_BK.sum(), used_BK.sum()),
        }
        if self.config.ontology is not None:
            statistics["soft_loss"] = (soft_B1.detach().sum(), (alpha_BK > 0).any(1).sum())
        return statistics
