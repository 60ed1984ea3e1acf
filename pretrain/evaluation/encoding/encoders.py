"""Any dual encoder by name: a run, a checkpoint of ours, an exported folder, a repository of the Hub, open_clip's own.

All are built by `pretrain.models.build`: weights are read as tensors alone, every value of the model must come from its
file, and no code of a repository runs (`trust_remote_code` stays false). Ours keep training's packed texts; any other
is given texts padded to its context, as open_clip gives them.

Shapes: B images, T texts, D joint width, L width of a layer.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.model import CustomTextCLIP
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import ModelConfig, TrainConfig
from pretrain.data.texts import pack
from pretrain.data.tokenize import TextTokenizer
from pretrain.evaluation.encoding.tower_layers import Tap, check_layers, layer_taps, read_layers
from pretrain.evaluation.interfaces import JOINT
from pretrain.evaluation.results import ModelInfo
from pretrain.models.build import build_open_clip, build_tokenizer, eval_transform, image_px
from pretrain.models.dual_encoder import DualEncoder
from pretrain.models.open_clip_config import FOLDER_PREFIX, HUB_PREFIX
from pretrain.models.weights import read_state_dict
from pretrain.train.checkpoint import checkpoint_config, list_checkpoints
from pretrain.train.retention import read_meta, step_of
from pretrain.train.state import build_dual_encoder

_TEXTS_PER_BATCH = 64
_MOST_NAMES = 5  # suggested in a message
_FORMS = (
    "a run, a checkpoint, an exported folder, local-dir:FOLDER, hf-hub:ORG/NAME, or open_clip's MODEL/TAG such as "
    "ViT-B-16/openai"
)

Kind = Literal["checkpoint", "export", "open_clip", "hub"]


@dataclass(eq=False)
class OpenClipEncoder:
    """`interfaces.Encoder` over open_clip's towers, or training's form of them."""

    info: ModelInfo
    model: DualEncoder | CustomTextCLIP
    tokenizer: TextTokenizer
    transform: Callable[[Image.Image], Tensor]  # open_clip's inference preprocessing
    device: torch.device

    @property
    def logit_scale(self) -> float:
        """exp of the parameter."""
        return float(self.model.logit_scale.detach().exp())

    @cached_property
    def _taps(self) -> dict[str, Tap]:
        return layer_taps(self.model.visual)

    @property
    def layers(self) -> tuple[str, ...]:
        """`joint`, and what tower_layers.py names."""
        return (JOINT, *self._taps)

    def encode_pixels(self, image_BCHW: Tensor, layer: str = JOINT) -> Tensor:
        """(B, D) unit vectors for `joint`, else (B, L); float32, on the CPU.

        image_BCHW: what `transform` gives. Raises InputError for a layer that the tower has not.
        """
        return self.encode_layers(image_BCHW, (layer,))[layer]

    @torch.no_grad()
    def encode_layers(self, image_BCHW: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """As `encode_pixels`, of several layers from one forward."""
        check_layers(self, layers)
        taps = {layer: self._taps[layer] for layer in layers if layer != JOINT}
        output, of_layer = read_layers(self.model.visual, image_BCHW.to(self.device, non_blocking=True), taps)
        if JOINT in layers:
            of_layer[JOINT] = F.normalize(_first(output), dim=-1)
        return {layer: of_layer[layer].float().cpu() for layer in layers}

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(T, D) unit vectors. Raises InputError for no text."""
        if not texts:
            raise InputError("no text to encode")
        tokens = self.tokenizer.encode(texts)
        by_length = np.argsort([len(ids) for ids in tokens], kind="stable")
        edges = (self.tokenizer.context_length,)
        features: Tensor | None = None
        for start in range(0, len(texts), _TEXTS_PER_BATCH):  # neighbours in length share a batch: little is padded
            chosen = by_length[start : start + _TEXTS_PER_BATCH]
            packed = pack([tokens[i] for i in chosen], edges, self.tokenizer.pad_id, self.tokenizer.can_trim)
            packed = packed.to(self.device)
            encoded = torch.cat([_first(self.model.text(ids)) for ids in packed.bucket_tokens])[packed.order_R]
            text_TD = F.normalize(encoded, dim=-1).float().cpu()
            features = text_TD.new_empty(len(texts), text_TD.shape[1]) if features is None else features
            features[torch.from_numpy(chosen)] = text_TD
        assert features is not None
        return features.numpy()


