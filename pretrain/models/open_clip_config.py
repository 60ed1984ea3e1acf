"""A model in open_clip's own terms: by name, from a file, a folder or the Hub, with our overrides applied."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from open_clip.transform import merge_preprocess_dict

from data_prep.errors import InputError
from pretrain.config import ModelConfig

PACKAGE_PREFIX = "package:"  # "package:NAME/folder": files that an installed Python package carries
HUB_PREFIX = "hf-hub:"
FOLDER_PREFIX = "local-dir:"
CONFIG_NAME = "open_clip_config.json"
TEXT_TOWER_KEY = "holds_text_tower"  # in that file, beside model_cfg: see `holds_text_tower`


@dataclass(frozen=True)
class OpenClipConfig:
    """A model in open_clip's own terms: what its `open_clip_config.json` holds."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]  # mean, std: where they differ from open_clip's default


def read_open_clip_config(name: str) -> OpenClipConfig:
    """By open_clip's name, a JSON file, `local-dir:FOLDER` or `hf-hub:ORG/NAME`; `package:` names stay as written.

    Raises InputError for a name that cannot be read.
    """
    if name.startswith(FOLDER_PREFIX):
        return _in_folder(Path(name.removeprefix(FOLDER_PREFIX)))
    if name.startswith(HUB_PREFIX):
        return _parse(_download_config(name), name)
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise InputError(f"model name {name}: no such file; model configs are under configs/models/")
        return _parse(Path(name), name)
    found = open_clip.get_model_config(name)
    if found is None:
        raise InputError(f"model name {name!r} is unknown to open_clip; see open_clip.list_models()")
    return OpenClipConfig(dict(found), {})


def _parse(path: Path, name: str) -> OpenClipConfig:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return OpenClipConfig(raw["model_cfg"], raw.get("preprocess_cfg", {}))
    except (json.JSONDecodeError, KeyError) as error:
        raise InputError(f"{name}: expected JSON with a key model_cfg ({error!r})") from None


def _in_folder(folder: Path) -> OpenClipConfig:
    """As open_clip reads a `local-dir:`: the tokenizer is the folder's, whatever its config says."""
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(
            f"model name {FOLDER_PREFIX}{folder}: no {CONFIG_NAME} in that folder; `dermvlp export` writes one"
        )
    spec = _parse(folder / CONFIG_NAME, f"{FOLDER_PREFIX}{folder}")
    text = spec.model_cfg["text_cfg"]
    if text.get("hf_tokenizer_name"):
        text["hf_tokenizer_name"] = str(folder)
    if holds_text_tower(folder):
        text["hf_model_name"] = str(folder)
    return spec


def holds_text_tower(folder: Path) -> bool:
    """Whether the architecture of an exported folder's HF text tower is its own config.json, wherever it lies now.

    Our exports say so, since the name that stands in open_clip_config.json is for the Hub.
    """
    raw = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    name = Path(raw["model_cfg"]["text_cfg"].get("hf_model_name") or "")
    was_moved = name.is_absolute() and not name.exists()  # of exports before they said it
    return bool(raw.get(TEXT_TOWER_KEY, was_moved)) and (folder / "config.json").is_file()


def _download_config(name: str) -> Path:
    try:
        return Path(hf_hub_download(name.removeprefix(HUB_PREFIX), CONFIG_NAME))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            f"model name {name}: {CONFIG_NAME} cannot be had from the Hub ({type(error).__name__}: {error}); check the "
            f"name, or download it where there is a network and use {FOLDER_PREFIX}FOLDER"
        ) from None


def resolved_spec(config: ModelConfig) -> OpenClipConfig:
    """What `build_open_clip` builds: the named model at the config's resolution, shrunk where it is tiny.

    `preprocess_cfg` is complete: open_clip's defaults, under those of the pretrained weights, under the model's own.
    Raises InputError for a name that cannot be read.
    """
    spec = read_open_clip_config(config.name)
    model_cfg = copy.deepcopy(spec.model_cfg)
    model_cfg.pop("multimodal_cfg", None)  # CoCa's caption decoder: nothing here would train it
    if config.image_size is not None:
        model_cfg["vision_cfg"]["image_size"] = config.image_size
    preprocess = merge_preprocess_dict(open_clip.transform.PreprocessCfg(), _preprocess_of_weights(config))
    preprocess = merge_preprocess_dict(preprocess, spec.preprocess_cfg)
    spec = OpenClipConfig(model_cfg, preprocess)
    if config.tiny:
        from pretrain.models.tiny import shrink  # which needs this module

        spec = shrink(spec)
    return spec


def _preprocess_of_weights(config: ModelConfig) -> dict[str, Any]:
    """Mean, standard deviation and resizing that `pretrained` was trained with, where its place tells."""
    source = config.pretrained or ""
    if config.tiny or not source:
        return {}
    if source.startswith((HUB_PREFIX, FOLDER_PREFIX)):
        return read_open_clip_config(source).preprocess_cfg
    return dict(open_clip.get_pretrained_cfg(config.name, source))


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
