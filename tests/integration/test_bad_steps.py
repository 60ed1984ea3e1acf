"""A step whose loss is broken, in real runs: stopped, skipped, gone back from.

One sample of the training split is made poisonous: a batch that holds it multiplies a term's loss, by NaN or by
much. Everything else is the run's own. A learning rate that is absurdly high needs no help.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain.train.loop
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.data.plan import epoch_order
from pretrain.objectives.base import Objective, Term
from pretrain.objectives.features import Features
from pretrain.train.checkpoint import list_checkpoints
from pretrain.train.loop import train
from pretrain.train.metrics import read_metrics
from tests.distributed.run import run_on_ranks
from tests.integration.conftest import write_config
from tests.integration.test_train import run, weights

NAN = float("nan")


class Poisoned:
    """An objective whose loss is multiplied where the batch holds one of some samples."""

    def __init__(self, objective: Objective, samples: list[int], factor: float) -> None:
        self._objective, self._samples, self._factor = objective, torch.tensor(samples), factor
        self.label, self.weight, self.aspects = objective.label, objective.weight, objective.aspects

    def __call__(self, features: Features) -> Term:
        term = self._objective(features)
        is_hit = torch.isin(features.batch.sample_B, self._samples).any()
        return Term(term.loss * torch.where(is_hit, self._factor, 1.0), term.statistics)


def train_poisoned(config: dict[str, Any], steps: list[int], factor: float = NAN) -> Path:
    """A run in which the batches of these steps (from 0) are poisoned, in this process. Returns its folder."""
    with pytest.MonkeyPatch.context() as patch:
        build = pretrain.train.loop.build_trainer

        def build_poisoned(*arguments: Any) -> Any:
            trainer, reader = build(*arguments)
            shard_sizes = ShardedDataset(config["data"]["train_dir"]).shard_sizes
            order = epoch_order(shard_sizes, seed=0, epoch=0, shards_per_block=16)
            samples = [int(order[step * config["global_batch_size"]]) for step in steps]
            trainer.contrastive[0] = Poisoned(trainer.contrastive[0], samples, factor)
            return trainer, reader

        patch.setattr(pretrain.train.loop, "build_trainer", build_poisoned)
        train(TrainConfig.model_validate(config))
    return Path(config["run_dir"])


def with_action(config: dict[str, Any], tmp_path: Path, action: str, **changes: Any) -> dict[str, Any]:
    bad_steps = {"action": action, **changes.pop("bad_steps", {})}
    return config | {"run_dir": str(tmp_path / action), "bad_steps": bad_steps} | changes


def assert_equal_runs(ours: Path, theirs: Path, step: int = 8) -> None:
    expected = weights(theirs, step)
    for name, tensor in weights(ours, step).items():
        assert torch.isfinite(tensor).all() and torch.equal(tensor, expected[name]), name


def steps_with_a_loss(run_dir: Path) -> list[int]:
    return [r["step"] for r in read_metrics(run_dir / "metrics.jsonl") if math.isfinite(r["loss"])]


def test_a_run_that_diverges_stops_and_names_the_step(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks, one message."""
    run_config["optimizer"] = {"lr": 1e30, "warmup_steps": 0, "schedule": "constant"}
    result = run(write_config(tmp_path / "run.yaml", run_config | {"log_every": 3}), 2)
    assert result.returncode != 0 and result.stderr.count("error: ") == 1, result.stderr
    run_dir = Path(run_config["run_dir"])
    (line,) = [json.loads(line) for line in (run_dir / "bad_steps.jsonl").read_text().splitlines()]
    assert line["step"] in (2, 3) and len(line["samples"]) == 8
    assert f"error: step {line['step']}: the " in result.stderr and line["samples"][0]["key"] in result.stderr
    assert list_checkpoints(run_dir) == []


