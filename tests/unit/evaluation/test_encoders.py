"""Encoders by name, against open_clip's own loading of the same folders, and layers against direct computation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.evaluation.encoding.encoders import load_encoder, untrained_encoder
from pretrain.evaluation.encoding.tower_layers import layer_taps, read_layers
from pretrain.evaluation.interfaces import JOINT, TOWER, Encoder
from pretrain.models.image_towers import expose_tokens
from tests.unit.evaluation.models import MODELS, NEEDS_TOKENIZER, picture, save_model

TEXTS = ["a brown macule", "Itchy red plaques on both elbows; silvery scale!", "nevus", ""]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("clip") / "model", MODELS["clip"])


# ------------------------------------------------------------------------------------------------ against open_clip


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=NEEDS_TOKENIZER if kind in ("siglip", "hf_text") else ()) for kind in MODELS]
)
def test_features_are_those_of_open_clip(kind: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", MODELS[kind])
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", pretrained_text=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    images = [picture(seed) for seed in range(3)]
    with torch.no_grad():
        image_BD = model.eval().encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        text_TD = model.encode_text(tokenizer(TEXTS), normalize=True)

    encoder = load_encoder(folder)
    ours_BD = encoder.encode_pixels(torch.stack([encoder.transform(image) for image in images]))
    assert ours_BD.dtype == torch.float32
    assert (ours_BD - image_BD).abs().max() < 1e-6
    assert np.abs(encoder.encode_texts(TEXTS) - text_TD.numpy()).max() < 1e-6
    assert encoder.logit_scale == pytest.approx(np.exp(3.0))
    assert (encoder.info.kind, encoder.info.embed_dim) == ("export", MODELS[kind]["embed_dim"])
    assert not encoder.model.training


def test_many_texts_come_back_in_their_order(clip_folder: Path) -> None:
    encoder = load_encoder(clip_folder)
    texts = [" ".join(["word"] * (1 + number % 17) + [str(number)]) for number in range(130)]  # more than two batches
    together = encoder.encode_texts(texts)
    for number in (0, 63, 64, 129):
        assert np.abs(encoder.encode_texts([texts[number]])[0] - together[number]).max() < 1e-6
    with pytest.raises(InputError, match="no text"):
        encoder.encode_texts([])


def test_the_packed_texts_of_a_run_equal_padded_ones(tiny_model_path: Path, tmp_path: Path) -> None:
    encoder = untrained(tiny_model_path, tmp_path)
    padded = open_clip.SimpleTokenizer(context_length=64)(TEXTS)
    with torch.no_grad():
        expected = F.normalize(encoder.model.text(padded), dim=-1).numpy()
    assert encoder.tokenizer.can_trim
    assert np.abs(encoder.encode_texts(TEXTS) - expected).max() < 1e-6


def untrained(tiny_model_path: Path, folder: Path) -> Any:
    config = TrainConfig.model_validate(
        {
            "run_dir": folder / "run",
            "data": {"train_dir": folder},
            "model": {"name": str(tiny_model_path)},
            "objectives": [{"kind": "clip"}],
            "global_batch_size": 8,
            "num_steps": 8,
            "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        }
    )
    return untrained_encoder(config)


# ------------------------------------------------------------------------------------------------ names


def test_a_folder_by_its_path_or_with_local_dir_is_the_same(clip_folder: Path) -> None:
    by_path, by_name = load_encoder(clip_folder), load_encoder(f"local-dir:{clip_folder}")
    assert by_path.info.digest == by_name.info.digest
    assert by_name.info.name == f"local-dir:{clip_folder}"


def test_the_digest_tells_weights_and_preprocessing_apart(clip_folder: Path, tmp_path: Path) -> None:
    digests = {load_encoder(clip_folder).info.digest}
    weights = shutil.copytree(clip_folder, tmp_path / "weights") / "open_clip_model.safetensors"
    state = load_file(weights)
    state["visual.proj"][0, 0] += 1e-4
    save_file(state, weights)
    digests.add(load_encoder(weights.parent).info.digest)
    config = shutil.copytree(clip_folder, tmp_path / "config") / "open_clip_config.json"
    config.write_text(config.read_text().replace("0.5, 0.4, 0.3", "0.5, 0.4, 0.4"))
    digests.add(load_encoder(config.parent).info.digest)
    assert len(digests) == 3


@pytest.fixture
def named_models(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """open_clip's register with a tiny architecture in both of its forms, whose weights are "downloaded" from here."""
    folder = tmp_path / "register"
    folder.mkdir()
    for name, quick_gelu in (("ViT-T-9", False), ("ViT-T-9-quickgelu", True)):
        (folder / f"{name}.json").write_text(json.dumps(MODELS["clip"] | {"quick_gelu": quick_gelu}))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS, folder])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    open_clip.factory._rescan_model_configs()
    tags = {"openai": {"quick_gelu": True, "mean": (0.1, 0.2, 0.3)}, "laion": {"mean": (0.1, 0.2, 0.3)}}
    register = open_clip.pretrained._PRETRAINED
    for name in ("ViT-T-9", "ViT-T-9-quickgelu"):
        monkeypatch.setitem(register, name, {tag: {"url": tag, "hf_hub": "", **cfg} for tag, cfg in tags.items()})
    weights = clip_folder / "open_clip_model.safetensors"
    monkeypatch.setattr("pretrain.models.weights.download_pretrained", lambda cfg, **_: str(weights))
    return weights