def _first(output: Any) -> Tensor:
    """The pooled feature: CoCa's towers, and training's, give tokens beside it."""
    pooled: Tensor = output if isinstance(output, Tensor) else output[0]
    return pooled


# ------------------------------------------------------------------------------------------------------- by its name


def load_encoder(name: str | Path) -> OpenClipEncoder:
    """A run (its newest checkpoint), one checkpoint, RUN/checkpoints/best, an exported folder, `local-dir:FOLDER`,
    `hf-hub:ORG/NAME`, or open_clip's `MODEL/TAG` (`MODEL:TAG`); in eval mode, in fp32, on the GPU where there is one.

    Raises InputError for a name that leads nowhere (with the nearest that open_clip knows), an architecture without
    weights, a torn checkpoint, and weights that are not the model's.
    """
    text = str(name)
    if text.startswith(HUB_PREFIX):
        return _pretrained(text, text, text, "hub")
    if text.startswith(FOLDER_PREFIX):
        return _exported(Path(text.removeprefix(FOLDER_PREFIX)), text)
    path = Path(name)
    if is_best(path):
        return _trained(find_checkpoint(path), text)
    if not path.exists():
        return _named(text)
    if not path.is_dir():
        raise InputError(f"{path}: a file; a model is {_FORMS}")
    if (path / "open_clip_config.json").is_file():
        return _exported(path, text)
    return _trained(find_checkpoint(path), text)


def find_checkpoint(run_or_checkpoint: Path) -> Path:
    """The checkpoint itself, the newest of a run, or for RUN/checkpoints/best the best by validation.

    Raises InputError where there is none.
    """
    if is_best(run_or_checkpoint):
        return _best_checkpoint(run_or_checkpoint.absolute().parents[1])
    if (run_or_checkpoint / "meta.json").is_file():
        return run_or_checkpoint
    checkpoints = list_checkpoints(run_or_checkpoint)
    if not checkpoints:
        raise InputError(f"{run_or_checkpoint}: no checkpoint here; train with `dermvlp train CONFIG` first")
    return checkpoints[-1]


def is_best(path: Path) -> bool:
    """RUN/checkpoints/best, whatever the working directory."""
    path = path.absolute()
    return path.name == "best" and path.parent.name == "checkpoints" and path.parent.is_dir()


def _best_checkpoint(run_dir: Path) -> Path:
    checkpoints = {step_of(path): path for path in list_checkpoints(run_dir)}
    step = read_meta(checkpoints[max(checkpoints)])["record"]["best_step"] if checkpoints else None
    if step is None:
        raise InputError(f"{run_dir}: no validation has chosen a best checkpoint (validation.every in its config)")
    if step not in checkpoints:
        raise InputError(f"{run_dir}: step {step} was the best, and its checkpoint is not kept (checkpoint.keep_best)")
    return checkpoints[step]


def untrained_encoder(config: TrainConfig) -> OpenClipEncoder:
    """The model that a run starts from."""
    return _ours(config, build_dual_encoder(config), f"untrained {config.model.name}")


def _trained(checkpoint: Path, name: str) -> OpenClipEncoder:
    try:
        config = checkpoint_config(checkpoint)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{checkpoint / 'meta.json'}: {where}: {first['msg']}; of another version of dermvlp"
        ) from None
    model = build_dual_encoder(config, load_pretrained=False)
    path = checkpoint / "model.safetensors"
    state = read_state_dict(path, str(checkpoint))
    try:
        model.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("predictor.")})
    except RuntimeError as error:
        raise InputError(f"{path}: not the weights of the model in {checkpoint / 'model.json'}: {error}") from None
    return _ours(config, model, name)


def _exported(folder: Path, name: str) -> OpenClipEncoder:
    if not folder.is_dir():
        raise InputError(f"{name}: no such folder; `dermvlp export RUN FOLDER` writes one")
    source = f"{FOLDER_PREFIX}{folder}"
    return _pretrained(name, source, source, "export")