def test_going_back_and_skipping_give_the_same_model(run_config: dict[str, Any], tmp_path: Path) -> None:
    """The poisoned step is not logged (log_every), and found before the checkpoint after it is written."""
    runs = {
        action: train_poisoned(with_action(run_config, tmp_path, action, log_every=8), steps=[4])
        for action in ("skip", "rollback")
    }
    assert_equal_runs(runs["skip"], runs["rollback"])
    for action, run_dir in runs.items():
        (line,) = [json.loads(line) for line in (run_dir / "bad_steps.jsonl").read_text().splitlines()]
        assert (line["step"], line["action"]) == (5, action) and line["losses"]["clip"] == "nan"
        meta = json.loads((list_checkpoints(run_dir)[-1] / "meta.json").read_text())
        assert meta["record"]["passed_over"] == [4]

    clean = Path(run_config["run_dir"])
    train(TrainConfig.model_validate(run_config | {"log_every": 8}))
    theirs = weights(clean, 8)
    assert not all(torch.equal(tensor, theirs[name]) for name, tensor in weights(runs["skip"], 8).items())


def test_several_bad_steps_after_one_checkpoint(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Steps 1 and 2 lie before the first checkpoint but that of step 0; 5 is found as it is logged."""
    runs = {a: train_poisoned(with_action(run_config, tmp_path, a), [1, 2, 5]) for a in ("skip", "rollback")}
    assert_equal_runs(runs["skip"], runs["rollback"])
    for run_dir in runs.values():
        assert steps_with_a_loss(run_dir) == [1, 4, 5, 7, 8]


def test_too_many_bad_steps_end_the_run(run_config: dict[str, Any], tmp_path: Path) -> None:
    for action in ("skip", "rollback"):
        config = with_action(run_config, tmp_path, action, bad_steps={"max_num": 1})
        with pytest.raises(ValueError, match=r"step 7: the loss is nan, of clip .* bad_steps.max_num \(1\)"):
            train_poisoned(config, steps=[4, 6])


def test_a_spike_is_handled_like_any_bad_step(run_config: dict[str, Any], tmp_path: Path) -> None:
    spike = {"spike_factor": 5.0, "window": 3}
    runs = {
        action: train_poisoned(with_action(run_config, tmp_path, action, bad_steps=spike), [6], factor=1000.0)
        for action in ("skip", "rollback")
    }
    assert_equal_runs(runs["skip"], runs["rollback"])
    (line,) = [json.loads(line) for line in (runs["rollback"] / "bad_steps.jsonl").read_text().splitlines()]
    assert line["step"] == 7 and "times the median of the last 3 steps" in line["reason"]
    assert line["losses"]["clip"] > 100 * line["losses"]["multi_aspect"]


def test_accumulated_gradients_are_skipped_too(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Without masked latents before the backward, with them after it."""
    for objectives in (run_config["objectives"][:2], run_config["objectives"]):
        config = run_config | {"objectives": objectives, "micro_batch_size": 4}
        folder = tmp_path / str(len(objectives))
        runs = {a: train_poisoned(with_action(config, folder, a), [4]) for a in ("skip", "rollback")}
        ours, theirs = (
            {path.name: path.read_bytes() for path in (list_checkpoints(run)[-1]).glob("*.safetensors")}
            for run in runs.values()
        )
        assert ours == theirs


def train_on_ranks(configs: list[dict[str, Any]], steps: list[int]) -> None:
    for config in configs:
        train_poisoned(config, steps)


def test_deepspeed_on_two_ranks(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Rank 1 holds nothing poisonous: the step is bad for all. ZeRO 3 has forwards without a backward, then."""
    run_config |= {"engine": {"kind": "deepspeed", "zero_stage": 3}, "num_steps": 6}
    configs = [with_action(run_config, tmp_path, action) for action in ("skip", "rollback")]
    run_on_ranks(train_on_ranks, 2, configs, [4])
    skipped, rolled_back = (Path(config["run_dir"]) for config in configs)
    for run_dir in (skipped, rolled_back):
        assert steps_with_a_loss(run_dir) == [1, 2, 3, 4, 6]
    assert_equal_runs(skipped, rolled_back, step=6)
