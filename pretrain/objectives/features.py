"""What the contrastive objectives share in one step: gathered features, regions and the ownership of texts.

Shapes: B images on this rank, N = W * B, K caption slots, U distinct texts of the global batch, R those that this
rank encodes, P patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.schema import ASPECT_CODE, SUBCAPTION_ASPECTS, Aspect
from pretrain.data.batch import Batch
from pretrain.distributed import comm
from pretrain.losses.local_alignment import region_features

_FIRST_SUBCAPTION = ASPECT_CODE[SUBCAPTION_ASPECTS[0]]
_LAST_SUBCAPTION = ASPECT_CODE[SUBCAPTION_ASPECTS[-1]]


@dataclass
class Regions:
    """What each caption selects among its own image's patches; see `losses.local_alignment.region_features`."""

    region_BKD: Tensor  # unit; zero where no patch is selected
    num_selected_BK: Tensor  # int64
    num_patches: int  # P


@dataclass
class Features:
    """fp32 (or fp64) features of the global batch; gradients of every rank's loss reach the rank that made them."""

    batch: Batch
    image_BD: Tensor
    image_ND: Tensor
    text_UD: Tensor
    text_BKD: Tensor  # each slot's text; zeros in an empty slot
    logit_scale: Tensor
    logit_bias: Tensor | None  # of the sigmoid loss
    regions: Regions | None  # where a local-alignment term asks for them

    @property
    def is_subcaption_BK(self) -> Tensor:
        aspect_BK = self.batch.aspect_BK
        return (aspect_BK >= _FIRST_SUBCAPTION) & (aspect_BK <= _LAST_SUBCAPTION)

    def diagnosis(self) -> tuple[Tensor, Tensor]:
        """(diagnosis_BD, has_diagnosis_B): the feature of each image's diagnosis sentence."""
        is_diagnosis_BK = self.batch.aspect_BK == ASPECT_CODE[Aspect.DIAGNOSIS]
        slot_B11 = is_diagnosis_BK.int().argmax(1).view(-1, 1, 1)
        diagnosis_BD = self.text_BKD.gather(1, slot_B11.expand(-1, 1, self.text_BKD.shape[2])).squeeze(1)
        return diagnosis_BD, is_diagnosis_BK.any(1)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Losses are computed in fp32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def gather_texts(text_RD: Tensor, batch: Batch) -> Tensor:
    """This rank's texts to those of the global batch (U, D), by one collective in the towers' precision."""
    missing = batch.num_padded_texts - text_RD.shape[0]
    gathered = comm.gather_with_grad(F.pad(text_RD, (0, 0, 0, missing)))
    return gathered[batch.gathered_row_U].to(working_dtype(gathered))


def texts_of_slots(text_UD: Tensor, text_BK: Tensor) -> Tensor:
    """(B, K, D): an empty slot's index is U, one more row of zeros."""
    return F.pad(text_UD, (0, 0, 0, 1))[text_BK]


def select_regions(patch_BPD: Tensor, text_BKD: Tensor, sigma: float) -> Regions:
    region_BKD, selected_BKP = region_features(patch_BPD.to(text_BKD.dtype), text_BKD, sigma)
    return Regions(region_BKD, selected_BKP.sum(2), selected_BKP.shape[2])


def gather_features(
    batch: Batch,
    image_BD: Tensor,
    text_UD: Tensor,
    regions: Regions | None,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
) -> Features:
    """The second collective with gradient: images (N, D), in the towers' precision."""
    dtype = text_UD.dtype
    return Features(
        batch=batch,
        image_BD=image_BD.to(dtype),
        image_ND=comm.gather_with_grad(image_BD).to(dtype),
        text_UD=text_UD,
        text_BKD=texts_of_slots(text_UD, batch.text_BK),
        logit_scale=logit_scale.to(dtype),
        logit_bias=None if logit_bias is None else logit_bias.to(dtype),
        regions=regions,
    )
