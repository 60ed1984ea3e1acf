"""What the objectives share in one step: gathered features and the ownership of texts.

Shapes: B images on this rank, N = W * B, K caption slots, U distinct texts of the global batch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.schema import ASPECT_CODE, SUBCAPTION_ASPECTS, Aspect
from pretrain.data.batch import Batch
from pretrain.distributed import comm
from pretrain.models.dual_encoder import Encoded

_FIRST_SUBCAPTION = ASPECT_CODE[SUBCAPTION_ASPECTS[0]]
_LAST_SUBCAPTION = ASPECT_CODE[SUBCAPTION_ASPECTS[-1]]


@dataclass
class Features:
    """fp32 (or fp64) features of the global batch; gradients of every rank's loss reach the rank that made them."""

    encoded: Encoded
    batch: Batch
    image_BD: Tensor
    image_ND: Tensor
    text_UD: Tensor
    text_BKD: Tensor  # each slot's text; zeros in an empty slot
    logit_scale: Tensor
    target_BTW: Tensor | None  # the teacher's latents of the whole image, class token first

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


def gather_features(encoded: Encoded, batch: Batch, target_BTW: Tensor | None) -> Features:
    """Two collectives with gradient: images (N, D) and texts (W * padded, D), in the towers' precision."""
    missing = batch.num_padded_texts - encoded.text_RD.shape[0]
    gathered = comm.gather_with_grad(F.pad(encoded.text_RD, (0, 0, 0, missing)))
    dtype = torch.promote_types(gathered.dtype, torch.float32)
    text_UD = gathered[batch.gathered_row_U].to(dtype)
    # an empty slot's index is U: one more row of zeros
    text_BKD = F.pad(text_UD, (0, 0, 0, 1))[batch.text_BK]
    return Features(
        encoded=encoded,
        batch=batch,
        image_BD=encoded.image_BD.to(dtype),
        image_ND=comm.gather_with_grad(encoded.image_BD).to(dtype),
        text_UD=text_UD,
        text_BKD=text_BKD,
        logit_scale=encoded.logit_scale.to(dtype),
        target_BTW=target_BTW,
    )
