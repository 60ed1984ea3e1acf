"""Published weights into a model: read, renamed, interpolated where the grid differs, and accounted for.

Files hold tensors and nothing else: safetensors, or torch files read with `weights_only=True`.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP, convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import ModelConfig, Weights
from pretrain.models.key_maps import (
    KEY_MAPS,
    State,
    has_class_position,
    hf_clip,
    hf_siglip,
    timm_to_open_clip,
    timm_to_trunk,
    under,
)
from pretrain.models.layers import projection_names
from pretrain.models.open_clip_config import PACKAGE_PREFIX, package_file

_MAX_NAMES = 12  # of one list in the log
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")  # open_clip, CAE and MAE, DeepSpeed, others
_HUGGING_FACE = {"vision_model.embeddings.class_embedding": hf_clip, "vision_model.head.probe": hf_siglip}
_NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's state dicts

TowerName = Literal["model", "image", "text"]


@dataclass(frozen=True)
class WeightReport:
    """What of one file went into one tower (or, `model`, into both), by the tower's own names."""

    source: str
    tower: TowerName
    num_loaded: int  # tensors
    #: share of the tower's values that came from the file; of one tower without its projection into the joint space
    share_loaded: float
    missing: tuple[str, ...]  # not in the file, the projection included
    unexpected: tuple[str, ...]  # in the file, without a place in the tower
    other_shapes: tuple[str, ...]  # "name (file's shape, tower's shape)"; they keep their start
    interpolated: tuple[str, ...]  # position and patch embeddings of another grid

    @property
    def where(self) -> str:
        return "model" if self.tower == "model" else f"{self.tower} tower"

    def lines(self) -> list[str]:
        """For the log: what was loaded, and a line a kind of key that was not simply copied."""
        share = f"{self.num_loaded} tensors, {self.share_loaded:.4%} of its values"
        lists = {
            "interpolated": self.interpolated,
            "not in the file": self.missing,
            "other shape": self.other_shapes,
            "in the file only": self.unexpected,
        }
        return [
            f"weights of the {self.where} from {self.source}: {share}",
            *(f"  {kind} ({len(names)}): {_some(names)}" for kind, names in lists.items() if names),
        ]


def load_weights(model: CustomTextCLIP, config: ModelConfig) -> list[WeightReport]:
    """Load `config.pretrained` into the model, then each tower's own weights over it; a report a file.

    Raises InputError for a file that cannot be found or read, and where more of the values than `max_missing` would
    stay as they were; the model is unchanged then.
    """
    reports = []
    if config.pretrained is not None:
        reports.append(_load_whole(model, config))
    if config.image.weights is not None:
        reports.append(_load_tower(model, "image", config.image.weights))
    if config.text.weights is not None:
        reports.append(_load_tower(model, "text", config.text.weights))
    return reports


#: what torch and the key maps say of tensors of impossible shapes
_MISSHAPEN = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class _Part:
    """What a file is loaded into, and what is said when it does not fit."""

    source: str
    tower: TowerName
    prefix: str  # of the model's names
    uncounted: set[str]  # names that the file need not have
    max_missing: float
    field: str  # of the configuration
    remedy: str


@contextmanager
def _naming(field: str, who: str) -> Iterator[None]:
    """What goes wrong with a file's keys and tensors, as an InputError that names the config's field."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"{field}: {who} needs {error}, which the file has not") from None
    except InputError as error:
        raise InputError(f"{field}: {error}") from None
    except _MISSHAPEN as error:
        raise InputError(f"{field}: its tensors do not fit one another ({error})") from None


def _load_whole(model: CustomTextCLIP, config: ModelConfig) -> WeightReport:
    source = str(config.pretrained)
    field = f"model.pretrained: {source}"
    state = read_state_dict(weights_file(source, field, config.name), field)
    state = {name: tensor for name, tensor in state.items() if name not in _NOT_WEIGHTS}
    with _naming(field, "a whole model of its format"):
        state = _open_clip_names(model, state)
    remedy = (
        "take the model config that the weights were made with, load the part that fits with model.image.weights or "
        "model.text.weights, or raise model.max_missing"
    )
    # training with the sigmoid loss can start from weights that know no bias
    uncounted = {"logit_bias"} - state.keys()
    return _load(model, state, _Part(source, "model", "", uncounted, config.max_missing, field, remedy))


def _open_clip_names(model: CustomTextCLIP, state: State) -> State:
    """A whole model of another library, or of open_clip's other form, told by its names."""
    key_map = next((key_map for name, key_map in _HUGGING_FACE.items() if name in state), None)
    if key_map is None:
        return convert_to_custom_text_state_dict(convert_state_dict(model, state))
    scalars = {name: tensor for name, tensor in state.items() if name in ("logit_scale", "logit_bias")}
    image, text = key_map(state, model.visual), key_map(state, model.text)
    return scalars | _placed("visual.", image) | _placed("text.", text)


