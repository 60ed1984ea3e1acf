"""Validation while training goes on: right, the same however the run is spread, and without a trace in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pretrain.evaluation.in_training as in_training
from data_prep.config_file import load_config
from data_prep.errors import InputError
from pretrain.cli import main
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.evaluation.encoding.encoders import load_encoder
from pretrain.evaluation.encoding.features import shard_features
from pretrain.evaluation.in_training import make_validator
from pretrain.evaluation.results import read_result
from pretrain.train.curves import loss_curves
from pretrain.train.loop import train
from pretrain.train.metrics import read_metrics
from pretrain.train.retention import list_checkpoints, step_of
from pretrain.train.state import build_trainer
from pretrain.train.trainer import Trainer
from tests.integration.conftest import val_dir, write_config
from tests.integration.test_train import losses, run, weights
from tests.reference import loops

CPU = torch.device("cpu")


def validations(run_dir: str | Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(Path(run_dir) / "metrics.jsonl") if "val/loss" in record]


def with_validation(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return config | {"validation": {"val_dir": val_dir(config), "every": 2} | changes}


def values_of(config: dict[str, Any], **changes: Any) -> dict[str, float]:
    """Of the model that a run begins with."""
    parsed = TrainConfig.model_validate(with_validation(config, **changes))
    trainer, _ = build_trainer(parsed, CPU)
    validate = make_validator(trainer, trainer.config)
    assert validate is not None
    return validate()


def test_equals_the_evaluation_of_the_checkpoint(run_config: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", with_validation(run_config, every=3) | {"num_steps": 6})
    assert main(["train", str(path)]) == 0
    run_dir = Path(run_config["run_dir"])
    found = validations(run_dir)
    assert [values["step"] for values in found] == [3, 6]
    names = ["loss", "loss/clip", "loss/multi_aspect", "loss/local_alignment"]
    names += ["retrieval/mean_recall", "zero_shot/balanced_accuracy"]
    assert list(found[0]) == ["step", *(f"val/{name}" for name in names)]
    for values in found:
        checkpoint = run_dir / "checkpoints" / f"step-{values['step']:08d}"
        out = tmp_path / checkpoint.name
        tasks = ["--tasks", "zero_shot,retrieval"]
        tasks += ["--set", "settings.num_workers=0"]
        assert main(["evaluate", str(checkpoint), "--data", val_dir(run_config), "--out", str(out), *tasks]) == 0
        classified, retrieved = read_result(out).tasks
        assert values["val/retrieval/mean_recall"] == retrieved.metrics["mean_recall"].value
        accuracy = classified.metrics["balanced_accuracy"].value
        assert values["val/zero_shot/balanced_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert found[0]["val/loss"] != found[1]["val/loss"]
    curves = loss_curves(run_dir)
    assert [step for step, _ in curves["val/loss"]] == [3, 6] and len(curves["clip"]) == 6
    record = json.loads((run_dir / "checkpoints" / "step-00000006" / "meta.json").read_text())["record"]
    best = min(found, key=lambda values: values["val/loss"])
    assert (record["best_step"], record["best_value"]) == (best["step"], best["val/loss"])


@pytest.mark.parametrize("best_by", ["retrieval", "zero_shot"])
def test_the_best_checkpoint_by_another_measure(run_config: dict[str, Any], tmp_path: Path, best_by: str) -> None:
    """A validation after every step, whose values rise and fall; all but the best and the last are removed."""
    run_config |= {"num_steps": 4, "optimizer": {"warmup_steps": 1, "lr": 0.01}}
    run_config |= {"checkpoint": {"every": 4, "keep_last": 1, "best_by": best_by}}
    train(TrainConfig.model_validate(with_validation(run_config, every=1)), make_validator)
    name = {"retrieval": "val/retrieval/mean_recall", "zero_shot": "val/zero_shot/balanced_accuracy"}[best_by]
    found = validations(run_config["run_dir"])
    best = max(found, key=lambda values: values[name])  # the first of equal ones
    kept = {step_of(path) for path in list_checkpoints(Path(run_config["run_dir"]))}
    assert kept == {best["step"], 4}
    run_dir = Path(run_config["run_dir"])
    chosen = load_encoder(run_dir / "checkpoints" / "best").info.digest
    assert chosen == load_encoder(run_dir / "checkpoints" / f"step-{best['step']:08d}").info.digest


def test_retrieval_cannot_choose_where_there_is_one_caption(run_config: dict[str, Any]) -> None:
    run_config |= {"checkpoint": {"best_by": "retrieval"}}
    with pytest.raises(InputError, match=r"best_by: retrieval: .* fewer than two distinct captions"):
        values_of(run_config, max_num_samples=1)


def test_a_best_checkpoint_that_is_not_there_is_named(run_config: dict[str, Any]) -> None:
    run_config |= {"num_steps": 2, "optimizer": {"warmup_steps": 1}}
    train(TrainConfig.model_validate(run_config), make_validator)
    best = Path(run_config["run_dir"]) / "checkpoints" / "best"
    with pytest.raises(InputError, match="no validation has chosen a best checkpoint"):
        load_encoder(best)
    newest = best.parent / "step-00000002" / "meta.json"
    meta = json.loads(newest.read_text())
    newest.write_text(json.dumps(meta | {"record": meta["record"] | {"best_step": 1}}))
    with pytest.raises(InputError, match="step 1 was the best, and its checkpoint is not kept"):
        load_encoder(best)


def test_a_measure_that_the_split_cannot_give_is_refused_at_once(run_config: dict[str, Any]) -> None:
    run_config |= {
        "checkpoint": {"best_by": "zero_shot"},
        "objectives": [o for o in run_config["objectives"] if o["kind"] == "masked_latent"],
    }
    with pytest.raises(InputError, match=r"checkpoint.best_by: zero_shot: without a contrastive term"):
        values_of(run_config)


def test_the_loss_is_that_of_the_objective_over_batches_spread_over_the_split(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Against the loop-written reference, from the features that evaluation gives."""
    run_config |= {"objectives": [{"kind": "clip"}], "num_steps": 2, "optimizer": {"warmup_steps": 1}}
    train(
        load_config(write_config(tmp_path / "run.yaml", with_validation(run_config)), [], TrainConfig), make_validator
    )
    (values,) = validations(run_config["run_dir"])
    encoder, data = load_encoder(Path(run_config["run_dir"])), ShardedDataset(val_dir(run_config))
    captions = [[("caption", data.read_sample(position).caption)] for position in range(len(data))]
    image_ND = torch.from_numpy(shard_features(encoder, data)).double()
    texts = sorted({text for image in captions for _, text in image})
    text = dict(zip(texts, torch.from_numpy(encoder.encode_texts(texts)).double(), strict=True))
    expected = []
    for first in range(3):  # 24 samples in batches of 8
        chosen = list(range(first, 24, 3))
        expected.append(reference_clip_loss(image_ND[chosen], text, [captions[i] for i in chosen], encoder.logit_scale))
    assert values["val/loss"] == pytest.approx(float(np.mean(expected)), rel=1e-5)


