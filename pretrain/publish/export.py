"""A checkpoint to a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads, outputs equal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file, save_file

from data_prep.errors import InputError
from pretrain.data.manifest import ShardedDataset
from pretrain.data.transforms import decode
from pretrain.evaluation.embed import Encoder, find_checkpoint
from pretrain.models.build import build_open_clip, image_px
from pretrain.models.open_clip_config import resolve_packages
from pretrain.train.checkpoint import checkpoint_config

_TRAINING_ONLY = ("predictor.", "patch_projection.")  # not part of the dual encoder that open_clip knows


def export(run_or_checkpoint: Path, out_dir: Path) -> Path:
    """Weights (safetensors), open_clip_config.json and, for an HF text tower, its config and tokenizer.

    Raises InputError where the folder holds something else already.
    """
    checkpoint = find_checkpoint(run_or_checkpoint)
    config = checkpoint_config(checkpoint)
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / "open_clip_config.json").is_file():
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
    save_file(state, out_dir / "open_clip_model.safetensors", metadata={"format": "pt"})
    model_cfg = dict(model.spec.model_cfg)
    model_cfg["custom_text"] = True
    model_cfg.pop("init_logit_bias", None)
    if "logit_bias" in state:
        model_cfg["init_logit_bias"] = 0.0  # open_clip makes the parameter where its config has this key
    if "hf_model_name" in model_cfg["text_cfg"]:
        model_cfg["text_cfg"] = _export_hf_text(model, model_cfg, out_dir)
    document = {"model_cfg": model_cfg, "preprocess_cfg": model.visual.preprocess_cfg}
    (out_dir / "open_clip_config.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    for name in ("config.yaml", "metrics.jsonl"):
        source = checkpoint.parent.parent / name
        if source.is_file():
            shutil.copyfile(source, out_dir / f"training_{name}")
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


def _export_hf_text(model: Any, model_cfg: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """The text tower's architecture and tokenizer into the folder.

    open_clip hands `hf_model_name` to transformers as it is, so it has to be an absolute path: after moving the
    folder, change that one line of open_clip_config.json.
    """
    resolved = resolve_packages(model_cfg)["text_cfg"]
    model.text.config.save_pretrained(out_dir)
    open_clip.tokenizer.HFTokenizer(resolved["hf_tokenizer_name"], trust_remote_code=False).save_pretrained(out_dir)
    return {
        **model_cfg["text_cfg"],
        "hf_model_name": str(out_dir.resolve()),
        "hf_tokenizer_name": str(out_dir.resolve()),
    }


@torch.no_grad()
def check_export(folder: Path, encoder: Encoder, data: ShardedDataset, num_samples: int = 8) -> float:
    """Loads the folder as any user of open_clip would; the largest difference of a feature from our own encoder's.

    Images pass through open_clip's preprocessing, texts through its tokenizer, padded: the whole way, not the weights
    alone.
    """
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    positions = range(min(num_samples, len(data)))
    pictures = [decode(data.read_image(position)) for position in positions]
    texts = [data.read_sample(position).caption for position in positions]
    theirs = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]), normalize=True)
    ours = torch.stack([encoder.transform(picture) for picture in pictures])
    image_BD, _ = encoder.model.encode_image(ours.to(encoder.device))
    text_BD = torch.from_numpy(encoder.encode_texts(texts))
    image_difference = (theirs - image_BD.cpu()).abs().max()
    text_difference = (model.encode_text(tokenizer(texts), normalize=True) - text_BD).abs().max()
    return float(torch.maximum(image_difference, text_difference))
