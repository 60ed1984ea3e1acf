"""Towers as stacks of layers: every parameter once, frozen from below, slower below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from transformers import BertConfig, RobertaConfig

from data_prep.errors import InputError
from pretrain.config import ModelConfig, TowerConfig
from pretrain.models.layers import (
    freeze_layers,
    freeze_tower,
    layer_names,
    layers,
    learning_rate_scales,
    projection_names,
)
from tests.conftest import TINY_MODEL

TINY_HF: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 120,
    "max_position_embeddings": 40,
}


def vit(**changes: Any) -> VisionTransformer:
    return VisionTransformer(48, 12, 32, layers=3, heads=2, mlp_ratio=2.0, output_dim=16, **changes)


def text(**changes: Any) -> TextTransformer:
    return TextTransformer(12, 100, 32, 2, 3, output_dim=16, **changes)


def hugging_face(config: Any, **changes: Any) -> HFTextEncoder:
    return HFTextEncoder("", 16, config=config, proj_type="mlp", **changes)


def mt5(folder: Path) -> HFTextEncoder:
    config = {"model_type": "mt5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 120}), encoding="utf-8")
    return HFTextEncoder(str(folder), 16, proj_type="linear", pooler_type="mean_pooler", pretrained=False)


def timm_tower(name: str, pool: str = "avg", proj: str = "linear") -> TimmModel:
    return TimmModel(name, 16, image_size=160, pool=pool, proj=proj)


# tower, number of blocks (stages), a name of the embeddings, of the last block, of the head
TOWERS: dict[str, tuple[Any, int, str, str, str]] = {
    "vit": (vit, 3, "ln_pre.weight", "transformer.resblocks.2.ln_1.weight", "ln_post.bias"),
    "vit, layer scale, attention pool": (
        lambda: vit(
            ls_init_value=0.1, attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2, no_ln_pre=True
        ),
        3,
        "class_embedding",
        "transformer.resblocks.2.ls_2.gamma",
        "attn_pool.query",
    ),
    "vit, fixed positions": (
        lambda: vit(pos_embed_type="sin_cos_2d"),
        3,
        "positional_embedding",
        "transformer.resblocks.2.mlp.c_fc.bias",
        "proj",
    ),
    "resnet": (
        lambda: ModifiedResNet((1, 2, 1, 1), 16, heads=4, image_size=64, width=8),
        4,
        "bn3.weight",
        "layer4.0.conv1.weight",
        "attnpool.positional_embedding",
    ),
    "text": (text, 3, "token_embedding.weight", "transformer.resblocks.2.ln_2.bias", "ln_final.weight"),
    "text, class token": (
        lambda: text(embed_cls=True, proj_bias=True),
        3,
        "cls_emb",
        "transformer.resblocks.2.ln_2.bias",
        "text_projection.bias",
    ),
    "bert": (
        lambda: hugging_face(BertConfig(**TINY_HF), pooler_type="cls_pooler"),
        3,
        "transformer.embeddings.LayerNorm.weight",
        "transformer.encoder.layer.2.output.dense.weight",
        "proj.2.weight",
    ),
    "roberta": (
        lambda: hugging_face(RobertaConfig(**TINY_HF)),
        3,
        "transformer.embeddings.position_embeddings.weight",
        "transformer.encoder.layer.2.output.dense.weight",
        "transformer.pooler.dense.weight",
    ),
    "timm vit": (
        lambda: timm_tower("test_vit"),
        6,
        "trunk.cls_token",
        "trunk.blocks.5.norm2.weight",
        "trunk.norm.weight",
    ),
    "timm vit, attention pool": (
        lambda: timm_tower("test_vit3", pool="map", proj="none"),
        9,
        "trunk.reg_token",
        "trunk.blocks.8.norm2.weight",
        "trunk.attn_pool.latent",
    ),
    "timm vit, own head": (
        lambda: timm_tower("test_vit", proj=""),
        6,
        "trunk.patch_embed.proj.bias",
        "trunk.blocks.5.norm2.weight",
        "trunk.fc_norm.weight",
    ),
    "timm convnext": (
        lambda: timm_tower("test_convnext"),
        4,
        "trunk.stem.0.weight",
        "trunk.stages.3.blocks.0.gamma",
        "trunk.head.norm.weight",
    ),
    "timm efficientnet": (
        lambda: timm_tower("test_efficientnet"),
        5,
        "trunk.conv_stem.weight",
        "trunk.blocks.4.0.conv_dw.weight",
        "trunk.conv_head.weight",
    ),
    "timm resnet": (
        lambda: timm_tower("test_resnet"),
        4,
        "trunk.conv1.0.weight",
        "trunk.layer4.0.conv1.weight",
        "head.proj.weight",
    ),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_every_parameter_is_in_exactly_one_layer(kind: str) -> None:
    make, num_blocks, embedding, block, head = TOWERS[kind]
    tower = make()
    names = layer_names(tower)
    assert sorted(name for part in names for name in part) == sorted(name for name, _ in tower.named_parameters())
    assert len(names) == num_blocks + 2 and all(names)
    assert embedding in names[0] and block in names[-2] and head in names[-1]
    assert projection_names(tower) <= set(names[-1])
    own = dict(tower.named_parameters())
    assert [[p is own[n] for p, n in zip(*pair, strict=True)] for pair in zip(layers(tower), names, strict=True)] == [
        [True] * len(part) for part in names
    ]


def test_the_encoder_of_mt5(tmp_path: Path) -> None:
    names = layer_names(mt5(tmp_path))
    assert names[0] == ["transformer.embed_tokens.weight"] and len(names) == 5
    assert names[-1] == ["transformer.final_layer_norm.weight", "proj.weight"]


def test_blocks_come_in_the_order_of_their_numbers() -> None:
    tower = VisionTransformer(48, 12, 8, layers=11, heads=1, mlp_ratio=1.0, output_dim=4)
    assert [part[0] for part in layer_names(tower)[1:-1]] == [
        f"transformer.resblocks.{i}.ln_1.weight" for i in range(11)
    ]


def test_unknown_towers_are_refused() -> None:
    with pytest.raises(InputError, match="the blocks of a tower of kind Linear are not known"):
        layers(nn.Linear(2, 2))


def trained_names(tower: nn.Module) -> set[str]:
    """Names of the parameters that a step changes."""
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    tower(torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    return {name for name, p in tower.named_parameters() if not torch.equal(p, before[name])}


def test_frozen_layers_stay_as_they_are() -> None:
    tower = vit()
    freeze_layers(tower, 2)
    names = layer_names(tower)
    assert trained_names(tower) == {*names[3], *names[4]}


def test_freezing_nothing_changes_nothing() -> None:
    tower = vit(pos_embed_type="sin_cos_2d")
    freeze_layers(tower, 0)
    assert [name for name, p in tower.named_parameters() if not p.requires_grad] == ["positional_embedding"]
    freeze_layers(tower, 1)  # and a fixed embedding stays fixed
    assert not tower.positional_embedding.requires_grad and not tower.conv1.weight.requires_grad


@pytest.mark.parametrize("num_blocks", [4, -1])
def test_more_blocks_than_there_are(num_blocks: int) -> None:
    with pytest.raises(InputError, match=rf"freeze_layers: {num_blocks}, but .* has 3 blocks; give 1 to 3"):
        freeze_layers(vit(), num_blocks)


def test_a_frozen_tower_trains_its_projection_alone() -> None:
    tower = vit()
    freeze_tower(tower)
    assert trained_names(tower) == {"proj"}


@pytest.mark.parametrize(
    ("kind", "projection"),
    [
        ("resnet", {"attnpool.c_proj.weight", "attnpool.c_proj.bias"}),
        ("text", {"text_projection"}),
        ("text, class token", {"text_projection.weight", "text_projection.bias"}),
        ("bert", {"proj.0.weight", "proj.2.weight"}),
        ("timm vit", {"head.proj.weight"}),
        ("timm vit, own head", {"trunk.head.weight", "trunk.head.bias"}),
        ("timm vit, attention pool", set()),
        ("timm convnext", {"head.proj.weight"}),
    ],
)
def test_the_projection_into_the_joint_space(kind: str, projection: set[str]) -> None:
    tower = TOWERS[kind][0]()
    freeze_tower(tower)
    assert {name for name, p in tower.named_parameters() if p.requires_grad} == projection


def test_learning_rates_fall_with_depth() -> None:
    model = CustomTextCLIP(**TINY_MODEL, nonscalar_logit_scale=True)
    config = ModelConfig(name="tiny", image=TowerConfig(layer_decay=0.5))
    scales = learning_rate_scales(model, config)
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert (
        scales["visual.positional_embedding"] == scales["visual.conv1.weight"] == 0.125
    )  # two blocks and the norm above
    assert scales["visual.transformer.resblocks.0.ln_1.weight"] == 0.25
    assert scales["visual.transformer.resblocks.1.attn.in_proj_weight"] == 0.5
    assert scales["visual.ln_post.weight"] == scales["visual.proj"] == 1.0
    assert {value for name, value in scales.items() if not name.startswith("visual.")} == {1.0}
    both = learning_rate_scales(model, config.model_copy(update={"text": TowerConfig(layer_decay=0.9)}))
    assert both["text.token_embedding.weight"] == pytest.approx(0.9**3) and both["logit_scale"] == 1.0
    assert set(learning_rate_scales(model, ModelConfig(name="tiny")).values()) == {1.0}