def reference_clip_loss(image_BD: Tensor, text: dict[str, Tensor], captions: Any, scale: float) -> float:
    weights = [[1.0] * len(image) for image in captions]
    return float(loops.contrastive(image_BD, text, captions, weights, {"caption"}, torch.tensor(scale).double()))


@pytest.mark.parametrize("size", [None, 4])
def test_a_run_with_validation_is_bit_equal_to_one_without(
    run_config: dict[str, Any], tmp_path: Path, size: int | None
) -> None:
    run_config |= {"num_steps": 4, "micro_batch_size": size}
    with_it = with_validation(run_config, every=1) | {"run_dir": str(tmp_path / "with")}
    without = run_config | {"run_dir": str(tmp_path / "without")}
    for config in (with_it, without):
        train(TrainConfig.model_validate(config), make_validator)
    assert len(validations(with_it["run_dir"])) == 4
    steps = [record for record in losses(with_it["run_dir"]) if "loss" in record]
    assert steps == losses(without["run_dir"])
    expected = weights(without["run_dir"], 4)
    for name, tensor in weights(with_it["run_dir"], 4).items():
        assert torch.equal(tensor, expected[name]), name


def test_nothing_of_the_trainer_is_changed(run_config: dict[str, Any], tmp_path: Path) -> None:
    """A convolutional tower whose statistics move, a frozen text tower, dropout drawn from torch's state."""
    vision = {"timm_model_name": "resnet50", "image_size": 48, "timm_pool": "avg", "timm_proj": "linear"}
    document = json.loads(Path(run_config["model"]["name"]).read_text())["model_cfg"] | {"vision_cfg": vision}
    model = tmp_path / "resnet.json"
    model.write_text(json.dumps({"model_cfg": document}))
    run_config["model"] = {"name": str(model), "tiny": True, "freeze_batch_norm": False, "text": {"frozen": True}}
    config = TrainConfig.model_validate(with_validation(run_config | {"objectives": [{"kind": "clip"}]}))
    trainer, _ = build_trainer(config, CPU)
    validate = make_validator(trainer, trainer.config)
    assert validate is not None

    def state(trainer: Trainer) -> tuple[dict[str, Tensor], Tensor, dict[str, bool]]:
        values = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        modes = {name: module.training for name, module in trainer.model.named_modules()}
        return values, torch.get_rng_state(), modes

    values, random, modes = state(trainer)
    assert any("running_mean" in name for name in values) and modes["visual"] and not modes["text"]
    first = validate()
    values_after, random_after, modes_after = state(trainer)
    assert all(torch.equal(values[name], values_after[name]) for name in values)
    assert torch.equal(random, random_after) and modes == modes_after
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    torch.rand(3)
    assert validate() == first