def _load_tower(model: CustomTextCLIP, tower: TowerName, weights: Weights) -> WeightReport:
    source, field = weights.source, f"model.{tower}.weights: {weights.source}"
    prefix, module = ("visual.", model.visual) if tower == "image" else ("text.", model.text)
    file = read_state_dict(weights_file(source, field), field)
    with _naming(field, f"key_map {weights.key_map}"):
        state = KEY_MAPS[weights.key_map](under(file, weights.prefix), module)
    remedy = (
        f"the file's keys begin with {_beginnings(file)}; set `prefix` to the part that is this tower, `key_map` to "
        f"the file's format ({', '.join(KEY_MAPS)}), or raise `max_missing`"
    )
    uncounted = {prefix + name for name in projection_names(module)}
    part = _Part(source, tower, prefix, uncounted, weights.max_missing, field, remedy)
    return _load(model, _placed(prefix, state), part)


def _load(model: CustomTextCLIP, state: State, part: _Part) -> WeightReport:
    """Fit names and shapes, account for every key, then refuse or load."""
    try:
        state, interpolated = _fit(model, state)
    except InputError as error:
        raise InputError(f"{part.field}: {error}") from None
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(part.prefix)}
    fits = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    counted = {name: t.numel() for name, t in own.items() if t.is_floating_point() and name not in part.uncounted}
    share = sum(num for name, num in counted.items() if name in fits) / max(1, sum(counted.values()))
    misfits = [
        f"{name} ({tuple(state[name].shape)} in the file, {tuple(tensor.shape)} here)"
        for name, tensor in own.items()
        if name in state and name not in fits
    ]

    def names(found: Iterable[str]) -> tuple[str, ...]:
        return tuple(name.removeprefix(part.prefix) for name in found)

    report = WeightReport(
        source=part.source,
        tower=part.tower,
        num_loaded=len(fits),
        share_loaded=share,
        missing=names(name for name, t in own.items() if name not in state and t.is_floating_point()),
        unexpected=names(name for name in state if name not in own),
        other_shapes=names(misfits),
        interpolated=names(name for name in interpolated if name in fits),
    )
    if not fits or 1 - share > part.max_missing + 1e-12:
        problem = (
            f"{1 - share:.4%} of the values would not come from the file, max_missing allows {part.max_missing:.4%}"
        )
        if not fits:
            problem = f"none of its tensors has a place in the {report.where}"
        raise InputError("\n".join([f"{part.field}: {problem}", *report.lines()[1:], f"  remedy: {part.remedy}"]))
    model.load_state_dict(fits, strict=False)
    return report


def _placed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _some(names: Iterable[str], most: int = _MAX_NAMES) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _beginnings(state: State) -> str:
    counts = Counter(name.split(".")[0] + ("." if "." in name else "") for name in state)
    return _some([f"{beginning} ({num})" for beginning, num in counts.most_common()], 6)


# ---------------------------------------------------------------------------------------------------- where a file is


def needs_download(source: str, model_name: str = "") -> bool:
    """Whether `weights_file` would ask a hub (or its cache) for the file."""
    return source.startswith("hf-hub:") or bool(get_pretrained_cfg(model_name, source))


def weights_file(source: str, field: str, model_name: str = "") -> Path:
    """The file on this machine: a path, `package:NAME/file`, `hf-hub:ORG/NAME[/file]`, `local-dir:FOLDER`, or a tag.

    Raises InputError, beginning with `field`, where it cannot be found or downloaded.
    """
    kind, _, rest = source.partition(":")
    if source.startswith(PACKAGE_PREFIX):
        path = package_file(rest)
    elif kind == "hf-hub":
        if "/" not in rest:
            raise InputError(f"{field}: expected hf-hub:ORG/NAME or hf-hub:ORG/NAME/FILE")
        organisation, name, *inner = rest.split("/", 2)
        path = _downloaded(field, lambda: download_pretrained_from_hf(f"{organisation}/{name}", *inner))
    elif kind == "local-dir":
        found = _find_checkpoint_in_dir(Path(rest)) if Path(rest).is_dir() else None
        if found is None:
            raise InputError(f"{field}: no weights (.safetensors, .bin, .pth) in that folder")
        path = Path(found)
    elif tag := get_pretrained_cfg(model_name, source):
        path = _downloaded(field, lambda: download_pretrained(tag))
    else:
        path = Path(source)
    if not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        known = f", nor a tag of {model_name} ({_some(tags)})" if tags else ""
        raise InputError(f"{field}: not a file{known}; hf-hub:ORG/NAME and local-dir:FOLDER are read too")
    return path


def _downloaded(field: str, download: Callable[[], str]) -> Path:
    try:
        return Path(download())
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{field}: could not be downloaded ({error}); give a file or local-dir:FOLDER") from None


