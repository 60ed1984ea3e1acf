"""Features from inside an image tower of open_clip: what a layer's name stands for, and how it is read out.

    tower       the pooled output, before the projection into the joint space
    block.N     the mean of the patch tokens after block N of a ViT, counted from 0 as in its state dict

Works on open_clip's towers and on those that training gave another forward (pretrain.models.image_towers) alike: what
is read passes through a module of theirs, where a hook finds it.

Shapes: B images, T tokens, W tower width, L width of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from data_prep.errors import InputError
from pretrain.evaluation.interfaces import TOWER, Encoder


@dataclass(frozen=True)
class Tap:
    """Where a layer is read out."""

    module: nn.Module
    is_input: bool  # of the module; else its output
    to_features: Callable[[Tensor], Tensor]  # of what passes there, to (B, L)


def check_layers(encoder: Encoder, layers: Iterable[str]) -> None:
    """Raises InputError, with the layers that there are, for one that the image tower has not."""
    for layer in layers:
        if layer not in encoder.layers:
            numbered = sum(name.startswith("block.") for name in encoder.layers)
            named = ", ".join(name for name in encoder.layers if not name.startswith("block."))
            blocks = f", block.0 to block.{numbered - 1}" if numbered else ""
            raise InputError(f"layer {layer!r}: {encoder.info.name} has {named}{blocks}")


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


def read_layers(visual: nn.Module, image_BCHW: Tensor, taps: Mapping[str, Tap]) -> tuple[Any, dict[str, Tensor]]:
    """What the whole tower gives, and (B, L) of each layer, from one forward."""
    passed: dict[str, Tensor] = {}

    def hook(layer: str, tap: Tap) -> RemovableHandle:
        def keep_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            passed[layer] = inputs[0]

        def keep_output(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            passed[layer] = output

        if tap.is_input:
            return tap.module.register_forward_pre_hook(keep_input)
        return tap.module.register_forward_hook(keep_output)

    with ExitStack() as hooks:
        for layer, tap in taps.items():
            hooks.callback(hook(layer, tap).remove)
        output = visual(image_BCHW)
    return output, {layer: tap.to_features(passed[layer]) for layer, tap in taps.items()}