def _named(name: str) -> OpenClipEncoder:
    known = open_clip.list_models()
    model, tag = _split(name)
    if model not in known:
        lower = {other.lower(): other for other in known}
        near = difflib.get_close_matches(model.lower(), list(lower), _MOST_NAMES, cutoff=0.6)
        hint = f"; the nearest of open_clip's: {', '.join(lower[other] for other in near)}" if near else ""
        raise InputError(f"{name}: no such folder, and no model of open_clip{hint}; a model is {_FORMS}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not tag:
        raise InputError(f"{name}: an architecture without weights; give {model}/TAG, with one of: {', '.join(tags)}")
    weights = open_clip.get_pretrained_cfg(model, tag)
    if not weights:
        raise InputError(f"{name}: open_clip has no weights {tag!r} of {model}; it has: {', '.join(tags) or 'none'}")
    return _pretrained(name, _with_activation(model, bool(weights.get("quick_gelu"))), tag, "open_clip")


def _split(name: str) -> tuple[str, str]:
    """(model, tag or ""): ViT-B-16/openai, ViT-B-16:openai, ViT-B/16:openai, ViT-B-16."""
    if name.replace("/", "-") in open_clip.list_models():
        return name.replace("/", "-"), ""
    model, found, tag = name.rpartition(":" if ":" in name else "/")
    return (model.replace("/", "-"), tag) if found else (name, "")


def _with_activation(model: str, quick_gelu: bool) -> str:
    """The form of an architecture that the weights were trained in: open_clip names each, and only warns."""
    if quick_gelu == bool((open_clip.get_model_config(model) or {}).get("quick_gelu")):
        return model
    return f"{model}-quickgelu" if quick_gelu else model.removesuffix("-quickgelu")


# ------------------------------------------------------------------------------------------------------------- built


def _pretrained(name: str, model_name: str, weights: str, kind: Kind) -> OpenClipEncoder:
    config = ModelConfig(name=model_name, pretrained=weights)
    try:
        model = build_open_clip(config)
        tokenizer = build_tokenizer(config, model.text)
    except InputError as error:
        problem = str(error).split("\n  remedy:")[0]  # which speaks of a training config
        raise InputError(f"model {name}: {problem}") from None
    except KeyError as error:
        raise InputError(f"model {name}: its open_clip_config.json has no {error}") from None
    tokenizer.can_trim = False  # padded to its context, as open_clip does
    return as_encoder(model, tokenizer, name, kind)


def _ours(config: TrainConfig, model: DualEncoder, name: str) -> OpenClipEncoder:
    return as_encoder(model, build_tokenizer(config.model, model.text), name, "checkpoint")


def as_encoder(model: DualEncoder | CustomTextCLIP, tokenizer: TextTokenizer, name: str, kind: Kind) -> OpenClipEncoder:
    """A model of `build_open_clip` or `build_dual_encoder` and what belongs to it; on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    info = ModelInfo(
        name=name,
        kind=kind,
        digest=model_digest(model),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        image_px=image_px(model.visual),
        embed_dim=int(model.spec.model_cfg["embed_dim"]),
    )
    return OpenClipEncoder(info, model.to(device).eval(), tokenizer, eval_transform(model.visual), device)


def model_digest(model: DualEncoder | CustomTextCLIP) -> str:
    """SHA-256 of both towers' weights and of what else makes image features what they are (the image tower's config,
    its preprocessing, the activation), first 16 hex digits. A checkpoint and its export have the same."""
    vision_cfg = {key: value for key, value in model.spec.model_cfg["vision_cfg"].items() if "pretrained" not in key}
    settings = [vision_cfg, model.visual.preprocess_cfg, bool(model.spec.model_cfg.get("quick_gelu"))]
    sha256 = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("visual.", "text.", "logit_scale")):  # neither predictor nor patch projection
            flat = tensor.detach().cpu().reshape(-1)  # training gives the scale a dimension that open_clip does not
            sha256.update(f"{name} {flat.dtype} {len(flat)}\n".encode())
            sha256.update(memoryview(flat.contiguous().view(torch.uint8).numpy()))
    return sha256.hexdigest()[:16]
