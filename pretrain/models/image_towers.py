"""Image towers of open_clip with what their own forwards hide: patch features, latents, a part of the patches.

A tower keeps open_clip's parameters and names, so weights move both ways without a key map; only its class is
replaced by a subclass with another `forward`. (A wrapper around it would use parameters outside the forward of
the module that owns them, which ZeRO-3 gathers for that forward alone.)

Shapes: B images, P patches, V visible patches, T = prefix tokens + patches, W tower width, D joint embedding width,
X = D or W.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn as nn
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import PatchEmbed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor

from data_prep.errors import InputError


class ImageTower(Protocol):
    """What training asks of an image tower."""

    token_width: int  # W
    num_prefix_tokens: int  # class and register tokens that stand before the patches
    has_class_token: bool  # then it stands first
    grid_size: tuple[int, int]  # of patches, rows and columns; P is their product, row by row
    #: patch features come out in the joint space; False where the pooling is not linear (attention)
    has_linear_pooling: bool
    #: can encode a part of its patches; a convolution cannot
    can_drop_patches: bool

    def forward(
        self,
        image_BCHW: Tensor,
        visible_BV: Tensor | None = None,
        image: bool = True,
        patches: bool = False,
        latents: bool = False,
    ) -> TowerOutput:
        """Normalised pixels to what is asked for, all from one pass; `visible_BV`: over those patches alone."""


class TowerOutput(NamedTuple):
    """None where it was not asked for. With visible_BV the patches are the visible ones, in its order."""

    image_BD: Tensor | None = None
    patch_BPX: Tensor | None = None  # (B, P, D) in the joint space, or (B, P, W) where pooling is not linear
    latent_BTW: Tensor | None = None  # after the final norm, prefix tokens first


def _keep_visible(token_BTW: Tensor, visible_BV: Tensor | None, num_prefix: int) -> Tensor:
    """The prefix tokens and the visible patches."""
    if visible_BV is None:
        return token_BTW
    index_BVW = (visible_BV + num_prefix).unsqueeze(-1).expand(-1, -1, token_BTW.shape[-1])
    kept_BVW = token_BTW.gather(1, index_BVW)
    return torch.cat([token_BTW[:, :num_prefix], kept_BVW], dim=1) if num_prefix else kept_BVW


class TokenVisionTransformer(VisionTransformer):
    """open_clip's ViT."""

    num_prefix_tokens = 1
    has_class_token = True
    can_drop_patches = True

    @property
    def has_linear_pooling(self) -> bool:
        return self.attn_pool is None

    @property
    def token_width(self) -> int:
        return int(self.conv1.out_channels)

    def forward(
        self,
        image_BCHW: Tensor,
        visible_BV: Tensor | None = None,
        image: bool = True,
        patches: bool = False,
        latents: bool = False,
    ) -> TowerOutput:
        # positions first, then fewer patches; the class token joins those that stay
        token_BTW = self.conv1(image_BCHW).flatten(2).transpose(1, 2) + self.positional_embedding[1:]
        token_BTW = _keep_visible(token_BTW, visible_BV, num_prefix=0)
        class_B1W = (self.class_embedding + self.positional_embedding[0]).expand(len(token_BTW), 1, -1)
        x_BTW = self.transformer(self.ln_pre(torch.cat([class_B1W, token_BTW], dim=1)))
        image_BD = self._pool(x_BTW)[0] @ self.proj if image else None
        if not patches and not latents:
            return TowerOutput(image_BD)
        # an attention pooling norms the tokens itself; ln_post then norms what it pooled
        latent_BTW = (self.ln_post if self.has_linear_pooling else self.attn_pool.ln_k)(x_BTW)
        patch_BPX = None
        if patches:
            patch_BPX = latent_BTW[:, 1:] @ self.proj if self.has_linear_pooling else latent_BTW[:, 1:]
        return TowerOutput(image_BD, patch_BPX, latent_BTW if latents else None)


