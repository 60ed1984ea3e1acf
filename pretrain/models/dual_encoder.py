"""The trained module: two towers, the temperature and, for a masked-latent term, the predictor.

Everything that carries a gradient happens in its one `forward`, as DeepSpeed's engine wants it.

Shapes: B images, P patches, D joint embedding width, U_r texts of this rank, W tower width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip.model import CustomTextCLIP
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import FrozenTeacher, MaskedLatentObjective, ModelConfig
from pretrain.data.batch import Batch, PackedTexts
from pretrain.models.masked import LatentPredictor
from pretrain.models.towers import TokenVisionTransformer, allow_trimmed, expose_tokens


@dataclass
class Encoded:
    """What one forward gives. Unit vectors, in the towers' precision."""

    image_BD: Tensor
    patch_BPD: Tensor | None  # only where a term needs patches
    text_RD: Tensor  # this rank's texts, in the order of the plan
    logit_scale: Tensor  # exp of the parameter, shape (1,)
    seen_BTW: Tensor | None  # masked latent: class token and visible patches, in the teacher's width
    predicted_BMW: Tensor | None


class DualEncoder(nn.Module):
    def __init__(self, clip: CustomTextCLIP, config: ModelConfig, embed_dim: int, needs_patches: bool) -> None:
        super().__init__()
        self.visual: Any = expose_tokens(clip.visual)
        self.text: Any = allow_trimmed(clip.text)
        self.logit_scale = clip.logit_scale
        self.predictor: LatentPredictor | None = None
        self.patch_projection: nn.Module | None = None
        if needs_patches:
            linear = self.visual.has_linear_pooling
            width = self.visual.token_width
            self.patch_projection = nn.Identity() if linear else nn.Linear(width, embed_dim, bias=False)
        self._frozen: list[nn.Module] = []
        self._freeze(config)

    def check_batch_norm(self, world_size: int) -> None:
        """Raises InputError where batch statistics would differ between ranks."""
        learns = [m for m in self.visual.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if world_size > 1 and any(module not in self._frozen for module in learns) and self.visual not in self._frozen:
            raise InputError(
                "model.freeze_batch_norm: false on more than one rank: each would use its own batch's statistics"
            )

    def require_droppable_patches(self) -> None:
        """Raises InputError for a tower that cannot encode a part of its patches."""
        if not isinstance(self.visual, TokenVisionTransformer):
            raise InputError(
                f"objectives.masked_latent: the image tower {type(self.visual).__name__} cannot drop patches (a "
                "convolution needs the whole image); use one of open_clip's ViTs or leave the term out"
            )

    def add_predictor(self, objective: MaskedLatentObjective, teacher_width: int) -> None:
        self.predictor = LatentPredictor(
            self.visual.token_width,
            teacher_width,
            tuple(self.visual.grid_size),
            objective.predictor_width,
            objective.predictor_depth,
            objective.predictor_heads,
            predicts_seen=isinstance(objective.teacher, FrozenTeacher),
        )

    def _freeze(self, config: ModelConfig) -> None:
        """Frozen parts need no gradient and stay in eval mode: no dropout, no running statistics."""
        if config.freeze_image:
            self.visual.requires_grad_(False)
            self._frozen.append(self.visual)
        if config.freeze_text:
            self.text.requires_grad_(False)
            projection = getattr(self.text, "proj", None)
            projection = getattr(self.text, "text_projection", None) if projection is None else projection
            if isinstance(projection, nn.Module | nn.Parameter):
                projection.requires_grad_(True)
            self._frozen.append(self.text)
        if config.freeze_batch_norm:
            self._frozen += [m for m in self.visual.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> DualEncoder:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def encode_image(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised pixels to (image_BD, patch_BPD or None), unit vectors."""
        image_BD, patch = self.visual(image_BCHW)
        patch_BPD = None if self.patch_projection is None else F.normalize(self.patch_projection(patch), dim=-1)
        return F.normalize(image_BD, dim=-1), patch_BPD

    def encode_texts(self, packed: PackedTexts) -> Tensor:
        """(U_r, D) unit vectors: one forward a bucket, then the plan's order."""
        features = torch.cat([self.text(tokens) for tokens in packed.bucket_tokens])
        return F.normalize(features[packed.order_R], dim=-1)

    def forward(self, image_BCHW: Tensor, batch: Batch) -> dict[str, Any]:
        """Normalised pixels and the batch's texts and masks to the fields of `Encoded`.

        A dictionary, because ZeRO-3's hooks walk dictionaries and not dataclasses.
        """
        image_BD, patch_BPD = self.encode_image(image_BCHW)
        seen_BTW = predicted_BMW = None
        if self.predictor is not None:
            latent_BVW = self.visual(image_BCHW, visible_BV=batch.visible_BV)
            seen_BTW, predicted_BMW = self.predictor(latent_BVW, batch.visible_BV, batch.masked_BM)
        return {
            "image_BD": image_BD,
            "patch_BPD": patch_BPD,
            "text_RD": self.encode_texts(batch.packed),
            "logit_scale": self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32)).exp(),
            "seen_BTW": seen_BTW,
            "predicted_BMW": predicted_BMW,
        }
