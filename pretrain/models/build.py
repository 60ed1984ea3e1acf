"""From a model config to open_clip's model with its weights, its tokenizer and its preprocessing."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn as nn
import transformers
import transformers.dynamic_module_utils
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import ModelConfig
from pretrain.data.tokenize import TextTokenizer
from pretrain.models.open_clip_config import OpenClipConfig, resolve_packages, resolved_spec
from pretrain.models.text_towers import can_trim
from pretrain.models.weights import load_weights

# a config that names code of its own is refused at once, and not asked about on the terminal
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

_DEFAULT_LOGIT_BIAS = -10.0  # SigLIP (Zhai et al. 2023), section 3.2


def build_open_clip(config: ModelConfig, load_pretrained: bool = True, with_logit_bias: bool = False) -> CustomTextCLIP:
    """open_clip's own model, unmodified, on the CPU in fp32; always in its CustomTextCLIP form, in which each tower
    owns its parameters.

    Two attributes are added: `spec`, the `OpenClipConfig` that was built, and `weight_reports`, one of each file read.

    Args:
        load_pretrained: False leaves weights unread that a checkpoint will overwrite. A tiny model never reads any.
        with_logit_bias: keep the bias of the sigmoid loss, a parameter of one element; else `logit_bias` is None.

    Raises InputError for a model that cannot be built and for weights that do not fit it.
    """
    check_quick_gelu(config)
    spec = resolved_spec(config)
    load_pretrained = load_pretrained and not config.tiny
    # an HF text tower starts from its own published weights, unless those of a whole model replace them
    model = _create(config, spec, load_pretrained and config.pretrained is None, with_logit_bias)
    model.spec = spec
    model.weight_reports = load_weights(model, config) if load_pretrained else []
    if not with_logit_bias:
        model.logit_bias = None
    with torch.no_grad():
        if config.init_logit_scale is not None:
            model.logit_scale.fill_(math.log(config.init_logit_scale))
        if with_logit_bias and config.init_logit_bias is not None:
            model.logit_bias.fill_(config.init_logit_bias)
    if config.activation_checkpointing:
        _checkpoint_activations(model)
    return model


def _create(config: ModelConfig, spec: OpenClipConfig, pretrained_text: bool, with_logit_bias: bool) -> CustomTextCLIP:
    model_cfg = resolve_packages(spec.model_cfg)
    if with_logit_bias:
        model_cfg.setdefault("init_logit_bias", _DEFAULT_LOGIT_BIAS)
    document = {"model_cfg": model_cfg, "preprocess_cfg": spec.preprocess_cfg}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(document), encoding="utf-8")
        try:
            model: CustomTextCLIP = open_clip.create_model(
                f"local-dir:{folder}",
                load_weights=False,
                device=torch.get_default_device(),  # meta, where only the structure is asked for
                pretrained_text=pretrained_text,
                # timm's towers take their resolution only so
                force_image_size=model_cfg["vision_cfg"].get("image_size", 224),
                force_custom_text=True,
                nonscalar_logit_scale=True,  # DeepSpeed refuses parameters without dimensions
            )
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
            raise InputError(f"model.name: {config.name} cannot be built: {type(error).__name__}: {error}") from error
    return model.float()  # transformers builds an HF tower in the precision that its weights were saved in


def check_quick_gelu(config: ModelConfig) -> None:
    """Raises InputError for weights trained with QuickGELU in a model with GELU: open_clip only warns."""
    if config.pretrained is None:
        return
    tag = open_clip.get_pretrained_cfg(config.name, config.pretrained)
    if not tag:
        return  # a file or a folder, which does not tell
    wanted = bool(tag.get("quick_gelu", False))
    if wanted != bool(open_clip.get_model_config(config.name).get("quick_gelu", False)):
        other = f"{config.name}-quickgelu" if wanted else config.name.removesuffix("-quickgelu")
        raise InputError(
            f"model.name: the weights {config.pretrained!r} were trained with another activation than {config.name}; "
            f"use model.name: {other}"
        )


def _checkpoint_activations(model: CustomTextCLIP) -> None:
    """Keep the inputs of the blocks alone and compute the rest again in the backward.

    Raises InputError for a tower that cannot.
    """
    refusal = f"model.activation_checkpointing: {type(model.visual).__name__} of this model has none; leave it off"
    if isinstance(model.visual, ModifiedResNet):
        raise InputError(refusal)
    try:
        # open_clip's adapter would swallow timm's refusal
        (model.visual.trunk if isinstance(model.visual, TimmModel) else model.visual).set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise InputError(f"{refusal} ({error})") from error
    if isinstance(model.text, HFTextEncoder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.2x, the old name works to v6
            model.text.transformer.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.text.set_grad_checkpointing(True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' remarks that a new model is new; our own line says what a run starts from."""
    transformers.utils.logging.disable_progress_bar()
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