def read_state_dict(path: Path, field: str) -> State:
    """The tensors of a file by name, floating ones in float32, on the CPU.

    Of a checkpoint with more in it, what stands under `state_dict`, `model` or `module`; the prefixes of DDP and of
    torch.compile are cut off. Raises InputError, beginning with `field`, for what cannot be read without running code.
    """
    if path.suffix in (".npz", ".npy", ".h5", ".msgpack", ".onnx"):
        raise InputError(f"{field}: {path.suffix} files are not read; convert it to safetensors")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # what a training script was told: plain attributes, in many published checkpoints
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, SafetensorError, EOFError, ValueError, OSError) as error:
        if "TorchScript" in str(error):
            raise InputError(
                f"{field}: {path.name} is a TorchScript program, which is code and not read; open_clip's tags "
                "(model.pretrained: openai) bring the same weights as tensors"
            ) from None
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{field}: {path.name} cannot be read as tensors alone ({reason}); save its state dict as safetensors, "
            "on a machine where the file may be trusted"
        ) from None
    for _ in range(4):  # a dictionary can hold itself
        wrapper = next((key for key in _WRAPPERS if isinstance(content, dict) and _is_dict(content.get(key))), None)
        if wrapper is None:
            break
        content = content[wrapper]
    state = {str(name): t for name, t in content.items() if isinstance(t, Tensor)} if _is_dict(content) else {}
    if not state:
        inside = f"has {_some(map(str, content))}" if _is_dict(content) else f"is a {type(content).__name__}"
        raise InputError(f"{field}: {path.name} {inside}, and no tensors under {', '.join(_WRAPPERS)}")
    for wrapper in ("module.", "_orig_mod."):
        if all(name.startswith(wrapper) for name in state):
            state = under(state, wrapper)
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


# --------------------------------------------------------------------------------- the model's names, the model's grid


def _fit(model: CustomTextCLIP, state: State) -> tuple[State, list[str]]:
    """Names as the model has them and embeddings on its grid; and the names of what was interpolated."""
    image, text = under(state, "visual."), under(state, "text.")
    fitted = {name: t for name, t in state.items() if not name.startswith(("visual.", "text."))}
    for name in ("logit_scale", "logit_bias"):  # a scalar in the file and one element here, or the other way round
        own = getattr(model, name)
        if name in fitted and own is not None and fitted[name].numel() == own.numel():
            fitted[name] = fitted[name].reshape(own.shape)
    interpolated: list[str] = []
    tower = model.visual
    if isinstance(tower, TimmModel):
        image, interpolated = _fit_timm(tower, image)
    elif isinstance(tower, VisionTransformer) and any(name.startswith(("blocks.0.", "patch_embed.")) for name in image):
        image = timm_to_open_clip(image, tower)
    if isinstance(model.text, HFTextEncoder) and not any(name.startswith("transformer.") for name in text):
        text = _placed("transformer.", text)  # the file of the text model itself
    text = {name: t for name, t in text.items() if not name.endswith(".position_ids")}  # a buffer of older versions
    fitted |= _placed("visual.", image) | _placed("text.", text)
    return fitted, [f"visual.{name}" for name in interpolated] + _resize_positions(model, fitted)


def _resize_positions(model: CustomTextCLIP, state: State) -> list[str]:
    """open_clip's interpolation of position embeddings, in place; the names of those it changed."""
    before = dict(state)
    position = state.get("visual.positional_embedding")
    if isinstance(model.visual, VisionTransformer) and position is not None and has_class_position(position):
        resize_pos_embed(state, model)
    position, text = state.get("text.positional_embedding"), model.text
    if position is not None and isinstance(text, TextTransformer) and text.cls_emb is None:
        same_width = position.shape[1:] == text.positional_embedding.shape[1:]
        if same_width:
            resize_text_pos_embed(state, model)
    return [name for name in state if state[name] is not before[name]]


def _fit_timm(tower: TimmModel, image: State) -> tuple[State, list[str]]:
    """Through the trunk's own checkpoint filter, which knows the formats it was published in and resizes."""
    if not image:
        return image, []
    trunk = tower.trunk
    inner, outer = image, State()
    if any(name.startswith("trunk.") for name in image):
        inner = under(image, "trunk.")
        outer = {name: t for name, t in image.items() if not name.startswith("trunk.")}
    inner = timm_to_trunk(inner, trunk)
    own = {name for name in trunk.state_dict() if f"trunk.{name}" not in projection_names(tower)}
    foreign: State = {}
    if own <= inner.keys():  # only to be resized: the filters drop some of the names that they do not know
        foreign = {name: t for name, t in inner.items() if name not in own}
    elif "class_embedding" in inner:
        inner = _placed("visual.", inner)  # by which timm's filter knows OpenAI's format
    kept = {name: t for name, t in inner.items() if name not in foreign}
    checkpoint_filter = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if checkpoint_filter is not None:
        try:
            kept = timm_to_trunk(checkpoint_filter(kept, trunk), trunk)
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"timm's reader of weights for {type(trunk).__name__} fails ({error!r})") from None
    interpolated = [f"trunk.{name}" for name, t in kept.items() if name in inner and inner[name].numel() != t.numel()]
    return _placed("trunk.", kept | foreign) | outer, interpolated
