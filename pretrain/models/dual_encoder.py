"""The trained module: two towers, the temperature and, for a masked-latent term, the predictor.

Everything that carries a gradient happens in its one `forward`, as DeepSpeed's engine wants it.

Shapes: B images, P patches, D joint embedding width, R texts of this rank, W tower width, T teacher width.
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
from pretrain.config import ModelConfig, TrainConfig
from pretrain.data.batch import PackedTexts
from pretrain.models.image_towers import expose_tokens
from pretrain.models.layers import freeze_layers, freeze_tower, pooling_names, projection_names
from pretrain.models.masked import LatentPredictor
from pretrain.models.open_clip_config import OpenClipConfig
from pretrain.models.text_towers import allow_trimmed
from pretrain.models.weights import WeightReport


@dataclass
class Encoded:
    """What one forward gives: tensors, None for what it was not asked. Unit vectors, in the towers' precision."""

    image_BD: Any
    patch_BPD: Any  # where a term needs patches; of the masked view, the visible ones
    text_RD: Any  # in the order of the plan
    logit_scale: Tensor  # exp of the parameter, shape (1,)
    logit_bias: Any  # shape (1,)
    seen_BTW: Any  # frozen teacher: class token and visible patches, in the teacher's width
    predicted_BMW: Any  # masked patches


@dataclass(frozen=True)
class Needs:
    """What the objectives ask of the module."""

    contrastive: bool = True  # text features, and those of images or their patches
    image: bool = True  # image features; local alignment alone reads patches only
    patches: bool = False  # patch features in the joint space
    share_view: bool = False  # contrastive features from the masked student's pass


class DualEncoder(nn.Module):
    def __init__(self, clip: CustomTextCLIP, config: ModelConfig, needs: Needs) -> None:
        super().__init__()
        self.visual: Any = expose_tokens(clip.visual)
        self.text: Any = allow_trimmed(clip.text)
        self.logit_scale = clip.logit_scale
        self.logit_bias = clip.logit_bias
        self.spec: OpenClipConfig = clip.spec  # what was built, in open_clip's terms
        self.weight_reports: list[WeightReport] = clip.weight_reports
        self.needs = needs
        self.predictor: LatentPredictor | None = None
        self.patch_projection: nn.Module | None = None
        if needs.patches:
            linear = self.visual.has_linear_pooling
            width, embed_dim = self.visual.token_width, int(self.spec.model_cfg["embed_dim"])
            self.patch_projection = nn.Identity() if linear else nn.Linear(width, embed_dim, bias=False)
        self._in_eval: list[nn.Module] = []
        self._freeze(config)

    def _freeze(self, config: ModelConfig) -> None:
        """Frozen parts need no gradient; a wholly frozen tower stays in eval mode, without dropout."""
        for tower, settings in ((self.visual, config.image), (self.text, config.text)):
            freeze_layers(tower, settings.freeze_layers)
            if settings.frozen:
                freeze_tower(tower)
                self._in_eval.append(tower)
        # what has no gradient would be moved by weight decay alone
        if not self.needs.contrastive:
            self.text.requires_grad_(False)
            self.logit_scale.requires_grad_(False)
            if self.logit_bias is not None:
                self.logit_bias.requires_grad_(False)
        if not self.needs.image and not (self.needs.patches and self.visual.has_linear_pooling):
            unread = projection_names(self.visual) | pooling_names(self.visual)
            for name, parameter in self.visual.named_parameters():
                if name in unread:
                    parameter.requires_grad_(False)
        if config.freeze_batch_norm:
            self._in_eval += [m for m in self.visual.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> DualEncoder:
        super().train(mode)
        for module in self._in_eval:
            module.eval()
        return self

    def check_batch_norm(self, world_size: int, num_parts: int, config: TrainConfig) -> None:
        """Raises InputError where a batch's statistics would be another batch's, or move twice, or be rounded."""
        norms = [m for m in self.visual.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if self.visual in self._in_eval or all(module in self._in_eval for module in norms):
            return
        reasons = {
            "on more than one rank each would use its own batch's statistics": world_size > 1,
            "with micro_batch_size each part would use its own": num_parts > 1,
            "with activation_checkpointing they would move twice a step": config.model.activation_checkpointing,
            f"engine.precision {config.engine.precision} would round them": config.engine.precision != "fp32",
        }
        for reason, holds in reasons.items():
            if holds:
                raise InputError(f"model.freeze_batch_norm: false: {reason}; set it to true")

    def require_droppable_patches(self) -> None:
        """Raises InputError for a tower that cannot encode a part of its patches."""
        if not self.visual.can_drop_patches:
            trunk = getattr(self.visual, "trunk", self.visual)
            raise InputError(
                f"objectives.masked_latent: the image tower {type(trunk).__name__} cannot drop patches "
                "(convolutions, relative and rotary positions need the whole image); use a plain ViT of open_clip or "
                "timm, or leave the term out"
            )

    def encode_image(self, image_BCHW: Tensor, visible_BV: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Normalised pixels to (image_BD, patch_BPD or None), unit vectors."""
        out = self.visual(image_BCHW, visible_BV, patches=self.needs.patches)
        return F.normalize(out.image_BD, dim=-1), self._project_patches(out.patch_BPX)

    def _project_patches(self, patch_BPX: Tensor | None) -> Tensor | None:
        if patch_BPX is None or self.patch_projection is None:
            return None
        return F.normalize(self.patch_projection(patch_BPX), dim=-1)

    def encode_texts(self, packed: PackedTexts) -> Tensor:
        """(R, D) unit vectors: one forward a bucket, then the plan's order."""
        features = torch.cat([self.text(tokens) for tokens in packed.bucket_tokens])
        return F.normalize(features[packed.order_R], dim=-1)

    def forward(
        self,
        image_BCHW: Tensor | None,
        packed: PackedTexts | None,
        visible_BV: Tensor | None = None,
        masked_BM: Tensor | None = None,
        predict: bool = True,
    ) -> dict[str, Any]:
        """Normalised pixels, texts and masks to the fields of `Encoded`; None leaves a part out.

        A dictionary, because ZeRO-3's hooks walk dictionaries and not dataclasses. `predict=False` leaves the
        masked-latent parts out (a first pass that only caches features).
        """
        image_BD = patch_BPD = seen_BTW = predicted_BMW = latent_BTW = None
        predict = predict and self.predictor is not None and image_BCHW is not None
        shared = self.needs.share_view
        if image_BCHW is not None and self.needs.contrastive:
            out = self.visual(
                image_BCHW, visible_BV if shared else None, patches=self.needs.patches, latents=shared and predict
            )
            image_BD = F.normalize(out.image_BD, dim=-1)
            patch_BPD, latent_BTW = self._project_patches(out.patch_BPX), out.latent_BTW
        if predict:
            assert self.predictor is not None
            if latent_BTW is None:
                latent_BTW = self.visual(image_BCHW, visible_BV, image=False, latents=True).latent_BTW
            seen_BTW, predicted_BMW = self.predictor(latent_BTW, visible_BV, masked_BM)
        return {
            "image_BD": image_BD,
            "patch_BPD": patch_BPD,
            "text_RD": None if packed is None else self.encode_texts(packed),
            "logit_scale": _at_least_fp32(self.logit_scale).exp(),
            "logit_bias": None if self.logit_bias is None else _at_least_fp32(self.logit_bias) * 1.0,
            "seen_BTW": seen_BTW,
            "predicted_BMW": predicted_BMW,
        }


def _at_least_fp32(parameter: Tensor) -> Tensor:
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))