_TOKENIZER_KWARGS = {"clean", "strip_sep_token", "language"}


def check_tokenizer_kwargs(text_cfg: Mapping[str, Any], source: str) -> None:
    """open_clip hands what it does not know to transformers, where a downloaded config could ask for its own code."""
    if unknown := (text_cfg.get("tokenizer_kwargs") or {}).keys() - _TOKENIZER_KWARGS:
        raise InputError(f"{source}: tokenizer_kwargs {sorted(unknown)} are not taken from a config")


def build_tokenizer(config: ModelConfig, text_tower: nn.Module) -> TextTokenizer:
    """The tokenizer that belongs to the text tower, and whether that tower takes trimmed texts.

    Raises InputError for a tokenizer that cannot be read.
    """
    text_cfg = resolve_packages(resolved_spec(config).model_cfg)["text_cfg"]
    context_length = int(text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH))
    check_tokenizer_kwargs(text_cfg, f"model.name: {config.name}")
    kwargs = text_cfg.get("tokenizer_kwargs") or {}
    ends_apart = True
    if text_cfg.get("hf_tokenizer_name"):
        name = text_cfg["hf_tokenizer_name"]
        mode = text_cfg.get("tokenizer_mode")
        try:
            tokenizer: Any = open_clip.tokenizer.HFTokenizer(
                name, context_length, tokenizer_mode=mode, trust_remote_code=False, **kwargs
            )
        except (OSError, ValueError) as error:
            raise InputError(f"model.name: {config.name}: its tokenizer {name!r} cannot be read: {error}") from error
        pad_id = tokenizer.tokenizer.pad_token_id
        ends_apart = pad_id != tokenizer.tokenizer.eos_token_id
    else:
        tokenizer, pad_id = open_clip.SimpleTokenizer(context_length=context_length, **kwargs), 0
    return TextTokenizer(tokenizer, context_length, int(pad_id), can_trim(text_tower, ends_apart))


def image_px(visual: Any) -> int:
    size = visual.image_size
    return int(size[0] if isinstance(size, tuple | list) else size)


def eval_transform(visual: Any) -> Callable[[Image.Image], Tensor]:
    """open_clip's own inference preprocessing of a tower: picture to normalised (3, px, px)."""
    transform: Callable[[Image.Image], Tensor] = image_transform_v2(
        PreprocessCfg(**visual.preprocess_cfg), is_train=False
    )
    return transform


class PixelNormaliser:
    """uint8 pixels to a tower's input. Outside the engine's module: bf16 would round its constants by 0.3 %."""

    def __init__(self, visual: Any, device: torch.device, dtype: torch.dtype) -> None:
        def channels(name: str) -> Tensor:
            return torch.tensor(visual.preprocess_cfg[name], dtype=torch.float32, device=device).view(1, -1, 1, 1)

        self._mean, self._std, self._dtype = channels("mean"), channels("std"), dtype

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        image = image_BCHW.float().contiguous(memory_format=torch.channels_last)  # convolutions take 0.6 of the time
        return ((image / 255.0 - self._mean) / self._std).to(self._dtype)