@pytest.mark.parametrize("name", ["ViT-T-9/openai", "ViT-T-9:openai", "ViT-T/9:openai", "ViT-T-9-quickgelu/openai"])
def test_an_open_clip_name_takes_the_activation_of_its_weights(name: str, named_models: Path) -> None:
    encoder = load_encoder(name)
    model = open_clip.create_model("ViT-T-9-quickgelu", pretrained=str(named_models))
    image_BCHW = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.eval().encode_image(image_BCHW, normalize=True)
    assert (encoder.encode_pixels(image_BCHW) - expected).abs().max() < 1e-6
    assert list(encoder.model.visual.preprocess_cfg["mean"]) == [0.1, 0.2, 0.3]
    assert (encoder.info.name, encoder.info.kind) == (name, "open_clip")
    assert encoder.info.digest != load_encoder("ViT-T-9/laion").info.digest  # the same tensors, another activation


def test_a_repository_of_the_hub(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client replaced by the folder; tests/hub speaks to a server."""
    monkeypatch.setattr("pretrain.models.open_clip_config.hf_hub_download", lambda repo, name: str(clip_folder / name))
    weights = str(clip_folder / "open_clip_model.safetensors")
    monkeypatch.setattr("pretrain.models.weights.download_pretrained_from_hf", lambda repo: weights)
    encoder = load_encoder("hf-hub:org/derm")
    assert encoder.info.kind == "hub"
    assert encoder.info.digest == load_encoder(clip_folder).info.digest


# ------------------------------------------------------------------------------------------------ what can go wrong


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/none", r"runs/none: no such folder, and no model of open_clip; a model is a run"),
        ("ViT-B16/openai", r"nearest of open_clip's: .*ViT-B-16"),
        ("vit-l-14/openai", r"nearest of open_clip's: .*ViT-L-14"),
        ("ViT-B-16", r"an architecture without weights; give ViT-B-16/TAG, with one of: .*openai"),
        ("ViT-B/16", r"an architecture without weights"),
        ("ViT-B-16/derm", r"no weights 'derm' of ViT-B-16; it has: .*openai"),
        ("local-dir:none", r"local-dir:none: no such folder; `dermvlp export"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_encoder(name)


def test_folders_and_files_that_are_no_model(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint here; train"):
        load_encoder(tmp_path)
    with pytest.raises(InputError, match="a file; a model is"):
        load_encoder(clip_folder / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=r"no open_clip_config\.json in that folder"):
        load_encoder(f"local-dir:{tmp_path}")


def test_a_repository_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"hf-hub:org/derm.*cannot be had from the Hub"):
        load_encoder("hf-hub:org/derm")


def test_weights_that_are_torn_or_of_another_model(clip_folder: Path, tmp_path: Path) -> None:
    torn = shutil.copytree(clip_folder, tmp_path / "torn") / "open_clip_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cannot be read as tensors alone"):
        load_encoder(torn.parent)
    other = shutil.copytree(clip_folder, tmp_path / "other") / "open_clip_config.json"
    other.write_text(other.read_text().replace('"embed_dim": 32', '"embed_dim": 24'))
    with pytest.raises(InputError, match=r"other shape .*visual\.proj") as caught:
        load_encoder(other.parent)
    assert "max_missing" not in str(caught.value).split("\n")[-1]  # a remedy of training configs
    lacking = shutil.copytree(clip_folder, tmp_path / "lacking")
    document = json.loads((lacking / "open_clip_config.json").read_text())
    del document["model_cfg"]["text_cfg"]
    (lacking / "open_clip_config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="has no 'text_cfg'"):
        load_encoder(lacking)


def test_a_pickle_that_would_run_code_is_not_read(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "pickle")
    (folder / "open_clip_model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    torch.save({"state_dict": Code()}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as tensors alone"):
        load_encoder(folder)
    assert not marker.exists()


@NEEDS_TOKENIZER
def test_a_config_cannot_ask_for_code_of_its_own(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", MODELS["hf_text"])
    document = json.loads((folder / "open_clip_config.json").read_text())
    document["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="trust_remote_code"):
        load_encoder(folder)


# ------------------------------------------------------------------------------------------------ layers


def tower_of(visual: torch.nn.Module, image_BCHW: Tensor, layer: str) -> Tensor:
    with torch.no_grad():
        return read_layers(visual, image_BCHW, {layer: layer_taps(visual)[layer]})[1][layer]


@pytest.mark.parametrize("kind", ["clip", "coca"])
@pytest.mark.parametrize("of_training", [False, True])
def test_layers_of_open_clips_vit(kind: str, of_training: bool) -> None:
    torch.manual_seed(0)
    visual = open_clip.model._build_vision_tower(32, open_clip.CLIPVisionCfg(**MODELS[kind]["vision_cfg"])).eval()
    image_BCHW = torch.randn(3, 3, 48, 48)
    projection, visual.proj = visual.proj, None
    with torch.no_grad():
        output = visual(image_BCHW)
        pooled = output[0] if isinstance(output, tuple) else output  # without its projection
        blocks = visual.forward_intermediates(image_BCHW, output_fmt="NLC")["image_intermediates"]
    visual.proj = projection
    if of_training:
        expose_tokens(visual)
    assert list(layer_taps(visual)) == [TOWER, "block.0", "block.1"]
    assert torch.equal(tower_of(visual, image_BCHW, TOWER), pooled)
    for number, token_BTW in enumerate(blocks):
        assert torch.allclose(tower_of(visual, image_BCHW, f"block.{number}"), token_BTW.mean(1), atol=1e-6)
    assert not visual.transformer._forward_hooks  # nothing stays behind


@pytest.mark.parametrize("of_training", [False, True])
@pytest.mark.parametrize(
    ("name", "pool", "proj", "width"),
    [
        ("test_vit", "token", "linear", 64),
        ("test_vit", "map", "none", 64),  # SigLIP: its pooled output is the joint feature
        ("test_vit", "avg", "", 64),  # timm's classifier is the projection
        ("test_resnet", "avg", "mlp", 96),
        ("test_efficientnet", "avg", "", 256),
    ],
)
def test_tower_layer_of_timm(name: str, pool: str, proj: str, width: int, of_training: bool) -> None:
    torch.manual_seed(0)
    visual = TimmModel(name, 32, 160, pool=pool, proj=proj).eval()
    image_BCHW = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = visual.trunk.forward_head(visual.trunk.forward_features(image_BCHW), pre_logits=True)
    if of_training:
        expose_tokens(visual)
    found = tower_of(visual, image_BCHW, TOWER)
    assert found.shape == (2, width)
    assert torch.allclose(found, expected, atol=1e-6)


def test_blocks_of_a_timm_vit() -> None:
    torch.manual_seed(0)
    visual = TimmModel("test_vit", 32, 160, pool="token", proj="linear").eval()
    image_BCHW = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        blocks = visual.trunk.forward_intermediates(image_BCHW, output_fmt="NLC", intermediates_only=True, norm=False)
    for number, token_BTW in enumerate(blocks):
        assert torch.allclose(tower_of(visual, image_BCHW, f"block.{number}"), token_BTW.mean(1), atol=1e-6)


def test_towers_whose_pooling_projects_give_the_mean_of_their_places() -> None:
    torch.manual_seed(0)
    visual = ModifiedResNet([1, 1, 1, 1], output_dim=32, heads=2, image_size=64, width=8).eval()
    image_BCHW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        map_BWHW = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(image_BCHW)))))
    assert torch.allclose(tower_of(visual, image_BCHW, TOWER), map_BWHW.mean((2, 3)))
    assert list(layer_taps(visual)) == [TOWER]


def test_the_bit_recipe_gives_its_6144_features() -> None:
    """On the meta device: shapes, without the 382 million weights."""
    path = Path(__file__).parents[3] / "configs" / "models" / "bit101x3_pubmedbert256.json"
    vision = json.loads(path.read_text())["model_cfg"]["vision_cfg"]
    with torch.device("meta"):
        visual = TimmModel(
            vision["timm_model_name"], 512, vision["image_size"], pool=vision["timm_pool"], proj=vision["timm_proj"]
        ).eval()
        image_BCHW = torch.zeros(2, 3, vision["image_size"], vision["image_size"])
    assert tower_of(visual, image_BCHW, TOWER).shape == (2, 6144)


def test_layer_names_are_checked(clip_folder: Path) -> None:
    encoder: Encoder = load_encoder(clip_folder)
    assert encoder.layers == (JOINT, TOWER, "block.0", "block.1")
    with pytest.raises(InputError, match=r"layer 'blocks\.1': .* has joint, tower, block\.0 to block\.1"):
        encoder.encode_pixels(torch.zeros(1, 3, 48, 48), "blocks.1")
