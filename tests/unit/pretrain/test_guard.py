"""Which losses are bad, what is said of them, and what follows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.distributed import comm
from pretrain.objectives.base import Term
from pretrain.train.guard import GoBack, Guard
from pretrain.train.record import RunRecord
from tests.distributed.run import run_on_ranks

NAN = float("nan")


class Watched:
    """A guard with the samples of a prepared split, fed with numbers."""

    def __init__(self, data_dir: Path, run_dir: Path, record: RunRecord | None = None, **bad_steps: Any) -> None:
        precision = bad_steps.pop("precision", "fp32")
        run_dir.mkdir(exist_ok=True)
        config = TrainConfig.model_validate(
            {
                "run_dir": run_dir,
                "data": {"train_dir": data_dir},
                "model": {"name": "unused"},
                "objectives": [{"kind": "clip"}, {"kind": "multi_aspect"}],
                "global_batch_size": 8,
                "num_steps": 1000,
                "engine": {"precision": precision, "zero_stage": 1},
                "bad_steps": bad_steps,
            }
        )
        self.said: list[str] = []
        self.record = record or RunRecord()
        self.data = ShardedDataset(data_dir)
        self.guard = Guard(config, self.record, self.data, self.said.append)
        self.path = run_dir / "bad_steps.jsonl"

    def step(self, step: int, clip: float, other: float = 0.0, grad_norm: Any = 1.0, first_sample: int = 0) -> bool:
        """True where the step is to be skipped."""
        loss, terms = torch.tensor(clip + other), {"clip": Term(torch.tensor(clip)), "other": Term(torch.tensor(other))}
        is_bad = self.guard.config.action == "skip" and self.guard.is_bad(step, loss, terms)
        batch: Any = SimpleNamespace(sample_B=torch.arange(first_sample, first_sample + 12))
        self.guard.note(step, loss, terms, grad_norm, batch)
        return is_bad

    def steps(self, *losses: float) -> None:
        for step, loss in enumerate(losses):
            self.step(step, loss)


@pytest.fixture
def train_dir(prepared_dir: Path) -> Path:
    return prepared_dir / "train"


def test_a_loss_that_is_not_finite_is_named_at_the_next_check(train_dir: Path, tmp_path: Path) -> None:
    watched = Watched(train_dir, tmp_path)
    watched.step(0, 2.0)
    watched.step(1, 1.5, other=NAN, first_sample=20)
    watched.step(2, NAN)  # what follows is no news
    with pytest.raises(InputError) as error:
        watched.guard.check()
    message = str(error.value)
    keys = [watched.data.read_sample(position).key for position in range(20, 32)]
    assert message.startswith("step 2: the loss is nan, of other (clip 1.5, other nan). Samples 20 (")
    assert f"29 ({keys[9]})" in message and f"30 ({keys[10]})" not in message
    assert "bad_steps.jsonl" in message and "lower optimizer.lr" in message
    (line,) = [json.loads(line) for line in watched.path.read_text().splitlines()]
    assert line["step"] == 2 and line["loss"] == "nan" and line["losses"]["clip"] == 1.5
    assert line["samples"] == [{"rank": 0, "position": 20 + i, "key": key} for i, key in enumerate(keys)]


@pytest.mark.parametrize("loss", [math.inf, -math.inf])
def test_infinity_is_bad_too(train_dir: Path, tmp_path: Path, loss: float) -> None:
    watched = Watched(train_dir, tmp_path)
    watched.step(0, loss)
    with pytest.raises(InputError, match=f"step 1: the loss is {loss}, of clip"):
        watched.guard.check()


def test_a_spike_is_judged_by_the_median_of_the_window(train_dir: Path, tmp_path: Path) -> None:
    watched = Watched(train_dir, tmp_path, spike_factor=3.0, window=4)
    watched.steps(1.0, 50.0, 1.0, 2.0)  # the window is not full: nothing is a spike
    watched.guard.check()
    assert watched.record.recent_losses == [1.0, 50.0, 1.0, 2.0]
    watched.step(4, 4.4)  # below 3 x 1.5
    watched.guard.check()
    assert watched.record.recent_losses == pytest.approx([50.0, 1.0, 2.0, 4.4])
    watched.step(5, 9.7)  # above 3 x 3.2
    with pytest.raises(InputError, match=r"step 6: the loss is 9.7, 3.03 times the median of the last 4 steps \(clip"):
        watched.guard.check()
    assert watched.record.recent_losses == pytest.approx([50.0, 1.0, 2.0, 4.4])  # a spike does not move the median


def test_without_a_factor_there_are_no_spikes(train_dir: Path, tmp_path: Path) -> None:
    watched = Watched(train_dir, tmp_path, window=1)
    watched.steps(1.0, 1e9)
    watched.guard.check()
    assert watched.record.recent_losses == []


def test_a_resumed_run_decides_the_same(train_dir: Path, tmp_path: Path) -> None:
    before = Watched(train_dir, tmp_path, spike_factor=2.0, window=3)
    before.steps(1.0, 2.0, 3.0)
    before.guard.check()
    record = RunRecord.from_json(json.loads(json.dumps(before.record.to_json())))
    for watched in (before, Watched(train_dir, tmp_path, record, spike_factor=2.0, window=3)):
        watched.step(3, 4.1)
        with pytest.raises(InputError, match=r"2.05 times the median"):
            watched.guard.check()


def test_a_record_of_another_version_is_refused() -> None:
    with pytest.raises(InputError, match=r"holds best_loss: it is of another version of dermvlp"):
        RunRecord.from_json(RunRecord().to_json() | {"best_loss": 1.0})


def test_rollback_goes_back_before_the_step_and_has_a_limit(train_dir: Path, tmp_path: Path) -> None:
    watched = Watched(train_dir, tmp_path, RunRecord(passed_over=[3]), action="rollback", max_num=2)
    watched.step(7, NAN)
    with pytest.raises(GoBack) as back:
        watched.guard.check()
    assert back.value.step == 7
    assert "step 8: the loss is nan" in watched.said[0] and "going back" in watched.said[0]
    again = Watched(train_dir, tmp_path, RunRecord(passed_over=[3, 7]), action="rollback", max_num=2)
    again.step(9, NAN)
    with pytest.raises(InputError, match=r"one more than bad_steps.max_num \(2\)"):
        again.guard.check()


def test_skip_is_decided_in_the_step_and_has_a_limit(train_dir: Path, tmp_path: Path) -> None:
    watched = Watched(train_dir, tmp_path, action="skip", max_num=1)
    assert not watched.step(0, 1.0)
    assert watched.step(1, NAN)
    assert watched.record.passed_over == [1]
    assert "step 2: the loss is nan" in watched.said[0] and "skipped" in watched.said[0]
    assert not watched.step(2, 1.0)
    watched.guard.check()
    with pytest.raises(InputError, match=r"step 4: .*one more than bad_steps.max_num \(1\)"):
        watched.step(3, NAN)
    assert [json.loads(line)["step"] for line in watched.path.read_text().splitlines()] == [2, 4]


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_gradients_that_are_not_finite_end_a_run_whose_loss_is_fine(
    train_dir: Path, tmp_path: Path, action: str
) -> None:
    """The weights are broken after such a step, and the next loss would name the wrong samples."""
    watched = Watched(train_dir, tmp_path, action=action)
    watched.step(0, 1.0, grad_norm=torch.tensor(1.0))
    assert not watched.step(1, 1.0, grad_norm=torch.tensor(NAN), first_sample=5)
    with pytest.raises(InputError, match=r"step 2: the gradient norm is nan .* Samples 5 \("):
        watched.guard.check()


def test_fp16_overflows_are_the_engines_business(train_dir: Path, tmp_path: Path) -> None:
    watched = Watched(train_dir, tmp_path, precision="fp16")
    watched.step(0, 1.0, grad_norm=math.inf)
    watched.guard.check()


def test_samples_that_cannot_be_read_are_named_by_position(train_dir: Path, tmp_path: Path) -> None:
    watched = Watched(train_dir, tmp_path)
    watched.data.manifest = watched.data.manifest.model_copy(
        update={"shards": [shard.model_copy(update={"name": "gone.tar"}) for shard in watched.data.manifest.shards]}
    )
    watched.step(0, NAN)
    with pytest.raises(InputError, match=r"Samples 0, 1, 2, 3, 4, 5, 6, 7, 8, 9;"):
        watched.guard.check()


def test_noting_never_waits_for_the_device(train_dir: Path, tmp_path: Path) -> None:
    """Values of torch's `meta` device cannot be read at all."""
    watched = Watched(train_dir, tmp_path, spike_factor=2.0)
    loss = torch.ones((), device="meta")
    batch: Any = SimpleNamespace(sample_B=torch.arange(4, device="meta"))
    for grad_norm in (loss, 1.0):
        watched.guard.note(0, loss, {"clip": Term(loss)}, grad_norm, batch)
    with pytest.raises((NotImplementedError, RuntimeError)):
        watched.guard.check()


def judge_on_a_rank(train_dir: str, run_dir: str) -> dict[str, Any]:
    """The global loss is 1, 1, then 5; the ranks' shares say otherwise."""
    watched = Watched(Path(train_dir), Path(run_dir), spike_factor=3.0, window=2)
    losses = ((1.0, 2.0, 9.9), (1.0, 0.0, 0.1))[comm.rank()]
    for step, loss in enumerate(losses):
        watched.step(step, loss, first_sample=20 * comm.rank())
        if step < 2:
            watched.guard.check()
    try:
        watched.guard.check()
    except InputError as error:
        return {"message": str(error), "recent": watched.record.recent_losses}
    return {}


def test_ranks_judge_the_global_loss_alike(train_dir: Path, tmp_path: Path) -> None:
    results = run_on_ranks(judge_on_a_rank, 2, str(train_dir), str(tmp_path))
    assert all(result["recent"] == [1.0, 1.0] for result in results)
    assert all("step 3: the loss is 5, 5 times the median" in result["message"] for result in results)
    assert "of rank 0 0 (" in results[0]["message"] and "; of rank 1 20 (" in results[0]["message"]
    (line,) = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [s["position"] for s in line["samples"] if s["rank"] == 1] == list(range(20, 32))
