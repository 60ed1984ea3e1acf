"""The engine moves gradients and weights. DeepSpeed is the real one; the plain-torch twin shows what it must equal.

A step is: call the engine, `backward` a loss that is W x the rank's share, `step`. Both engines average gradients
over ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.distributed import comm
from pretrain.distributed.engine_deepspeed import DeepSpeedEngine
from pretrain.distributed.engine_torch import TorchEngine
from pretrain.distributed.optimizer import LrScales


class Engine(Protocol):
    module: nn.Module
    settings: Mapping[str, Any]
    """DeepSpeed's dictionary; empty for the twin."""

    def __call__(self, *args: Any) -> dict[str, Any]: ...
    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Adds to the gradients; `last` with the step's last part, which reduces them over the ranks."""

    def step(self, lr: float) -> None:
        """Clip, update, forget the gradients."""

    def forget(self) -> None:
        """Forget the gradients of all parts since the last step, `last` one included, without an update.

        The next step is then one taken as if they had never been. All ranks call it.
        """

    def grad_norm(self) -> Tensor | float:
        """L2 norm over all parameters before clipping, of the last step; in fp16 infinite for a step that overflowed
        and left the weights as they were."""

    def clamp_(self, parameter: nn.Parameter, maximum: float) -> None:
        """Clamp the fp32 master (and the working copy)."""

    def full_tensor(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter as the optimizer holds it (fp32), on every rank. All ranks call it."""

    def full_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The module's buffers by name, in fp32."""

    def save(self, folder: Path) -> None:
        """This rank's part of the state. All ranks call it."""

    def load(self, folder: Path, num_ranks_before: int) -> None:
        """What `save` wrote on `num_ranks_before` ranks; the number may be another one now. All ranks call it.

        Raises InputError on every rank where it cannot be converted for this number.
        """


def choose_device() -> torch.device:
    if torch.cuda.is_available():
        if comm.local_rank() >= torch.cuda.device_count():
            raise InputError(
                f"launch.num_ranks: more ranks than the {torch.cuda.device_count()} GPU(s) that this process sees "
                "(under SLURM ask for them by --gpus-per-node: with --gpus-per-task each rank sees its own alone)"
            )
        torch.cuda.set_device(comm.local_rank())
        return torch.device("cuda", comm.local_rank())
    return torch.device("cpu")


def initialise_process_group(device: torch.device, config: EngineConfig) -> None:
    """From the launcher's environment; without a launcher a group of one, which DeepSpeed needs."""
    if comm.is_initialised():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=config.collective_timeout_minutes)
    if "RANK" in os.environ:
        comm.initialise(backend, timeout)
    elif config.kind == "deepspeed":
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def full_tensors(engine: Engine, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The fp32 parameters of a part of the engine's module by name, one whole one at a time. For all ranks at once."""
    for name, parameter in module.named_parameters():
        yield name, engine.full_tensor(parameter)


def build_engine(
    module: nn.Module,
    optimizer: OptimizerConfig,
    lr_scales: LrScales,
    config: EngineConfig,
    micro_batch_size: int,
    device: torch.device,
) -> Engine:
    """Raises InputError for a precision that the device lacks, and for an option that DeepSpeed refuses."""
    if config.precision == "fp16" and device.type != "cuda":
        raise InputError("engine.precision: fp16 needs a GPU: CPU kernels lack it; use fp32, or bf16")
    if config.kind == "torch":
        return TorchEngine(module, optimizer, lr_scales, config, device)
    return DeepSpeedEngine(module, optimizer, lr_scales, config, micro_batch_size, device)
