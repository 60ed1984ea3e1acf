"""Image towers: open_clip's own outputs, with patch features, latents and masked input beside them."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_prep.errors import InputError
from pretrain.config import ModelConfig
from pretrain.models.build import build_open_clip
from pretrain.models.image_towers import TokenTimmModel, TokenVisionTransformer, expose_tokens
from tests.conftest import TINY_MODEL

VIT: dict[str, Any] = TINY_MODEL["vision_cfg"]  # 48 px, 4 x 4 patches, width 32
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "patch_size": 4}


def timm_cfg(name: str, px: int = 64, pool: str = "", proj: str | None = "linear") -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": px}


NARROW = {"embed_dim": 32, "depth": 2, "num_heads": 2}
#: name: (vision_cfg, arguments that narrow timm's model)
VITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "open_clip": (VIT, {}),
    "open_clip avg": (VIT | {"pool_type": "avg"}, {}),
    "open_clip avg, norm after": (VIT | {"pool_type": "avg", "final_ln_after_pool": True}, {}),
    "open_clip no_ln_pre, layer scale": (VIT | {"no_ln_pre": True, "ls_init_value": 0.3}, {}),
    "open_clip sincos": (VIT | {"pos_embed_type": "sin_cos_2d"}, {}),
    "open_clip attention": (
        VIT | {"attentional_pool": True, "attn_pooler_queries": 8, "attn_pooler_heads": 2, "width": 48},
        {},
    ),
    "timm class token": (timm_cfg("test_vit"), {}),
    "timm own head": (timm_cfg("test_vit", pool="token", proj=None), {}),
    "timm mean of class-token ViT": (timm_cfg("test_vit", pool="avg", proj="mlp"), {}),
    "timm registers, fc_norm, layer scale": (timm_cfg("test_vit2"), {}),
    "timm registers, attention": (timm_cfg("test_vit3"), {}),
    "timm SigLIP": (timm_cfg("vit_so400m_patch14_siglip_384", 64, "map", "none"), NARROW | {"patch_size": 16}),
    "timm deit3 (positions without class token)": (timm_cfg("deit3_small_patch16_224", pool="token"), NARROW),
    "timm CLIP (norm before)": (timm_cfg("vit_base_patch16_clip_224"), NARROW),
}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "BEiT": (timm_cfg("beit_base_patch16_224", pool="avg"), NARROW | {"init_values": 0.3}),
    "EVA-02": (timm_cfg("eva02_tiny_patch14_224", 56, pool="token"), NARROW),
    "convolutional stem": (timm_cfg("vit_tiny_r_s16_p8_224", 64), NARROW),
    "EfficientNet": (timm_cfg("test_efficientnet"), {}),
    "ConvNeXt": (timm_cfg("test_convnext", proj="mlp"), {}),
    "BiT": (timm_cfg("resnetv2_50x1_bit"), {}),
    "rotary attention pooling": (timm_cfg("resnet18", pool="rot_attn", proj=None), {"channels": (64,) * 4}),
    "Swin": (timm_cfg("swin_tiny_patch4_window7_224", 32), SWIN),
    "CLIP ResNet": (RESNET, {}),
}
ALL = VITS | OTHERS
NOT_LINEAR = {"open_clip attention", "timm registers, attention", "timm SigLIP", "rotary attention pooling"}
NOT_LINEAR |= {"CLIP ResNet"}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An image tower as open_clip makes it, in float64, in eval mode; timm's are narrowed by their own arguments."""

    def make(vision_cfg: dict[str, Any], narrow: dict[str, Any], **settings: Any) -> Any:
        path = tmp_path / "model.json"
        path.write_text(json.dumps({"model_cfg": TINY_MODEL | {"vision_cfg": vision_cfg}}), encoding="utf-8")
        monkeypatch.setattr("open_clip.timm_model.timm.create_model", partial(timm_create_model, **narrow))
        torch.manual_seed(0)
        visual = build_open_clip(ModelConfig(name=str(path), **settings)).visual.double().eval()
        for name, parameter in visual.named_parameters():
            if "gamma" in name or "reg_token" in name or "cls_token" in name or name.endswith("bn3.weight"):
                nn.init.normal_(parameter, 0.5, 0.1)  # or a new tower hardly depends on its blocks and tokens
        return visual

    timm_create_model = timm.create_model
    return make


