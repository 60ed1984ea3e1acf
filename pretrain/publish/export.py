"""A checkpoint to a folder that open_clip loads, from disk or from the Hub, outputs equal."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import open_clip
import torch
import yaml
from safetensors.torch import load_file, save_file

from data_prep.errors import InputError
from data_prep.files import write_atomically
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.data.transforms import decode
from pretrain.evaluation.encoding.encoders import find_checkpoint
from pretrain.evaluation.interfaces import Encoder
from pretrain.models.build import build_open_clip, image_px
from pretrain.models.open_clip_config import CONFIG_NAME, PACKAGE_PREFIX, TEXT_TOWER_KEY, resolve_packages
from pretrain.publish.load import load_folder
from pretrain.publish.private import without_paths
from pretrain.train.checkpoint import checkpoint_config
from pretrain.train.retention import read_meta

WEIGHTS_NAME = "open_clip_model.safetensors"  # open_clip's own name for them
TRAINING_CONFIG_NAME = "training_config.yaml"
METRICS_NAME = "training_metrics.jsonl"

_TRAINING_ONLY = ("predictor.", "patch_projection.")  # not part of the dual encoder that open_clip knows
_HUB_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")


def export(run_or_checkpoint: Path, out_dir: Path, hub_name: str | None = None) -> Path:
    """Weights (safetensors), open_clip_config.json, the resolved config, the training log and, for an HF text tower,
    its config and tokenizer. No file holds a path of this machine.

    open_clip hands the name of an HF text tower to transformers as it is, a path or a name on the Hub. So it is
    `hub_name` ("ORG/NAME", where the folder will be published), else the public name that the tower was built from,
    else "." (this folder, which only `load_folder` and our own commands find from elsewhere: docs/publishing.md).

    Raises InputError where the folder holds something else already, and for a model that open_clip could not build.
    """
    checkpoint = find_checkpoint(run_or_checkpoint)
    config = checkpoint_config(checkpoint)
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / CONFIG_NAME).is_file():
        raise InputError(f"{out_dir}: not empty and no earlier export; choose another folder")
    state = load_file(checkpoint / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(_TRAINING_ONLY)}
    model = build_open_clip(config.model, load_pretrained=False, with_logit_bias="logit_bias" in state)
    model.load_state_dict(state)  # strict: every parameter of open_clip's own model, and nothing else
    _check_tower(model)
    for name in ("logit_scale", "logit_bias"):
        if name in state:
            state[name] = state[name].reshape(())  # as open_clip creates it
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(state, out_dir / WEIGHTS_NAME, metadata={"format": "pt"})
    model_cfg = dict(model.spec.model_cfg)
    model_cfg["custom_text"] = True
    model_cfg.pop("init_logit_bias", None)
    if "logit_bias" in state:
        model_cfg["init_logit_bias"] = 0.0  # open_clip makes the parameter where its config has this key
    model_cfg["text_cfg"] = _export_text(model, model_cfg, out_dir, hub_name)
    document = {"model_cfg": model_cfg, "preprocess_cfg": model.visual.preprocess_cfg}
    if model_cfg["text_cfg"].get("hf_model_name"):
        document[TEXT_TOWER_KEY] = True
    write_atomically(out_dir / CONFIG_NAME, json.dumps(document, indent=2).encode())
    _export_run(checkpoint, out_dir)
    return out_dir


def _check_tower(model: Any) -> None:
    """Raises InputError for a timm tower that open_clip could not build from the folder."""
    if str(model.spec.model_cfg["vision_cfg"].get("timm_model_name")).startswith("tiny_"):
        raise InputError("model.tiny: timm knows this tower in our process alone; trials of it cannot be exported")
    # open_clip 3.3 builds a tower at its name's own resolution before it loads the weights, strictly
    trunk = getattr(model.visual, "trunk", None)
    if (
        trunk is not None
        and getattr(trunk, "pos_embed", None) is not None
        and image_px(model.visual) != trunk.default_cfg["input_size"][-1]
    ):
        raise InputError(
            f"model.image_size: open_clip cannot load timm's ViT at {image_px(model.visual)} px from a folder; use an "
            "open_clip ViT, or a timm name of that resolution"
        )


def _export_text(model: Any, model_cfg: dict[str, Any], out_dir: Path, hub_name: str | None) -> dict[str, Any]:
    """Tokenizer and architecture of an HF text tower into the folder; the text config that names them."""
    text_cfg: dict[str, Any] = dict(model_cfg["text_cfg"])
    resolved = resolve_packages(model_cfg)["text_cfg"]
    if text_cfg.get("hf_tokenizer_name"):
        open_clip.tokenizer.HFTokenizer(resolved["hf_tokenizer_name"], trust_remote_code=False).save_pretrained(out_dir)
        _drop_keys(out_dir / "tokenizer_config.json", ("name_or_path", "tokenizer_file", "vocab_file", "merges_file"))
        text_cfg["hf_tokenizer_name"] = _portable_name(text_cfg["hf_tokenizer_name"], hub_name)
    if text_cfg.get("hf_model_name"):
        model.text.config.save_pretrained(out_dir)
        _drop_keys(out_dir / "config.json", ("_name_or_path",))
        text_cfg["hf_model_name"] = _portable_name(text_cfg["hf_model_name"], hub_name)
        text_cfg["hf_model_pretrained"] = False  # its weights are in our file
    return text_cfg


def _portable_name(name: str, hub_name: str | None) -> str:
    is_public = _HUB_NAME.fullmatch(name) and not name.startswith((PACKAGE_PREFIX, ".")) and not Path(name).exists()
    return hub_name or (name if is_public else ".")


def _drop_keys(path: Path, keys: tuple[str, ...]) -> None:
    """transformers notes where a file was read from."""
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in keys}
    write_atomically(path, (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode())


def _export_run(checkpoint: Path, out_dir: Path) -> None:
    """The config that the run began with, without what it says of this machine, and the training log."""
    config = TrainConfig.model_validate(read_meta(checkpoint)["config"])
    text = yaml.safe_dump(without_paths(config.model_dump(mode="json")), sort_keys=False)
    write_atomically(out_dir / TRAINING_CONFIG_NAME, text.encode())
    metrics = checkpoint.parent.parent / "metrics.jsonl"
    if metrics.is_file():
        shutil.copyfile(metrics, out_dir / METRICS_NAME)


@torch.no_grad()
def check_export(folder: Path, encoder: Encoder, data: ShardedDataset, num_samples: int = 8) -> float:
    """Loads the folder as any user of open_clip would; the largest difference of a feature from our own encoder's.

    Images pass through open_clip's preprocessing, texts through its tokenizer, padded: the whole way, not the weights
    alone.
    """
    model, preprocess, tokenizer = load_folder(folder)
    positions = range(min(num_samples, len(data)))
    pictures = [decode(data.read_image(position)) for position in positions]
    texts = [data.read_sample(position).caption for position in positions]
    theirs = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]), normalize=True)
    ours = torch.stack([encoder.transform(picture) for picture in pictures])
    image_BD = encoder.encode_pixels(ours)
    text_BD = torch.from_numpy(encoder.encode_texts(texts))
    image_difference = (theirs - image_BD).abs().max()
    text_difference = (model.encode_text(tokenizer(texts), normalize=True) - text_BD).abs().max()
    return float(torch.maximum(image_difference, text_difference))
