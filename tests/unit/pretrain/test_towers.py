"""Towers: open_clip's own outputs, with patch features and masked input beside them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import ModelConfig
from pretrain.models.towers import (
    TokenTimmModel,
    TokenVisionTransformer,
    build_open_clip,
    expose_tokens,
    package_file,
    read_tower_config,
    resolve_packages,
)
from tests.conftest import TINY_MODEL


def build(path: Path, vision_cfg: dict[str, Any]) -> CustomTextCLIP:
    """An open_clip model in float64, in eval mode, its image tower as open_clip made it."""
    path.write_text(json.dumps({"model_cfg": TINY_MODEL | {"vision_cfg": vision_cfg}}), encoding="utf-8")
    torch.manual_seed(0)
    return build_open_clip(ModelConfig(name=str(path))).double().eval()


def images(num: int, px: int = 48) -> Tensor:
    return torch.randn(num, 3, px, px, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


POOLINGS: list[dict[str, Any]] = [
    {},
    {"pool_type": "avg"},
    {"pool_type": "avg", "final_ln_after_pool": True},
    {"no_ln_pre": True},
    {"attentional_pool": True, "attn_pooler_queries": 16, "attn_pooler_heads": 2},
]


@pytest.mark.parametrize("changes", POOLINGS, ids=str)
def test_a_vit_gives_open_clips_features(tmp_path: Path, changes: dict[str, Any]) -> None:
    clip = build(tmp_path / "vit.json", TINY_MODEL["vision_cfg"] | changes)
    expected = clip.visual(images(3))
    plain_state = copy.deepcopy(clip.visual.state_dict())
    tower = expose_tokens(clip.visual)
    assert isinstance(tower, TokenVisionTransformer)
    image_BD, patch = tower(images(3))
    close(image_BD, expected)
    assert patch.shape == (3, 16, 32)
    assert list(tower.state_dict()) == list(plain_state)  # names move both ways without a map
    assert tower.has_linear_pooling is ("attentional_pool" not in changes)
    assert tower.token_width == 32
    if changes == {"pool_type": "avg"}:
        close(patch.mean(dim=1), image_BD)  # so patches live in the joint space


def test_patch_features_belong_to_their_places(tmp_path: Path) -> None:
    """Without attention between places, changing one patch of the image changes that patch's feature alone."""
    clip = build(tmp_path / "vit.json", TINY_MODEL["vision_cfg"] | {"layers": 0})
    tower = expose_tokens(clip.visual)
    before = images(1)
    after = before.clone()
    after[:, :, 12:24, 36:48] += 1  # row 1, column 3 of the 4 x 4 grid
    changed = (tower(after)[1] - tower(before)[1]).abs().sum(-1)[0] > 1e-9
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 3]


def test_all_patches_visible_is_the_whole_image(tmp_path: Path) -> None:
    tower = expose_tokens(build(tmp_path / "vit.json", TINY_MODEL["vision_cfg"]).visual)
    whole = tower(images(3), latents=True)
    assert whole.shape == (3, 17, 32)
    everything = torch.arange(16).expand(3, 16)
    close(tower(images(3), visible_BV=everything), whole)
    # the class token's latent, projected, is open_clip's image feature
    close(whole[:, 0] @ tower.proj, tower(images(3))[0])


def test_the_order_of_visible_patches_does_not_matter(tmp_path: Path) -> None:
    tower = expose_tokens(build(tmp_path / "vit.json", TINY_MODEL["vision_cfg"]).visual)
    generator = torch.Generator().manual_seed(2)
    visible_BV = torch.stack([torch.randperm(16, generator=generator)[:6] for _ in range(3)])
    latent = tower(images(3), visible_BV=visible_BV)
    assert latent.shape == (3, 7, 32)
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    permuted = tower(images(3), visible_BV=visible_BV[:, order])
    close(permuted[:, 0], latent[:, 0])
    close(permuted[:, 1:], latent[:, 1:][:, order])


