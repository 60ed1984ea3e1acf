"""The same model as a `transformers.CLIPModel`, where both towers have CLIP's shape.

Shapes: N images or texts, D joint width, L tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer, VisionTransformer
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from data_prep.files import write_atomically
from pretrain.models.key_maps import to_hf_clip

#: largest difference of a unit vector's component from open_clip's
MAX_DIFFERENCE = 1e-5

#: what `write_clip_model` leaves in a folder
CLIP_FILES = (
    "config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

_BPE_VOCAB_SIZE = 49408
_SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
#: keys of a text or image config that change the forward and that CLIPModel has nothing for; value = as CLIP has it
_CLIP_VALUES: dict[str, tuple[Any, ...]] = {
    "ls_init_value": (None,),
    "attentional_pool": (False,),
    "no_ln_pre": (False,),
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}),
    "block_type": (None, "default"),
    "pool_type": ("tok", "argmax"),
    "tokenizer_kwargs": (None, {}),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"), (False,)),
    **dict.fromkeys(("scale_attn", "scale_fc"), (False,)),
}
_PROOF_TEXTS = (
    "a photo of melanoma",
    "A dermoscopic image of a nevus on the trunk of a 45-year-old male.",
    "This image depicts a red, inflamed plaque (2 x 3 cm) with silvery scale; it's itchy & painful.",
)


def lacks_clip_shape(model: Any, model_cfg: dict[str, Any]) -> str | None:
    """Why an open_clip model cannot be a CLIPModel, a sentence for the card; None where it can."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if type(model.visual) is not VisionTransformer:
        return "the image tower is not a ViT of open_clip's own"
    if type(model.text) is not TextTransformer:
        return "the text tower is not CLIP's text transformer"
    if text.get("hf_tokenizer_name") or model.text.vocab_size != _BPE_VOCAB_SIZE:
        return "its tokenizer is not CLIP's byte-pair encoding"
    if model.logit_bias is not None:
        return "a CLIPModel has no place for the bias of the sigmoid loss"
    for cfg, tower in ((vision, "image"), (text, "text")):
        for key, allowed in _CLIP_VALUES.items():
            if key in cfg and cfg[key] not in allowed:
                return f"its {tower} tower has {key}: {cfg[key]}, which CLIP has not"
    if len(set(model.visual.image_size)) > 1 or len(set(model.visual.patch_size)) > 1:
        return "its images or patches are not square"
    if model.visual.preprocess_cfg.get("resize_mode", "shortest") == "longest":
        return "its images are padded to a square, which CLIP's image processor does not do"
    return None


def write_clip_model(model: Any, model_cfg: dict[str, Any], folder: Path) -> float:
    """config.json, model.safetensors, tokenizer and image processor, for `CLIPModel.from_pretrained(folder)` and
    `CLIPProcessor.from_pretrained(folder)`. Returns the largest difference from open_clip's unit vectors.

    Raises RuntimeError, with nothing written, where that is above `MAX_DIFFERENCE`.
    """
    clip = _convert(model, model_cfg)
    tokenizer = _tokenizer(model.text.context_length)
    difference = _largest_difference(model, clip, tokenizer)
    if not difference <= MAX_DIFFERENCE:  # NaN included
        raise RuntimeError(f"{folder}: the CLIPModel differs from open_clip's model by {difference:.1e}; not written")
    clip.save_pretrained(folder)
    CLIPProcessor(_image_processor(model.visual), tokenizer).save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        kept = {key: value for key, value in content.items() if not key.endswith("name_or_path")}
        write_atomically(folder / name, (json.dumps(kept, indent=2) + "\n").encode())
    return difference


def _convert(model: Any, model_cfg: dict[str, Any]) -> CLIPModel:
    visual, text = model.visual, model.text
    shared: dict[str, Any] = {
        "hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
    }
    heads, layers = visual.transformer.resblocks[0].attn.num_heads, len(visual.transformer.resblocks)
    vision_config = CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=visual.transformer.resblocks[0].mlp.c_fc.out_features,
        projection_dim=visual.output_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        **shared,
    )
    text_config = CLIPTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        intermediate_size=text.transformer.resblocks[0].mlp.c_fc.out_features,
        projection_dim=text.output_dim,
        num_hidden_layers=len(text.transformer.resblocks),
        num_attention_heads=text.heads,
        max_position_embeddings=text.context_length,
        bos_token_id=_BPE_VOCAB_SIZE - 2,
        eos_token_id=_BPE_VOCAB_SIZE - 1,
        pad_token_id=_BPE_VOCAB_SIZE - 1,
        **shared,
    )
    clip = CLIPModel(
        CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=visual.output_dim)
    ).eval()
    clip.load_state_dict(to_hf_clip(model.state_dict(), clip.state_dict().keys()))
    return clip


def _tokenizer(context_length: int) -> CLIPTokenizer:
    """open_clip's own vocabulary and merges, under the names that transformers has for the two special tokens."""
    simple = open_clip.SimpleTokenizer()
    vocab = {_SPECIAL.get(token, token): number for token, number in simple.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(simple.bpe_ranks), model_max_length=context_length)


def _image_processor(visual: Any) -> CLIPImageProcessor:
    """open_clip's inference preprocessing in transformers' terms."""
    cfg, px = visual.preprocess_cfg, visual.image_size[0]
    is_squashed = cfg.get("resize_mode") == "squash"
    bilinear = cfg.get("interpolation") == "bilinear"
    return CLIPImageProcessor(
        size={"height": px, "width": px} if is_squashed else {"shortest_edge": px},
        crop_size={"height": px, "width": px},
        do_center_crop=not is_squashed,
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
        resample=Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC,
    )


@torch.no_grad()
def _largest_difference(model: Any, clip: CLIPModel, tokenizer: CLIPTokenizer) -> float:
    """Of unit vectors and of the temperature; pixels are random, texts pass through both tokenizers."""
    model = model.eval()
    px, context_length = model.visual.image_size[0], model.text.context_length
    pixel_NCHW = torch.randn(4, 3, px, px, generator=torch.Generator().manual_seed(0))
    token_NL = open_clip.SimpleTokenizer(context_length=context_length)(list(_PROOF_TEXTS))
    inputs = tokenizer(list(_PROOF_TEXTS), padding=True, truncation=True, return_tensors="pt")
    theirs = clip(pixel_values=pixel_NCHW, **inputs)
    differences = [
        F.normalize(theirs.image_embeds, dim=-1) - model.encode_image(pixel_NCHW, normalize=True),
        F.normalize(theirs.text_embeds, dim=-1) - model.encode_text(token_NL, normalize=True),
        clip.logit_scale - model.logit_scale,
    ]
    return float(torch.cat([difference.abs().flatten() for difference in differences]).max())  # NaN stays NaN
