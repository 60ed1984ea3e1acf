"""Masked latent: the predictor beside the student, and the teachers.

Shapes: B images, P patches, V visible, M masked (V + M = P), N prefix tokens (class, registers), C = 1 where student
and teacher have a class token and else 0, W student width, T teacher width, H predictor width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import FrozenTeacher, MaskedLatentObjective, ModelConfig, TowerConfig
from pretrain.models.build import PixelNormaliser, build_open_clip, image_px
from pretrain.models.image_towers import expose_tokens


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
    """Predicts the teacher's latents of the masked patches from the student's latents of the visible ones.

    Args:
        student: the `ImageTower` that is trained: its width, prefix tokens and patch grid.
        teacher: what the latents are compared with: its width, and whether it has a class token.
        predicts_seen: compare what the student saw too, through one linear layer (frozen teachers).

    Raises InputError for a width that positions or heads do not fit into.
    """

    def __init__(self, student: Any, teacher: Teacher, width: int, depth: int, heads: int, predicts_seen: bool) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise InputError(
                f"masked_latent: predictor_width {width} must divide by 4 and by predictor_heads ({heads})"
            )
        self._num_prefix = int(student.num_prefix_tokens)
        self._num_class = int(student.has_class_token and teacher.has_class_token)
        self.position_PH: Tensor
        self.register_buffer("position_PH", build_sincos2d_pos_embed(list(student.grid_size), width), persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.embed = nn.Linear(student.token_width, width)
        self.blocks = nn.ModuleList(_CrossAttentionBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_teacher = nn.Linear(width, teacher.token_width)
        self.seen_to_teacher = nn.Linear(student.token_width, teacher.token_width) if predicts_seen else None

    def forward(self, latent_BLW: Tensor, visible_BV: Tensor, masked_BM: Tensor) -> tuple[Tensor | None, Tensor]:
        """Latents of prefix tokens and visible patches (L = N + V) to the teacher's space.

        Returns (seen (B, C + V, T): class token and visible patches, None unless `predicts_seen`; predicted (B, M, T):
        the masked patches).
        """
        position_PH = self.position_PH.to(latent_BLW.dtype)
        context_BLH = self.embed(latent_BLW)
        prefix, visible = context_BLH[:, : self._num_prefix], context_BLH[:, self._num_prefix :]
        context_BLH = torch.cat([prefix, visible + position_PH[visible_BV]], dim=1)
        x_BMH = self.mask_token + position_PH[masked_BM]
        for block in self.blocks:
            x_BMH = block(x_BMH, context_BLH)
        seen = None
        if self.seen_to_teacher is not None:
            latents = [latent_BLW[:, : self._num_class], latent_BLW[:, self._num_prefix :]]
            seen = self.seen_to_teacher(
                torch.cat(latents, dim=1) if self._num_prefix != self._num_class else latent_BLW
            )
        return seen, self.to_teacher(self.norm(x_BMH))


def build_predictor(student: Any, teacher: Teacher, objective: MaskedLatentObjective) -> LatentPredictor:
    """The predictor that a masked-latent objective asks for."""
    return LatentPredictor(
        student,
        teacher,
        objective.predictor_width,
        objective.predictor_depth,
        objective.predictor_heads,
        predicts_seen=isinstance(objective.teacher, FrozenTeacher),
    )


class Teacher(nn.Module):
    """An image tower that sees the whole image without gradient: fp32, outside the engine, so bf16 cannot round it
    still.

    Args:
        visual: an `ImageTower`; it is frozen.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual: Any = visual.eval().requires_grad_(False)
        self.compute_dtype = torch.float32  # bfloat16: the forward under autocast, the weights as they are
        self._normalise: PixelNormaliser | None = None

    @property
    def token_width(self) -> int:
        return int(self.visual.token_width)

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.visual.num_prefix_tokens)

    @property
    def has_class_token(self) -> bool:
        return bool(self.visual.has_class_token)

    @torch.no_grad()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """uint8 pixels to (B, N + P, T) final-norm latents, prefix tokens first, the class token before registers.

        The teacher has a mean, a standard deviation and an input size of its own; the image is brought to them.
        """
        if self._normalise is None:
            self._normalise = PixelNormaliser(self.visual, image_BCHW.device, next(self.visual.parameters()).dtype)
        image_BCHW = self._normalise(image_BCHW)
        px = image_px(self.visual)
        if tuple(image_BCHW.shape[-2:]) != (px, px):
            image_BCHW = F.interpolate(image_BCHW, size=(px, px), mode="bicubic", antialias=True)
        in_fp32 = self.compute_dtype == torch.float32
        with torch.autocast(image_BCHW.device.type, self.compute_dtype, enabled=not in_fp32):
            latent_BTW: Tensor = self.visual(image_BCHW, image=False, latents=True).latent_BTW
        return latent_BTW

    @torch.no_grad()
    def follow(self, student: Iterable[tuple[str, Tensor]], momentum: float) -> None:
        """Exponential moving average of the student's full fp32 tensors, named as the teacher's own."""
        own = dict(self.visual.named_parameters())
        for name, tensor in student:
            own[name].lerp_(tensor.to(own[name].device, own[name].dtype), 1.0 - momentum)


def ema_teacher(student: nn.Module) -> Teacher:
    """Starts as a copy of the student's image tower."""
    return Teacher(copy.deepcopy(student).float())


def frozen_teacher(config: FrozenTeacher, student_grid: tuple[int, int]) -> Teacher:
    """The image tower of a named model; the rest of that model is let go.

    Where `image_size` is not given and the tower's patch grid is not the student's, the tower is built at the
    resolution at which it is, its position embeddings interpolated.

    Raises InputError for a tower that cannot have the student's grid.
    """
    visual = _build_visual(config, config.image_size)
    rows, columns = visual.grid_size
    if (rows, columns) != student_grid and config.image_size is None and len(set(student_grid)) == 1:
        visual = _build_visual(config, image_px(visual) // rows * student_grid[0])
    if tuple(visual.grid_size) != student_grid:
        raise InputError(
            f"masked_latent.teacher: {config.name} has a patch grid of {tuple(visual.grid_size)} at {image_px(visual)} "
            f"px, the student of {student_grid}; set masked_latent.teacher.image_size or model.image_size so that "
            "image_size / patch size is the same for both"
        )
    return Teacher(visual)


def _build_visual(config: FrozenTeacher, image_size: int | None) -> Any:
    model = ModelConfig(
        name=config.name,
        pretrained=config.pretrained,
        image_size=image_size,
        image=TowerConfig(weights=config.weights),
        tiny=config.tiny,
    )
    try:
        return expose_tokens(build_open_clip(model).visual)
    except InputError as error:
        raise InputError(f"masked_latent.teacher: {error}") from error