class TokenTimmModel(TimmModel):
    """open_clip's adapter of a timm tower: a feature map's places, or a ViT's tokens, are its patches."""

    token_width: int
    num_prefix_tokens: int
    has_class_token: bool
    grid_size: tuple[int, int]
    can_drop_patches: bool
    _layout: str  # of the trunk's features: NLC, NCHW or NHWC

    @property
    def has_linear_pooling(self) -> bool:
        return getattr(self.trunk, "attn_pool", None) is None and not hasattr(self.head, "pool")

    def forward(
        self,
        image_BCHW: Tensor,
        visible_BV: Tensor | None = None,
        image: bool = True,
        patches: bool = False,
        latents: bool = False,
    ) -> TowerOutput:
        features = self._features(image_BCHW, visible_BV)
        image_BD = self.head(self.trunk.forward_head(features)) if image else None
        if not patches and not latents:
            return TowerOutput(image_BD)
        token_BTW = self._tokens(features)
        patch_BPX = None
        if patches:
            patch_BPX = token_BTW[:, self.num_prefix_tokens :]
            patch_BPX = self._project(patch_BPX) if self.has_linear_pooling else self._norm(patch_BPX)
        return TowerOutput(image_BD, patch_BPX, self._norm(token_BTW) if latents else None)

    def _features(self, image_BCHW: Tensor, visible_BV: Tensor | None) -> Tensor:
        """The trunk's `forward_features`, with the patches dropped where timm's own patch dropout stands."""
        trunk: Any = self.trunk
        if visible_BV is None:
            return cast(Tensor, trunk.forward_features(image_BCHW))
        if not self.can_drop_patches:
            raise ValueError(f"{type(trunk).__name__} cannot drop patches")
        x_BTW = trunk._pos_embed(trunk.patch_embed(image_BCHW))
        x_BTW = trunk.norm_pre(_keep_visible(x_BTW, visible_BV, self.num_prefix_tokens))
        x_BTW = checkpoint_seq(trunk.blocks, x_BTW) if trunk.grad_checkpointing else trunk.blocks(x_BTW)
        return cast(Tensor, trunk.norm(x_BTW))

    def _tokens(self, features: Tensor) -> Tensor:
        if self._layout == "NCHW":
            return features.flatten(2).transpose(1, 2)
        return features.flatten(1, 2) if self._layout == "NHWC" else features

    def _norm(self, token_BTW: Tensor) -> Tensor:
        """A ViT with mean pooling norms after it (`fc_norm`) and leaves its tokens as they are."""
        norm = getattr(self.trunk, "fc_norm", None)
        return token_BTW if norm is None else norm(token_BTW)

    def _project(self, patch_BPW: Tensor) -> Tensor:
        """Patches to the joint space, through what pooled features pass."""
        if self._layout == "NLC":
            dropped = self.trunk.head_drop(self._norm(patch_BPW))
            return cast(Tensor, self.head(self.trunk.head(dropped)))
        # each place as a 1 x 1 map: the head's own pooling, norm and projection, applied to it alone
        batch, num_patches, width = patch_BPW.shape
        shape = (-1, width, 1, 1) if self._layout == "NCHW" else (-1, 1, 1, width)
        pooled = self.trunk.forward_head(patch_BPW.reshape(shape))
        return cast(Tensor, self.head(pooled)).reshape(batch, num_patches, -1)


class TokenModifiedResNet(ModifiedResNet):
    """CLIP's ResNet: its patches are the places of the map that the attention pooling reads."""

    num_prefix_tokens = 0
    has_class_token = False
    has_linear_pooling = False
    can_drop_patches = False

    @property
    def token_width(self) -> int:
        return int(self.attnpool.k_proj.in_features)

    @property
    def grid_size(self) -> tuple[int, int]:
        side = math.isqrt(len(self.attnpool.positional_embedding) - 1)
        return side, side

    def forward(
        self,
        image_BCHW: Tensor,
        visible_BV: Tensor | None = None,
        image: bool = True,
        patches: bool = False,
        latents: bool = False,
    ) -> TowerOutput:
        if visible_BV is not None:
            raise ValueError("ModifiedResNet cannot drop patches")
        features = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(image_BCHW)))))
        image_BD = self.attnpool(features) if image else None
        token_BPW = features.flatten(2).transpose(1, 2) if patches or latents else None
        return TowerOutput(image_BD, token_BPW if patches else None, token_BPW if latents else None)


_CLASSES: dict[type, type] = {
    VisionTransformer: TokenVisionTransformer,
    TimmModel: TokenTimmModel,
    ModifiedResNet: TokenModifiedResNet,
}


