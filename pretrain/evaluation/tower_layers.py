"""Features from inside an image tower of open_clip: what a layer's name stands for, and how it is read out.

    tower       the pooled output, before the projection into the joint space
    block.N     the mean of the patch tokens after block N of a ViT, counted from 0 as in its state dict

Works on open_clip's towers and on those that training gave another forward (pretrain.models.image_towers) alike: what
is read passes through a module of theirs, where a hook finds it.

Shapes: B images, T tokens, W tower width, L width of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor

from pretrain.evaluation.interfaces import TOWER


@dataclass(frozen=True)
class Tap:
    """Where a layer is read out."""

    module: nn.Module
    is_input: bool  # of the module; else its output
    to_features: Callable[[Tensor], Tensor]  # of what passes there, to (B, L)


def layer_taps(visual: nn.Module) -> dict[str, Tap]:
    """The layers of an image tower by name; none for a kind of tower that open_clip does not have."""
    if isinstance(visual, VisionTransformer):
        tower: Any = visual
        taps = {TOWER: Tap(tower.transformer, False, lambda token_BTW: tower._pool(token_BTW)[0])}
        return taps | _blocks(tower.transformer.resblocks, num_prefix_tokens=1)
    if isinstance(visual, TimmModel):
        return _timm_taps(visual)
    if isinstance(visual, ModifiedResNet):  # its attention pooling is the projection
        return {TOWER: Tap(visual.attnpool, True, _mean_of_places)}
    return {}


def _timm_taps(visual: TimmModel) -> dict[str, Tap]:
    trunk: Any = visual.trunk
    head = dict(visual.head.named_children())
    projection = head.get("proj", head.get("mlp"))
    if projection is not None:
        tower = Tap(projection, True, _one_vector)
    elif "pool" in head:  # an attention pooling that projects
        tower = Tap(head["pool"], True, _mean_of_places)
    else:  # the trunk's own classifier is the projection; without one (SigLIP) its pooled output is the joint feature
        tower = Tap(trunk.get_classifier(), True, _one_vector)
    blocks = getattr(trunk, "blocks", None)
    if not hasattr(trunk, "num_prefix_tokens") or not isinstance(blocks, nn.Sequential | nn.ModuleList):
        return {TOWER: tower}  # no ViT
    return {TOWER: tower} | _blocks(list(blocks), trunk.num_prefix_tokens)


def _blocks(blocks: Sequence[nn.Module], num_prefix_tokens: int) -> dict[str, Tap]:
    def mean_of_patches(x: Tensor) -> Tensor:  # (B, T, W), or a grid of tokens (B, H, W', W)
        return x.flatten(1, -2)[:, num_prefix_tokens:].mean(dim=1)

    return {f"block.{number}": Tap(block, False, mean_of_patches) for number, block in enumerate(blocks)}


def _mean_of_places(map_BWHW: Tensor) -> Tensor:
    return map_BWHW.mean(dim=(2, 3))


def _one_vector(x: Tensor) -> Tensor:
    """(B, L), also where a classifier by convolution takes (B, L, 1, 1)."""
    return x.flatten(1)


def read_layer(visual: nn.Module, image_BCHW: Tensor, tap: Tap) -> Tensor:
    """(B, L) from one forward of the whole tower."""
    passed: list[Tensor] = []

    def keep_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        passed.append(inputs[0])

    def keep_output(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        passed.append(output)

    if tap.is_input:
        handle = tap.module.register_forward_pre_hook(keep_input)
    else:
        handle = tap.module.register_forward_hook(keep_output)
    try:
        visual(image_BCHW)
    finally:
        handle.remove()
    return tap.to_features(passed[-1])
