"""Masked latent: the predictor beside the student, and the teachers.

Shapes: B images, P patches, V visible, M masked (V + M = P), W tower width, T teacher width, H predictor width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip.pos_embed import get_2d_sincos_pos_embed
from safetensors.torch import load_file
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import FrozenTeacher, ModelConfig
from pretrain.models.towers import PixelNormaliser, TokenVisionTransformer, build_open_clip, expose_tokens


class _CrossAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_query, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, query_BMH: Tensor, visible_BVH: Tensor) -> Tensor:
        # queries also see each other, so that neighbouring predictions agree (CAE's latent regressor)
        query = self.norm_query(query_BMH)
        context = torch.cat([self.norm_context(visible_BVH), query], dim=1)
        x = query_BMH + self.attention(query, context, context, need_weights=False)[0]
        return x + self.mlp(self.norm_mlp(x))


class LatentPredictor(nn.Module):
    """Predicts the teacher's latents of the masked patches from the student's latents of the visible ones."""

    def __init__(
        self,
        token_width: int,
        teacher_width: int,
        grid: tuple[int, int],
        width: int,
        depth: int,
        heads: int,
        predicts_seen: bool,
    ) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise InputError(
                f"masked_latent: predictor_width {width} must divide by 4 and by predictor_heads ({heads})"
            )
        if grid[0] != grid[1]:
            raise InputError(f"masked_latent: needs a square patch grid, the image tower's is {grid}")
        positions = torch.from_numpy(get_2d_sincos_pos_embed(width, grid[0])).float()
        self.position_PH: Tensor
        self.register_buffer("position_PH", positions, persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.embed = nn.Linear(token_width, width)
        self.blocks = nn.ModuleList(_CrossAttentionBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_teacher = nn.Linear(width, teacher_width)
        self.seen_to_teacher = nn.Linear(token_width, teacher_width) if predicts_seen else None

    def forward(self, latent_BVW: Tensor, visible_BV: Tensor, masked_BM: Tensor) -> tuple[Tensor | None, Tensor]:
        """Latents of class token and visible patches (B, 1 + V, W) to the teacher's space.

        Returns (seen (B, 1 + V, T): class token and visible patches through one linear layer, for a frozen
        teacher only; predicted (B, M, T): the masked patches).
        """
        position_PH = self.position_PH.to(latent_BVW.dtype)
        visible_BVH = self.embed(latent_BVW)
        visible_BVH = torch.cat([visible_BVH[:, :1], visible_BVH[:, 1:] + position_PH[visible_BV]], dim=1)
        x_BMH = self.mask_token + position_PH[masked_BM]
        for block in self.blocks:
            x_BMH = block(x_BMH, visible_BVH)
        seen = None if self.seen_to_teacher is None else self.seen_to_teacher(latent_BVW)
        return seen, self.to_teacher(self.norm(x_BMH))


class Teacher(nn.Module):
    """A ViT that sees the whole image without gradient: fp32, outside the engine, so bf16 cannot round it still."""

    def __init__(self, visual: TokenVisionTransformer) -> None:
        super().__init__()
        self.visual: Any = visual.eval().requires_grad_(False)
        self._normalise: PixelNormaliser | None = None

    @torch.no_grad()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """uint8 pixels to (B, 1 + P, T) final-norm latents, class token first.

        The teacher has a mean, a standard deviation and an input size of its own; the image is brought to them.
        """
        if self._normalise is None:
            self._normalise = PixelNormaliser(self.visual, image_BCHW.device, torch.float32)
        image_BCHW = self._normalise(image_BCHW)
        size = self.visual.image_size
        if tuple(image_BCHW.shape[-2:]) != tuple(size):
            image_BCHW = F.interpolate(image_BCHW, size=tuple(size), mode="bicubic", antialias=True)
        return self.visual(image_BCHW, latents=True)

    @torch.no_grad()
    def follow(self, student: Iterable[tuple[str, Tensor]], momentum: float) -> None:
        """Exponential moving average of the student's full fp32 tensors, named as the teacher's own."""
        own = dict(self.visual.named_parameters())
        for name, tensor in student:
            own[name].lerp_(tensor.to(own[name].device, own[name].dtype), 1.0 - momentum)


def ema_teacher(student: TokenVisionTransformer) -> Teacher:
    """Starts as a copy of the student."""
    return Teacher(copy.deepcopy(student).float())


def frozen_teacher(config: FrozenTeacher, student_grid: tuple[int, int]) -> Teacher:
    """The image tower of a named model. Its patch grid must be the student's."""
    model = build_open_clip(ModelConfig(name=config.name, pretrained=config.pretrained))
    if config.weights_path is not None:
        if not config.weights_path.is_file():
            raise InputError(f"masked_latent.teacher.weights_path: {config.weights_path} does not exist")
        model.load_state_dict(load_file(config.weights_path))
    visual = expose_tokens(model.visual)
    if not isinstance(visual, TokenVisionTransformer):
        raise InputError(f"masked_latent.teacher: {config.name} is no ViT, so its latents do not belong to patches")
    if tuple(visual.grid_size) != student_grid:
        raise InputError(
            f"masked_latent.teacher: {config.name} has a patch grid of {tuple(visual.grid_size)}, the student of "
            f"{student_grid}; choose towers with equal image_size / patch_size"
        )
    return Teacher(visual)