def test_masked_patches_are_not_seen(tmp_path: Path) -> None:
    tower = expose_tokens(build(tmp_path / "vit.json", TINY_MODEL["vision_cfg"]).visual)
    visible_BV = torch.tensor([[0, 5, 10, 15]])
    before = images(1)
    after = before.clone()
    after[:, :, 0:12, 12:48] = 7.0  # places 1, 2, 3: masked
    close(tower(after, visible_BV=visible_BV), tower(before, visible_BV=visible_BV))
    after[:, :, 12:24, 12:24] = 7.0  # place 5: visible
    assert (tower(after, visible_BV=visible_BV) - tower(before, visible_BV=visible_BV)).abs().max() > 1e-3
    # fewer tokens than the whole, so not the whole's latents
    assert (tower(before, visible_BV=visible_BV)[:, 0] - tower(before, latents=True)[:, 0]).abs().max() > 1e-6


TIMM_CONV: dict[str, Any] = {
    "timm_model_name": "tf_efficientnet_lite0",
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": 96,
}
TIMM_VIT: dict[str, Any] = {
    "timm_model_name": "vit_tiny_patch16_224",
    "timm_pool": "avg",
    "timm_proj": "linear",
    "image_size": 224,
}


@pytest.mark.parametrize(("vision_cfg", "num_patches"), [(TIMM_CONV, 9), (TIMM_VIT, 196)], ids=["convolutional", "vit"])
def test_a_timm_tower_gives_open_clips_features(tmp_path: Path, vision_cfg: dict[str, Any], num_patches: int) -> None:
    clip = build(tmp_path / "timm.json", {"timm_model_pretrained": False, **vision_cfg})
    batch = images(2, vision_cfg["image_size"])
    expected = clip.visual(batch)
    tower = expose_tokens(clip.visual)
    assert isinstance(tower, TokenTimmModel) and tower.has_linear_pooling
    image_BD, patch_BPD = tower(batch)
    close(image_BD, expected)
    assert patch_BPD.shape == (2, num_patches, 32) and patch_BPD.std(dim=1).min() > 0
    if vision_cfg is TIMM_CONV:
        close(patch_BPD.mean(dim=1), image_BD, 1e-9)  # average pooling is linear: patches live in the joint space


def test_a_convolutional_towers_places_are_row_by_row(tmp_path: Path) -> None:
    """Blanking the image's upper half leaves the lowest row of places, out of reach of it, closest to what it was."""
    clip = build(tmp_path / "timm.json", {"timm_model_pretrained": False, **TIMM_CONV, "image_size": 192})
    tower = expose_tokens(clip.visual)
    before = images(1, 192)
    after = before.clone()
    after[:, :, :64] = 0
    moved = (tower(after)[1] - tower(before)[1]).norm(dim=-1)[0].reshape(6, 6).mean(dim=1)
    assert moved[:2].min() > moved[4:].max()


def test_towers_without_patch_tokens_are_refused(tmp_path: Path) -> None:
    clip = build(tmp_path / "resnet.json", {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16})
    with pytest.raises(InputError, match="ModifiedResNet gives no patch tokens; use a ViT or timm tower"):
        expose_tokens(clip.visual)


def test_configs_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'ViT-Z-1' is unknown to open_clip"):
        read_tower_config("ViT-Z-1")
    with pytest.raises(InputError, match="no such file; model configs are under configs/models/"):
        read_tower_config(str(tmp_path / "none.json"))
    (tmp_path / "empty.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"empty.json: expected JSON with a key model_cfg"):
        read_tower_config(str(tmp_path / "empty.json"))
    with pytest.raises(InputError, match="'no_such_package_here' is not installed"):
        package_file("no_such_package_here/model")


def test_package_names_become_folders_in_a_copy() -> None:
    cfg: dict[str, Any] = {
        "embed_dim": 1,
        "text_cfg": {"hf_model_name": "package:open_clip/model_configs", "hf_tokenizer_name": "other"},
    }
    resolved = resolve_packages(cfg)
    assert (Path(resolved["text_cfg"]["hf_model_name"]) / "ViT-B-16.json").is_file()
    assert resolved["text_cfg"]["hf_tokenizer_name"] == "other"
    assert cfg["text_cfg"]["hf_model_name"] == "package:open_clip/model_configs"
