"""What both engines promise beside the numbers of a whole run: forgetting gradients, offload, groups, time limits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.distributed import comm
from pretrain.distributed.engine import Engine, build_engine
from tests.distributed.run import run_on_ranks

CPU = torch.device("cpu")
OPTIMIZER = OptimizerConfig(lr=0.01, weight_decay=0.3, grad_clip_norm=0.1, warmup_steps=0)
LR_SCALES = {"first.weight": 0.25, "first.bias": 0.25, "scale": 0.5}
Weights = dict[str, Tensor]


class Net(nn.Module):
    """Three decay groups and `scale`, which is alone in its group: with two ranks the second holds its padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.second(torch.tanh(self.first(x))) * self.scale}


def engine(lr_scales: dict[str, float] = LR_SCALES, **config: Any) -> Engine:
    return build_engine(Net(), OPTIMIZER, lr_scales, EngineConfig(**config), 4, CPU)


def backward(engine: Engine, seed: int, num_parts: int = 1, factor: float = 1.0) -> None:
    """The gradients of a batch of this seed and rank."""
    torch.manual_seed(1000 * seed + comm.rank())
    x = torch.randn(4 * num_parts, 12).to(next(engine.module.parameters()).dtype)
    for number, part in enumerate(x.chunk(num_parts)):
        loss = (engine(part)["y"] - 1.0).float().square().mean() * factor / num_parts
        engine.backward(loss, last=number == num_parts - 1)


def weights(engine: Engine) -> Weights:
    return {name: engine.full_tensor(p).clone() for name, p in engine.module.named_parameters()}


def run_with_and_without_forgotten_steps(configs: dict[str, dict[str, Any]]) -> dict[str, tuple[Weights, Weights]]:
    results = {}
    for name, config in configs.items():
        plain, forgetful = engine(**config), engine(**config)
        for step, num_parts in enumerate((1, 2, 1)):
            for e in (plain, forgetful):
                if e is forgetful:
                    backward(e, seed=50 + step, num_parts=2, factor=30.0)
                    e.forget()
                    backward(e, seed=60 + step, factor=float("nan"))
                    e.forget()
                backward(e, step, num_parts)
                e.step(0.01)
        states = [weights(e) | {"norm": torch.as_tensor(float(e.grad_norm()))} for e in (plain, forgetful)]
        results[name] = (states[0], states[1])
    return results


def all_engines() -> dict[str, dict[str, Any]]:
    configs: dict[str, dict[str, Any]] = {"torch": {"kind": "torch"}}
    configs |= {f"ZeRO {stage}": {"zero_stage": stage} for stage in range(4)}
    configs |= {f"ZeRO {s} offloaded": {"zero_stage": s, "offload_optimizer": "cpu"} for s in (1, 2, 3)}
    configs |= {f"ZeRO {s} bf16": {"zero_stage": s, "precision": "bf16"} for s in (1, 3)}
    adds_in_fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    configs |= {
        f"ZeRO {s} bf16, fp32 sums": {"zero_stage": s, "precision": "bf16", "deepspeed": adds_in_fp32} for s in (1, 2)
    }
    return configs


def one_step_without_gradient(configs: dict[str, dict[str, Any]]) -> dict[str, Weights]:
    results = {}
    for name, config in configs.items():
        e = engine(**config)
        before = weights(e)
        backward(e, seed=0, factor=0.0)
        e.step(0.5)
        results[name] = {key: tensor / before[key] for key, tensor in weights(e).items()}
    return results


def timeouts() -> list[float]:
    e = engine(zero_stage=1, collective_timeout_minutes=7.0)
    groups = (e._engine.data_parallel_group, e._engine.seq_data_parallel_group)  # type: ignore[attr-defined]
    assert comm.start_cpu_sum_(torch.zeros(1)) is not None  # under way when the process ends: see end_process
    found = [group._get_backend(CPU).options._timeout for group in groups]
    return [timeout / timedelta(minutes=1) for timeout in found]


Found = dict[str, Any]


def everything(configs: dict[str, dict[str, Any]]) -> Found:
    without_rounding = {name: config for name, config in configs.items() if "bf16" not in name}
    return {
        "forgotten": run_with_and_without_forgotten_steps(configs),
        "shrunk": one_step_without_gradient(without_rounding),
        "timeouts": timeouts() if comm.world_size() > 1 else [],
    }


@pytest.fixture(scope="module")
def two_ranks() -> Found:
    """DeepSpeed takes seconds to import, so the ranks are started once."""
    return run_on_ranks(everything, 2, all_engines())[0]


@pytest.fixture(scope="module")
def one_rank() -> Found:
    return run_on_ranks(everything, 1, {name: config for name, config in all_engines().items() if len(name) < 7})[0]


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_a_forgotten_backward_leaves_nothing(ranks: str, request: pytest.FixtureRequest) -> None:
    results = request.getfixturevalue(ranks)["forgotten"]
    start = dict(Net().named_parameters())
    for name, (plain, forgetful) in results.items():
        assert float((plain["second.weight"] - start["second.weight"]).detach().norm()) > 0.01, f"{name}: no step"
        for key, tensor in plain.items():
            assert torch.equal(tensor, forgetful[key]), f"{name}: {key}"
    for name, (plain, _) in results.items():
        tolerance = {"rtol": 0.05, "atol": 0.01} if "bf16" in name else {"rtol": 1e-5, "atol": 1e-6}
        for key, tensor in plain.items():  # offloaded or not, at every stage: the same three steps
            torch.testing.assert_close(tensor, results["torch"][0][key], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_decay_and_layer_wise_rates_reach_their_parameters(ranks: str, request: pytest.FixtureRequest) -> None:
    """Without a gradient AdamW only shrinks: by lr x layer factor x decay where it decays, by nothing elsewhere."""
    shrinks = {"first.weight": 1 - 0.5 * 0.25 * 0.3, "second.weight": 1 - 0.5 * 0.3}
    for name, ratios in request.getfixturevalue(ranks)["shrunk"].items():
        for key, ratio in ratios.items():
            expected = torch.full_like(ratio, shrinks.get(key, 1.0))
            torch.testing.assert_close(ratio, expected, rtol=1e-5, atol=0, msg=lambda m, n=name, k=key: f"{n} {k}: {m}")


def test_deepspeed_waits_as_long_as_configured(two_ranks: Found) -> None:
    assert two_ranks["timeouts"] == [7.0, 7.0]
