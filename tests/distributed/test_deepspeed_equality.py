"""DeepSpeed at every ZeRO stage follows the plain engine: fp32 on 1, 2 and 4 ranks against float64 in one process.

DeepSpeed takes seconds to import, so each number of ranks is started once and goes through all its runs.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.config import TrainConfig
from tests.distributed.run import run_on_ranks
from tests.distributed.steps import CONTRASTIVE, EVERYTHING, build, compare, masked_latent, run_config, take_steps

Results = dict[str, dict[str, Tensor]]
NUM_STEPS = 3


def run_all(configs: dict[str, TrainConfig], dtype: torch.dtype = torch.float32) -> Results:
    os.environ["DS_ACCELERATOR"] = "cpu"
    return {name: run(config, dtype, "repeated" in name) for name, config in configs.items()}


def run(config: TrainConfig, dtype: torch.dtype, repeated: bool) -> dict[str, Tensor]:
    """`repeated`: the second half of every global batch holds the samples of the first half once more."""
    trainer, reader = build(config, dtype)
    if repeated:
        samples, half = reader.samples, config.global_batch_size // 2
        reader.samples = lambda step: np.tile(samples(step)[:half], 2)  # type: ignore[method-assign]
    batches = [reader[step] for step in range(NUM_STEPS)]
    result = take_steps(trainer, batches)
    result["num_texts"] = torch.tensor([len(packed.order_R) for packed in batches[0].packed])
    return result


def deepspeed(config: TrainConfig, stage: int, parts: bool = False, precision: str = "fp32") -> TrainConfig:
    engine = {"kind": "deepspeed", "zero_stage": stage, "precision": precision}
    return config.model_validate(config.model_dump() | {"engine": engine, "micro_batch_size": 1 if parts else None})


@pytest.fixture(scope="module")
def plain(prepared_dir: Path, tiny_model_path: Path) -> dict[str, TrainConfig]:
    model = {
        "name": str(tiny_model_path),
        "image": {"layer_decay": 0.7},
        "text": {"layer_decay": 0.8, "freeze_layers": 1},
    }
    frozen = masked_latent(tiny_model_path, share_view=True)
    edges = {"train_dir": str(prepared_dir / "train"), "num_workers": 0, "text_bucket_edges": [8, 16, 32, 48]}
    return {
        "everything": run_config(prepared_dir, model, EVERYTHING),
        "checkpointed": run_config(prepared_dir, model | {"activation_checkpointing": True}, [*CONTRASTIVE, frozen]),
        "repeated": run_config(prepared_dir, model, EVERYTHING, data=edges),
    }


@pytest.fixture(scope="module")
def expected(plain: dict[str, TrainConfig]) -> Results:
    return run_all(plain, torch.float64)


def follows(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Losses to 1e-5; what is read off and the updates of the weights to what fp32 leaves of them after three steps."""
    for kinds, tolerance in ((("loss",), 1e-5), (("statistic", "update", "teacher"), 5e-5)):
        names = [name for name in ours if name.startswith(kinds)]
        compare({name: ours[name] for name in names}, {name: reference[name] for name in names}, tolerance)


def test_one_rank(plain: dict[str, TrainConfig], expected: Results) -> None:
    configs = {f"{s} {p}": deepspeed(plain["everything"], s, p) for s in range(4) for p in (False, True)}
    for result in run_on_ranks(run_all, 1, configs)[0].values():
        follows(result, expected["everything"])


@pytest.fixture(scope="module")
def two_ranks(plain: dict[str, TrainConfig]) -> list[Results]:
    configs = {f"everything {s} {p}": deepspeed(plain["everything"], s, p) for s in range(4) for p in (False, True)}
    for parts in (False, True):
        configs[f"checkpointed {parts}"] = deepspeed(plain["checkpointed"], 3, parts)
        configs[f"repeated {parts}"] = deepspeed(plain["repeated"], 3, parts)
        configs |= {f"bf16 {s} {parts}": deepspeed(plain["everything"], s, parts, "bf16") for s in (1, 3)}
    return run_on_ranks(run_all, 2, configs)


def test_two_ranks(two_ranks: list[Results], expected: Results) -> None:
    for name, result in two_ranks[0].items():
        kind = name.split()[0]
        if kind != "bf16":
            follows(result, expected[kind])


def test_a_rank_without_texts_does_not_hang_zero_3(two_ranks: list[Results]) -> None:
    """Every string of the second rank stands on the first, too; short texts are in no bucket of theirs."""
    for parts in ("True", "False"):
        assert int(two_ranks[0][f"repeated {parts}"]["num_texts"].sum()) > 0
        assert int(two_ranks[1][f"repeated {parts}"]["num_texts"].sum()) == 0


def test_bf16_is_near(two_ranks: list[Results], expected: Results) -> None:
    for name, result in two_ranks[0].items():
        if name.startswith("bf16"):
            for key, tensor in result.items():
                assert bool(tensor.isfinite().all()), f"{name}: {key}"
            torch.testing.assert_close(result["loss"], expected["everything"]["loss"], rtol=0.03, atol=0)


def test_four_ranks(plain: dict[str, TrainConfig], expected: Results) -> None:
    results = run_on_ranks(run_all, 4, {"in parts": deepspeed(plain["everything"], 3, parts=True)})
    follows(results[0]["in parts"], expected["everything"])
