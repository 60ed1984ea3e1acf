"""An exported folder from wherever it lies, also where it holds an HF text tower and there is no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image

from data_prep.errors import InputError
from pretrain.models.build import check_tokenizer_kwargs
from pretrain.models.open_clip_config import CONFIG_NAME, FOLDER_PREFIX, holds_text_tower


def load_folder(folder: Path | str) -> tuple[Any, Callable[[Image.Image], torch.Tensor], Callable[..., torch.Tensor]]:
    """(model in eval mode, inference preprocessing, tokenizer), all by open_clip.

    The one thing that `open_clip.create_model_and_transforms("local-dir:FOLDER")` alone does not do: it says that an
    HF text tower's architecture is the folder's own. Raises InputError for what is no exported folder.
    """
    folder = Path(folder)
    name = f"{FOLDER_PREFIX}{folder}"
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"{folder}: no {CONFIG_NAME} here; `dermvlp export` writes one")
    text_cfg = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    check_tokenizer_kwargs(text_cfg, str(folder))
    overrides: dict[str, Any] = {}
    if holds_text_tower(folder):
        overrides["text_cfg"] = text_cfg | {"hf_model_name": str(folder), "hf_model_pretrained": False}
    model, _, preprocess = open_clip.create_model_and_transforms(name, **overrides)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)
