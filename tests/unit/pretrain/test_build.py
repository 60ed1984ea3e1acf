"""From a name to a model: where configs are read from, what is built, what it starts with."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_prep.errors import InputError
from pretrain.config import ModelConfig
from pretrain.models.build import PixelNormaliser, build_open_clip, build_tokenizer, eval_transform, image_px
from pretrain.models.open_clip_config import package_file, read_open_clip_config, resolve_packages, resolved_spec
from tests.conftest import TINY_MODEL

MEAN = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
BERT = {"model_type": "bert", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)


def write(path: Path, changes: dict[str, Any] | None = None, preprocess: dict[str, Any] | None = None) -> Path:
    document = {"model_cfg": TINY_MODEL | (changes or {}), "preprocess_cfg": preprocess or {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_configs_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'ViT-Z-1' is unknown to open_clip"):
        read_open_clip_config("ViT-Z-1")
    with pytest.raises(InputError, match="no such file; model configs are under configs/models/"):
        read_open_clip_config(str(tmp_path / "none.json"))
    (tmp_path / "empty.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"empty.json: expected JSON with a key model_cfg"):
        read_open_clip_config(str(tmp_path / "empty.json"))
    with pytest.raises(InputError, match=r"local-dir:.*: no open_clip_config.json in that folder"):
        read_open_clip_config(f"local-dir:{tmp_path}")
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


def test_a_folder_is_read_wherever_it_was_moved(tmp_path: Path) -> None:
    text_cfg = {"hf_model_name": "/once/here", "hf_tokenizer_name": "/once/here", "context_length": 16}
    write(tmp_path / "moved" / "open_clip_config.json", {"text_cfg": text_cfg}, MEAN)
    name = f"local-dir:{tmp_path / 'moved'}"
    assert read_open_clip_config(name).model_cfg["text_cfg"]["hf_model_name"] == "/once/here"  # nothing better there
    (tmp_path / "moved" / "config.json").write_text(json.dumps(BERT), encoding="utf-8")
    text = read_open_clip_config(name).model_cfg["text_cfg"]
    assert text["hf_model_name"] == text["hf_tokenizer_name"] == str(tmp_path / "moved")
    model = build_open_clip(ModelConfig(name=name), load_pretrained=False)
    assert model.visual.preprocess_cfg["mean"] == MEAN["mean"]
    assert model.text.transformer.config.vocab_size == 99
    # a tower from the Hub stays one, and an absolute path that exists stays too
    for tower in ("org/name", str(tmp_path)):
        write(tmp_path / "moved" / "open_clip_config.json", {"text_cfg": text_cfg | {"hf_model_name": tower}})
        assert read_open_clip_config(name).model_cfg["text_cfg"]["hf_model_name"] == tower


def test_weights_of_a_folder_are_read_only_if_asked_for(tmp_path: Path) -> None:
    """open_clip itself would load them by the name alone."""
    folder = write(tmp_path / "published" / "open_clip_config.json", None, MEAN).parent
    torch.manual_seed(7)
    source = build_open_clip(ModelConfig(name=f"local-dir:{folder}"))
    save_file(source.state_dict(), folder / "open_clip_model.safetensors")
    key = "visual.conv1.weight"
    fresh = build_open_clip(ModelConfig(name=f"local-dir:{folder}"))
    assert not torch.equal(fresh.state_dict()[key], source.state_dict()[key])
    loaded = build_open_clip(ModelConfig(name=f"local-dir:{folder}", pretrained=f"local-dir:{folder}"))
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in source.state_dict().items())
    assert [report.share_loaded for report in loaded.weight_reports] == [1.0] and fresh.weight_reports == []
    # the weights bring their mean to an architecture that has none
    plain = write(tmp_path / "plain.json")
    assert resolved_spec(ModelConfig(name=str(plain))).preprocess_cfg["mean"] == OPENAI_MEAN
    spec = resolved_spec(ModelConfig(name=str(plain), pretrained=f"local-dir:{folder}"))
    assert spec.preprocess_cfg["mean"] == MEAN["mean"]


def test_a_hub_name_is_read_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hf-hub:org/derm: open_clip_config.json cannot be had .* use local-dir:"):
        read_open_clip_config("hf-hub:org/derm")
    repository = tmp_path / "models--org--derm"
    write(repository / "snapshots" / "abc" / "open_clip_config.json", None, MEAN)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    spec = read_open_clip_config("hf-hub:org/derm")
    assert spec.model_cfg == TINY_MODEL and spec.preprocess_cfg == MEAN
    assert build_open_clip(ModelConfig(name="hf-hub:org/derm"), load_pretrained=False).visual.grid_size == (4, 4)


def test_preprocessing_is_the_pretrained_weights() -> None:
    siglip = resolved_spec(ModelConfig(name="ViT-B-16-SigLIP", pretrained="webli")).preprocess_cfg
    assert siglip["mean"] == siglip["std"] == (0.5, 0.5, 0.5) and siglip["resize_mode"] == "squash"
    plain = resolved_spec(ModelConfig(name="ViT-B-16")).preprocess_cfg
    assert plain["mean"] == OPENAI_MEAN and plain["resize_mode"] == "shortest"


@pytest.mark.parametrize("settings", [{}, {"image_size": 72}, {"tiny": True}], ids=str)
def test_the_spec_of_a_model_builds_it_again(tmp_path: Path, settings: dict[str, Any]) -> None:
    """So a checkpoint that keeps it needs neither the config nor the weights that the model came from."""
    name = str(write(tmp_path / "model.json", {"multimodal_cfg": {"width": 32}, "init_logit_scale": 3.0}, MEAN))
    model = build_open_clip(ModelConfig(name=name, **settings))
    assert model.spec == resolved_spec(ModelConfig(name=name, **settings))
    document = asdict(model.spec) | {"preprocess_cfg": model.visual.preprocess_cfg}
    (tmp_path / "again.json").write_text(json.dumps(document), encoding="utf-8")
    again = build_open_clip(ModelConfig(name=str(tmp_path / "again.json")), load_pretrained=False)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert json.dumps(again.visual.preprocess_cfg) == json.dumps(model.visual.preprocess_cfg)
    assert image_px(again.visual) == settings.get("image_size", 48)
    assert model.logit_scale.item() == 3.0 and model.logit_bias is None


@pytest.mark.parametrize(
    ("config_bias", "asked", "in_config", "expected"),
    [
        (None, False, None, None),
        (-7.0, False, -3.0, None),
        (None, True, None, -10.0),
        (-7.0, True, None, -7.0),
        (-7.0, True, -3.0, -3.0),
    ],
)
def test_where_the_bias_starts(
    tmp_path: Path, config_bias: float | None, asked: bool, in_config: float | None, expected: float | None
) -> None:
    name = str(write(tmp_path / "model.json", {} if config_bias is None else {"init_logit_bias": config_bias}))
    model = build_open_clip(ModelConfig(name=name, init_logit_bias=in_config), with_logit_bias=asked)
    if expected is None:
        assert model.logit_bias is None and "logit_bias" not in model.state_dict()
    else:
        assert model.logit_bias.shape == (1,) and model.logit_bias.item() == expected
        assert "init_logit_bias" not in model.spec.model_cfg or config_bias is not None


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("of_sigmoid", [False, True])
def test_where_scale_and_bias_start_with_pretrained_weights(tmp_path: Path, asked: bool, of_sigmoid: bool) -> None:
    name = str(write(tmp_path / "model.json"))
    state = build_open_clip(ModelConfig(name=name)).state_dict()
    state["logit_scale"] = torch.tensor(2.5)
    if of_sigmoid:
        state["logit_bias"] = torch.tensor(-12.0)
    save_file(state, tmp_path / "weights.safetensors")
    weights = {"name": name, "pretrained": str(tmp_path / "weights.safetensors")}
    model = build_open_clip(ModelConfig(**weights), with_logit_bias=asked)  # type: ignore[arg-type]
    assert model.logit_scale.item() == 2.5
    assert (None if model.logit_bias is None else model.logit_bias.item()) == (
        None if not asked else -12.0 if of_sigmoid else -10.0
    )
    model = build_open_clip(
        ModelConfig(**weights, init_logit_scale=20.0, init_logit_bias=-1.0),  # type: ignore[arg-type]
        with_logit_bias=asked,
    )
    assert model.logit_scale.item() == pytest.approx(math.log(20.0))
    assert model.logit_bias is None if not asked else model.logit_bias.item() == -1.0


def test_weights_are_left_unread_where_nobody_needs_them(tmp_path: Path) -> None:
    name = str(write(tmp_path / "model.json"))
    missing = ModelConfig(name=name, pretrained=str(tmp_path / "gone.pt"))
    with pytest.raises(InputError, match=r"model.pretrained: .*gone.pt: not a file"):
        build_open_clip(missing)
    assert build_open_clip(missing, load_pretrained=False).logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert build_open_clip(missing.model_copy(update={"tiny": True})).weight_reports == []


def test_weights_of_another_activation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"another activation than ViT-B-32; use model.name: ViT-B-32-quickgelu"):
        build_open_clip(ModelConfig(name="ViT-B-32", pretrained="openai"))
    # a file does not tell: a config of one's own may have either
    name = str(write(tmp_path / "model.json", {"quick_gelu": True}))
    model = build_open_clip(ModelConfig(name=name, pretrained="somewhere.pt"), load_pretrained=False)
    assert any(isinstance(module, open_clip.transformer.QuickGELU) for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_cfg": {"timm_model_name": "no_such_vit", "image_size": 48}}, "Unknown model"),
        ({"text_cfg": {"hf_model_name": "/no/such/folder", "context_length": 16}}, "/no/such/folder"),
        ({"vision_cfg": TINY_MODEL["vision_cfg"] | {"colour": "blue"}}, "colour"),
    ],
    ids=["timm", "hf", "unknown field"],
)
def test_models_that_cannot_be_built_are_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    name = str(write(tmp_path / "model.json", changes))
    with pytest.raises(InputError, match=rf"model.name: .*model.json cannot be built: .*{reason}"):
        build_open_clip(ModelConfig(name=name), load_pretrained=False)


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    name = str(write(tmp_path / "model.json", {"text_cfg": TINY_MODEL["text_cfg"] | {"hf_tokenizer_name": "/no/such"}}))
    config = ModelConfig(name=name)
    with pytest.raises(InputError, match=r"model.json: its tokenizer '/no/such' cannot be read"):
        build_tokenizer(config, build_open_clip(config).text)


def test_pixels_are_normalised_as_open_clip_does(tmp_path: Path) -> None:
    visual = build_open_clip(ModelConfig(name=str(write(tmp_path / "model.json", None, MEAN)))).visual
    pixels = torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = eval_transform(visual)(Image.fromarray(pixels.numpy()))
    normalise = PixelNormaliser(visual, torch.device("cpu"), torch.float64)
    actual = normalise(pixels.permute(2, 0, 1)[None])
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual[0].float(), expected, rtol=1e-6, atol=1e-6)


def test_a_config_cannot_ask_for_code(tmp_path: Path) -> None:
    """open_clip hands unknown arguments to transformers, which would run a repository's own Python for this one."""
    text = TINY_MODEL["text_cfg"] | {
        "hf_tokenizer_name": str(tmp_path),
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    path = write(tmp_path / "model.json", {"text_cfg": text})
    with pytest.raises(InputError, match=r"tokenizer_kwargs \['trust_remote_code'\] are not taken"):
        build_tokenizer(ModelConfig(name=str(path)), torch.nn.Identity())
