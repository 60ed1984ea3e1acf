"""The plain-torch engine: what DeepSpeed must equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.distributed import comm
from pretrain.distributed.optimizer import LrScales, build_optimizer, set_learning_rate


class TorchEngine:
    """Plain torch: gradients are averaged by one all_reduce after the backward. fp32, fp64, or bf16 by autocast."""

    settings: Mapping[str, Any] = {}

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        lr_scales: LrScales,
        config: EngineConfig,
        device: torch.device,
    ) -> None:
        self.module = module.to(device)
        self._optimizer = build_optimizer(module, optimizer, lr_scales)
        self._clip = optimizer.grad_clip_norm
        self._autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")
        self._norm: Tensor | float = 0.0

    def __call__(self, *args: Any) -> dict[str, Any]:
        with self._autocast:
            return self.module(*args)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter in trained:  # a parameter unused on this rank is still averaged
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if comm.world_size() > 1:
            flat = torch.cat([parameter.grad.reshape(-1) for parameter in trained if parameter.grad is not None])
            mean = comm.sum_over_ranks(flat) / comm.world_size()
            for parameter, gradient in zip(trained, mean.split([p.numel() for p in trained]), strict=True):
                parameter.grad = gradient.view_as(parameter)
        self._norm = nn.utils.clip_grad_norm_(trained, self._clip or float("inf"))
        set_learning_rate(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def forget(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def grad_norm(self) -> Tensor | float:
        return self._norm

    @torch.no_grad()
    def clamp_(self, parameter: nn.Parameter, maximum: float) -> None:
        parameter.clamp_(max=maximum)

    def full_tensor(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def full_buffers(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_buffers()

    def save(self, folder: Path) -> None:
        if comm.rank() == 0:
            state = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
            torch.save(state, folder / "torch_engine.pt")

    def load(self, folder: Path, num_ranks_before: int) -> None:
        state = torch.load(folder / "torch_engine.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
