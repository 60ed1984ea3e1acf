"""A DeepSpeed run that goes on with another number of ranks: from 2 on 1, and from 1 on 2, at ZeRO 1, 2 and 3."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.train.checkpoint import resume, save_checkpoint
from pretrain.train.record import RunRecord
from tests.distributed.run import run_on_ranks
from tests.distributed.steps import CLIP, MASKED_LATENT, build, compare, run_config, take_steps
from tests.distributed.test_engine import Weights, backward, engine, weights

pytestmark = pytest.mark.long

NUM_BEFORE, NUM_AFTER = 4, 3
Results = dict[str, dict[str, Tensor]]


def train_and_save(configs: dict[str, TrainConfig]) -> Results:
    """The steps after the checkpoint, of runs that are not interrupted."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    results = {}
    for name, config in configs.items():
        trainer, reader = build(config, torch.float32)
        take_steps(trainer, [reader[step] for step in range(NUM_BEFORE)])
        save_checkpoint(trainer, RunRecord(step=NUM_BEFORE), reader.data.digest)
        results[name] = _go_on(trainer, reader)
    return results


def resume_and_go_on(configs: dict[str, TrainConfig]) -> Results:
    os.environ["DS_ACCELERATOR"] = "cpu"
    results = {}
    for name, config in configs.items():
        trainer, reader = build(config, torch.float32)
        record = resume(trainer, reader.data.digest)
        assert record.step == NUM_BEFORE
        results[name] = _go_on(trainer, reader)
    return results


def _go_on(trainer: Any, reader: Any) -> dict[str, Tensor]:
    steps = range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER)
    result = take_steps(trainer, [reader[step] for step in steps])
    order = np.concatenate([reader.order(step // reader.steps_per_epoch) for step in steps])
    return result | {"order": torch.from_numpy(order.astype(np.int64))}


def save_small(folders: dict[str, str], settings: dict[str, dict[str, Any]]) -> dict[str, Weights]:
    results = {}
    for name, folder in folders.items():
        e = engine(**settings[name])
        for step in range(3):
            backward(e, step)
            e.step(0.01)
        e.save(Path(folder))
        results[name] = _one_more_step(e)
    return results


def load_small(folders: dict[str, str], settings: dict[str, dict[str, Any]], num_before: int) -> dict[str, Weights]:
    results = {}
    for name, folder in folders.items():
        e = engine(**settings[name])
        e.load(Path(folder), num_before)
        results[name] = _one_more_step(e)
    return results


def _one_more_step(e: Any) -> Weights:
    backward(e, seed=0, factor=0.0)  # no gradient: what moves the weights are AdamW's moments, its step and decay
    e.step(0.01)
    return weights(e)


def load_damaged(folder: str, num_before: int) -> list[str]:
    e = engine(zero_stage=2)
    try:
        e.load(Path(folder), num_before)
    except InputError as error:
        return [str(error)]
    return []


def small_settings() -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {
        f"{precision} {stage} {offload}": {"zero_stage": stage, "precision": precision, "offload_optimizer": offload}
        for stage in (1, 2, 3)
        for precision, offload in (("fp32", "none"), ("bf16", "none"), ("fp32", "cpu"))
    }
    # here DeepSpeed's converter fails on a group that is smaller than its padding, so `scale` is not alone
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    settings["summed in fp32"] = {"zero_stage": 1, "precision": "bf16", "deepspeed": sums, "lr_scales": {}}
    return settings


def at_first(configs: dict[str, TrainConfig], small: dict[str, str]) -> dict[str, Any]:
    """The ranks that write the checkpoints."""
    return {"runs": train_and_save(configs), "small": save_small(small, small_settings())}


def afterwards(configs: dict[str, TrainConfig], small: dict[str, str], num_before: int, damaged: str) -> dict[str, Any]:
    return {
        "runs": resume_and_go_on(configs),
        "small": load_small(small, small_settings(), num_before),
        "refusals": load_damaged(damaged, num_before),
    }


def both(configs: dict[str, dict[str, TrainConfig]], small: dict[str, dict[str, str]], damaged: str) -> dict[str, Any]:
    """On two ranks: their own checkpoints, and then those of the single rank."""
    return {"2": at_first(configs["2"], small["2"]), "on 2": afterwards(configs["1"], small["1"], 1, damaged)}


@pytest.fixture(scope="module")
def results(prepared_dir: Path, tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each rank found: "1" and "2" wrote the checkpoints, "on 2" and "on 1" went on from the other's.

    DeepSpeed takes seconds to import, so ranks are started three times in all.
    """
    model = {"name": str(tiny_model_path), "image": {"layer_decay": 0.7}, "text": {"freeze_layers": 1}}
    root, configs, small = tmp_path_factory.mktemp("runs"), {}, {}
    for num_ranks in ("1", "2"):
        configs[num_ranks] = {
            f"ZeRO {stage}": run_config(
                prepared_dir,
                model,
                [CLIP, MASKED_LATENT],
                run_dir=str(root / num_ranks / str(stage)),
                num_steps=NUM_BEFORE + NUM_AFTER,
                engine={"kind": "deepspeed", "zero_stage": stage},
            )
            for stage in (0, 1, 2, 3)
        }
        small[num_ranks] = {name: str(root / num_ranks / name) for name in small_settings()}
    found: dict[str, Any] = {"1": run_on_ranks(at_first, 1, configs["1"], small["1"])}
    damaged = root / "damaged"
    shutil.copytree(small["1"]["fp32 2 none"], damaged)
    next(damaged.glob("engine/*zero_pp_rank_0*")).unlink()
    on_two = run_on_ranks(both, 2, configs, small, str(damaged))
    found |= {key: [rank[key] for rank in on_two] for key in ("2", "on 2")}
    found["on 1"] = run_on_ranks(afterwards, 1, configs["2"], small["2"], 2, str(damaged))
    found["left over"] = [path.name for path in root.rglob("*universal*")]
    return found


@pytest.mark.parametrize(("before", "after"), [("2", "on 1"), ("1", "on 2")])
def test_goes_on_with_another_number_of_ranks(results: dict[str, Any], before: str, after: str) -> None:
    for name, ours in results[after][0]["runs"].items():
        uninterrupted = results[before][0]["runs"][name]
        assert torch.equal(ours["order"], uninterrupted["order"]), name
        for kinds, tolerance in ((("loss",), 1e-5), (("statistic", "update", "teacher"), 5e-5)):
            names = [key for key in ours if key.startswith(kinds)]
            assert names
            compare({key: ours[key] for key in names}, {key: uninterrupted[key] for key in names}, tolerance)


@pytest.mark.parametrize(("before", "after"), [("2", "on 1"), ("1", "on 2")])
def test_every_form_of_the_state_is_converted(results: dict[str, Any], before: str, after: str) -> None:
    """bf16, offloaded, summed in fp32; a group of which the second rank has only padding; moments, step, decay."""
    for name, weights_after in results[after][0]["small"].items():
        for key, tensor in weights_after.items():
            torch.testing.assert_close(
                tensor,
                results[before][0]["small"][name][key],
                rtol=1e-6,
                atol=1e-7,
                msg=lambda m, n=name, k=key: f"{n} {k}: {m}",
            )


def test_a_checkpoint_that_cannot_be_converted_is_refused_on_every_rank(results: dict[str, Any]) -> None:
    for rank in results["on 2"]:
        assert len(rank["refusals"]) == 1 and "start as many ranks as wrote it" in rank["refusals"][0]


def test_nothing_is_left_of_a_conversion(results: dict[str, Any]) -> None:
    assert results["left over"] == []