def test_micro_batches_give_the_same_values(run_config: dict[str, Any]) -> None:
    """Also where the last part is smaller: three batches of six, in parts of four."""
    for max_num_samples in (None, 18):
        whole = values_of(run_config, max_num_samples=max_num_samples)
        in_parts = values_of(run_config | {"micro_batch_size": 4}, max_num_samples=max_num_samples)
        assert in_parts == pytest.approx(whole, rel=1e-5)


def test_masked_latents_alone_have_a_loss_with_fixed_masks(run_config: dict[str, Any]) -> None:
    run_config |= {"objectives": run_config["objectives"][-1:]}
    values = values_of(run_config)
    assert list(values) == ["val/loss", "val/loss/masked_latent"] and values["val/loss"] > 0
    assert values == values_of(run_config)
    parts = values_of(run_config | {"micro_batch_size": 4})
    assert parts == pytest.approx(values, rel=1e-5)


def test_a_shared_view_is_validated_on_the_whole_image(run_config: dict[str, Any]) -> None:
    shared = json.loads(json.dumps(run_config))
    shared["objectives"][-1]["share_view"] = True
    ours, theirs = values_of(shared), values_of(run_config)
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_split_without_diagnoses_has_no_zero_shot(
    run_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_training, "diagnoses", lambda data: ())
    assert "val/zero_shot/balanced_accuracy" not in values_of(run_config)


def test_fewer_samples_are_evenly_spaced(run_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    read = ShardedDataset.read_image
    monkeypatch.setattr(ShardedDataset, "read_image", lambda data, i: seen[-1].append(i) or read(data, i))
    for max_num_samples in (6, 20, None):
        seen.append([])
        values_of(run_config, max_num_samples=max_num_samples)
    assert seen[0] == [0, 4, 8, 12, 16, 20]
    assert len(seen[1]) == 18 and len(set(seen[1])) == 18  # three batches of six
    assert sorted(seen[2]) == list(range(24)) and seen[2][:8] == list(range(0, 24, 3))


def test_refusals(run_config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.*manifest"):
        values_of(run_config, val_dir=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no template list named 'none'"):
        values_of(run_config, templates="none")


def test_ranks_and_engines_agree(run_config: dict[str, Any], tmp_path: Path) -> None:
    """ZeRO 3 on two ranks gathers every weight in every forward: a rank with one more would wait for ever."""
    run_config |= {"num_steps": 2, "optimizer": {"lr": 1e-3, "warmup_steps": 1}}
    path = write_config(tmp_path / "run.yaml", with_validation(run_config, every=1))
    found = {}
    engines = {"plain": (1, "engine.kind=torch"), "zero": (2, "engine.kind=deepspeed", "engine.zero_stage=3")}
    for name, (num_ranks, *overrides) in engines.items():
        result = run(path, num_ranks, f"run_dir={tmp_path / name}", *overrides)
        assert result.returncode == 0, result.stderr[-3000:]
        found[name] = validations(tmp_path / name)
    assert [values["step"] for values in found["zero"]] == [1, 2]
    for ours, theirs in zip(found["zero"], found["plain"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