def images(visual: Any, num: int = 2) -> Tensor:
    px = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    return torch.randn(num, 3, px, px, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(actual: Tensor | None, expected: Tensor | None, tolerance: float = 1e-10) -> None:
    assert actual is not None and expected is not None
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_a_tower_gives_open_clips_features(build: Any, name: str) -> None:
    visual = build(*ALL[name])
    image_BCHW = images(visual)
    expected, names = visual(image_BCHW), list(visual.state_dict())
    tower = expose_tokens(visual)
    out = tower(image_BCHW, patches=True, latents=True)
    close(out.image_BD, expected)
    assert list(tower.state_dict()) == names  # weights move both ways without a map
    num_patches = math.prod(tower.grid_size)
    assert out.latent_BTW.shape == (2, tower.num_prefix_tokens + num_patches, tower.token_width)
    assert tower.has_linear_pooling is (name not in NOT_LINEAR)
    assert out.patch_BPX.shape == (2, num_patches, expected.shape[1] if name not in NOT_LINEAR else tower.token_width)
    assert out.patch_BPX.std(dim=1).mean(dim=-1).min() > 1e-5
    assert tower.can_drop_patches is (name in VITS)
    if name not in VITS:
        with pytest.raises(ValueError, match="cannot drop patches"):
            tower(image_BCHW, visible_BV=torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.parametrize("name", ["open_clip avg", "EfficientNet", "BiT", "Swin"])
def test_patches_live_in_the_joint_space(build: Any, name: str) -> None:
    """Where the mean is all that stands between patches and image, the patches' mean is the image's feature."""
    out = (tower := expose_tokens(build(*ALL[name])))(images(tower), patches=True)
    close(out.patch_BPX.mean(dim=1), out.image_BD, 1e-9)


PREFIX = {"timm registers, fc_norm, layer scale": (1, False), "timm SigLIP": (0, False), "BEiT": (1, True)}


@pytest.mark.parametrize("name", [*PREFIX, "timm class token", "EfficientNet", "Swin"])
def test_prefix_tokens_are_told(build: Any, name: str) -> None:
    tower = expose_tokens(build(*ALL[name]))
    default = (1, True) if name == "timm class token" else (0, False)
    assert (tower.num_prefix_tokens, tower.has_class_token) == PREFIX.get(name, default)


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_asked_for_costs_nothing(build: Any, name: str) -> None:
    visual = build(*ALL[name])
    image_BCHW = images(visual)

    def count(**asked: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            visual(image_BCHW, **asked)
        return int(counter.get_total_flops())

    plain = count()
    expose_tokens(visual)
    assert count() == plain
    trunk = count(image=False)
    assert trunk < plain  # the projection at least is left out
    assert count(image=False, latents=True) == trunk
    assert count(patches=True) >= plain
    if name == "open_clip":
        assert (count(patches=True) - plain) == 16 * (plain - trunk)


@pytest.mark.parametrize("name", VITS)
def test_all_patches_visible_is_the_whole_image_in_any_order(build: Any, name: str) -> None:
    tower = expose_tokens(build(*VITS[name]))
    image_BCHW, num_patches = images(tower), math.prod(tower.grid_size)
    whole = tower(image_BCHW, patches=True, latents=True)
    generator = torch.Generator().manual_seed(2)
    visible_BV = torch.stack([torch.randperm(num_patches, generator=generator) for _ in range(2)])
    some = tower(image_BCHW, visible_BV, patches=True, latents=True)
    back_BV = visible_BV.argsort(dim=1).unsqueeze(-1)
    close(some.image_BD, whole.image_BD)
    close(some.patch_BPX.take_along_dim(back_BV, dim=1), whole.patch_BPX)
    prefix = tower.num_prefix_tokens
    close(some.latent_BTW[:, :prefix], whole.latent_BTW[:, :prefix])
    close(some.latent_BTW[:, prefix:].take_along_dim(back_BV, dim=1), whole.latent_BTW[:, prefix:])


@pytest.mark.parametrize("name", VITS)
def test_masked_patches_are_not_seen(build: Any, name: str) -> None:
    tower = expose_tokens(build(*VITS[name]))
    side = tower.grid_size[0]
    patch = images(tower).shape[-1] // side
    visible_BV = torch.tensor([[0, side + 1, 2 * side + 2, side * side - 1]])
    before = images(tower, 1)
    hidden, seen = before.clone(), before.clone()
    hidden[:, :, :patch, patch:] = 7.0  # the first row without place 0: masked
    seen[:, :, patch : 2 * patch, patch : 2 * patch] = 7.0  # place side + 1
    outputs = [tower(image, visible_BV, patches=True, latents=True) for image in (before, hidden, seen)]
    for first, second, third in zip(*outputs, strict=True):
        assert torch.equal(first, second)
        assert (first - third).abs().max() > 1e-6
    # a part of the image is not the whole
    assert (outputs[0].image_BD - tower(before).image_BD).abs().max() > 1e-6


def test_patch_features_belong_to_their_places(build: Any) -> None:
    """Without attention between places, changing one patch of the image changes that patch's feature alone."""
    tower = expose_tokens(build(VIT | {"layers": 0}, {}))
    before = images(tower, 1)
    after = before.clone()
    after[:, :, 12:24, 36:48] += 1  # row 1, column 3 of the 4 x 4 grid
    moved = tower(after, patches=True).patch_BPX - tower(before, patches=True).patch_BPX
    assert (moved.abs().sum(-1)[0] > 1e-9).nonzero().flatten().tolist() == [1 * 4 + 3]


@pytest.mark.parametrize("name", ["EfficientNet", "Swin", "CLIP ResNet"])
def test_a_maps_places_are_row_by_row(build: Any, name: str) -> None:
    """Blanking the image's upper third moves the places of the upper rows more than those of the lowest."""
    px = 128 if name == "Swin" else 192
    tower = expose_tokens(build(ALL[name][0] | {"image_size": px}, ALL[name][1]))
    before = images(tower, 1)
    after = before.clone()
    after[:, :, : px // 3] = 0
    moved_BPX = tower(after, patches=True).patch_BPX - tower(before, patches=True).patch_BPX
    by_row = moved_BPX.norm(dim=-1)[0].reshape(tower.grid_size).mean(dim=1)
    assert by_row[0] > 2 * by_row[-1]


@pytest.mark.parametrize("name", ["open_clip", "timm registers, attention", "BEiT", "ConvNeXt"])
def test_activation_checkpointing_changes_nothing(build: Any, name: str) -> None:
    plain, cheap = (
        expose_tokens(build(*ALL[name], activation_checkpointing=checkpointed)).train()
        for checkpointed in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), cheap.parameters(), strict=True))
    visible_BV = torch.tensor([[0, 3, 5], [9, 2, 1]]) if plain.can_drop_patches else None
    calls = {}
    for tower in (plain, cheap):
        blocks = [m for m in tower.modules() if type(m).__name__.endswith("Block")]
        calls[tower] = 0

        def count(*_: Any, tower: Any = tower) -> None:
            calls[tower] += 1

        for block in blocks:
            block.register_forward_pre_hook(count)
        out = tower(images(tower), visible_BV, patches=True, latents=True)
        sum(o.square().sum() for o in out).backward()
    for (name, mine), theirs in zip(cheap.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            close(mine.grad, theirs.grad)
    assert calls[cheap] == 2 * calls[plain] > 0  # computed again in the backward


def test_a_tower_that_cannot_checkpoint_says_so(build: Any) -> None:
    with pytest.raises(InputError, match=r"activation_checkpointing: ModifiedResNet .* leave it off"):
        build(RESNET, {}, activation_checkpointing=True)


@pytest.mark.parametrize("name", ["open_clip", "timm class token", "timm SigLIP", "BEiT", "EfficientNet"])
def test_another_resolution(build: Any, name: str) -> None:
    vision_cfg, narrow = ALL[name]
    px = 2 * vision_cfg["image_size"]
    tower = expose_tokens(build(vision_cfg, narrow, image_size=px))
    assert tower.grid_size == (8, 8) if name != "EfficientNet" else (4, 4)
    assert tuple(tower.image_size) == (px, px) and tuple(tower.preprocess_cfg["size"]) == (px, px)
    out = tower(images(tower), latents=True)
    assert out.latent_BTW.shape[1] == tower.num_prefix_tokens + math.prod(tower.grid_size)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (VIT | {"patch_dropout": 0.5}, "patch_dropout loses track"),
    (timm_cfg("test_vit") | {"patch_dropout": 0.5}, "patch_dropout loses track"),
    (VIT | {"pool_type": "none"}, "gives no single image feature"),
    (timm_cfg("volo_d1_224", 224), "VOLO gives features of shape .*no token for each patch"),
    (timm_cfg("crossvit_tiny_240", 240), "CrossVit gives several feature maps"),
    (timm_cfg("mobilenetv3_small_050"), "MobileNetV3 does not run behind open_clip's adapter"),
    (timm_cfg("test_vit2", proj=None), "VisionTransformer gives image features of shape .*set vision_cfg.timm_pool"),
]


@pytest.mark.parametrize(("vision_cfg", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_towers_that_give_no_patches_are_refused(build: Any, vision_cfg: dict[str, Any], reason: str) -> None:
    visual = build(vision_cfg, {})
    with pytest.raises(InputError, match=reason):
        expose_tokens(visual)


def test_a_tower_is_described_without_being_run(build: Any) -> None:
    """On the meta device: no batch statistics move, and the mode it was in stays."""
    visual = build(*OTHERS["EfficientNet"]).train()
    before = copy.deepcopy(visual.state_dict())
    tower = expose_tokens(visual)
    assert isinstance(tower, TokenTimmModel) and not isinstance(tower, TokenVisionTransformer)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert all(module.training for module in tower.modules())
    assert all(parameter.device.type == "cpu" for parameter in tower.parameters())
    assert isinstance(copy.deepcopy(tower), TimmModel) and copy.deepcopy(tower).grid_size == tower.grid_size