def expose_tokens(visual: nn.Module) -> TokenVisionTransformer | TokenTimmModel | TokenModifiedResNet:
    """Turn an open_clip image tower into an `ImageTower`, in place.

    Raises InputError for a tower without a token or place for each part of the image.
    """
    if type(visual) not in _CLASSES:
        raise InputError(f"model.name: image tower {type(visual).__name__} is none of open_clip's")
    _refuse_patch_dropout(visual)
    if type(visual) is VisionTransformer and visual.pool_type == "none":
        raise InputError(
            "model.name: vision_cfg.pool_type 'none' (and attentional_pool 'parallel' or 'cascade') gives no single "
            "image feature in open_clip; use 'tok' or 'avg'"
        )
    visual.__class__ = _CLASSES[type(visual)]
    if isinstance(visual, TokenTimmModel):
        _describe(visual)
    return cast(TokenVisionTransformer | TokenTimmModel | TokenModifiedResNet, visual)


def _refuse_patch_dropout(visual: nn.Module) -> None:
    dropout = getattr(visual, "patch_dropout", None), getattr(getattr(visual, "trunk", None), "patch_drop", None)
    if any(not isinstance(module, nn.Identity | None) for module in dropout):
        raise InputError("model.name: vision_cfg.patch_dropout loses track of which patch is where; remove it")


def _describe(tower: TokenTimmModel) -> None:
    """What the trunk's features are, read off their shape.

    Raises InputError for features that are neither a map nor a grid of tokens.
    """
    trunk: Any = tower.trunk
    shape = _feature_shape(tower)
    tower.num_prefix_tokens, tower.has_class_token = 0, False
    if len(shape) == 4:
        tower._layout = str(getattr(trunk, "output_fmt", "NCHW"))
        tower.token_width = shape[tower._layout.index("C")]
        tower.grid_size = shape[tower._layout.index("H")], shape[tower._layout.index("W")]
        is_clear = tower.token_width == trunk.num_features
    else:
        tower._layout, tower.token_width = "NLC", shape[-1]
        tower.num_prefix_tokens = int(getattr(trunk, "num_prefix_tokens", 0))
        tower.has_class_token = tower.num_prefix_tokens > 0 and getattr(trunk, "cls_token", None) is not None
        tower.grid_size = tuple(getattr(getattr(trunk, "patch_embed", None), "grid_size", (0, 0)))
        is_clear = len(shape) == 3 and shape[1] == tower.num_prefix_tokens + math.prod(tower.grid_size)
    if not is_clear:
        raise InputError(
            f"model.name: timm tower {type(trunk).__name__} gives features of shape {tuple(shape)}: no map, and no "
            f"token for each patch ({tower.num_prefix_tokens} prefix tokens, grid {tower.grid_size}); use another tower"
        )
    # a stem of overlapping convolutions sees its neighbours, and a table of relative positions wants all patches
    tower.can_drop_patches = type(trunk) is TimmVisionTransformer and type(trunk.patch_embed) is PatchEmbed


class _Shapes(nn.Module):
    """The trunk's features and what open_clip makes of them, as one forward, which `functional_call` needs."""

    def __init__(self, tower: TokenTimmModel) -> None:
        super().__init__()
        self.tower: Any = tower

    def forward(self, image_BCHW: Tensor) -> tuple[Any, Tensor]:
        features = self.tower.trunk.forward_features(image_BCHW)
        return features, self.tower.head(self.tower.trunk.forward_head(features))


@torch.no_grad()
def _feature_shape(tower: TokenTimmModel) -> torch.Size:
    """Of one image's features: worked out on the meta device, so that nothing is computed.

    Raises InputError for a tower that open_clip's adapter cannot run, or that gives more than one image feature.
    """
    name, was_training = type(tower.trunk).__name__, tower.training
    state = {**dict(tower.named_parameters()), **dict(tower.named_buffers())}
    on_meta = {f"tower.{name}": torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    image_BCHW = torch.zeros(1, 3, *tower.image_size, device="meta", dtype=next(tower.parameters()).dtype)
    try:
        features, image_BD = torch.func.functional_call(_Shapes(tower).eval(), on_meta, (image_BCHW,))
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(
            f"model.name: timm tower {name} does not run behind open_clip's adapter, on images of "
            f"{tuple(tower.image_size)} px: {error}"
        ) from error
    finally:
        tower.train(was_training)
    if not isinstance(features, Tensor):
        raise InputError(f"model.name: timm tower {name} gives several feature maps; use another tower")
    if image_BD.ndim != 2:
        raise InputError(
            f"model.name: timm tower {name} gives image features of shape {tuple(image_BD.shape)}, not one vector; set "
            "vision_cfg.timm_pool"
        )
    return features.shape
