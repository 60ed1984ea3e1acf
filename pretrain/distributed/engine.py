"""The engine moves gradients and weights. DeepSpeed is the real one; the plain-torch twin shows what it must equal.

The only file that imports deepspeed. A step is: call the engine, `backward` a loss that is W x the rank's share,
`step`. Both engines average gradients over ranks.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.distributed import comm

LrScales = Mapping[str, float]  # by parameter name


class Engine(Protocol):
    module: nn.Module

    def __call__(self, *args: Any) -> dict[str, Any]: ...
    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Adds to the gradients; `last` with the step's last part, which reduces them over the ranks."""

    def step(self, lr: float) -> None:
        """Clip, update, forget the gradients."""

    def grad_norm(self) -> Tensor | float:
        """L2 norm over all parameters before clipping, of the last step."""

    def clamp_(self, parameter: nn.Parameter, maximum: float) -> None:
        """Clamp the fp32 master (and the working copy)."""

    def full_tensor(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter as the optimizer holds it (fp32), on every rank. All ranks call it."""

    def full_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The module's buffers by name, in fp32."""

    def save(self, folder: Path) -> None:
        """This rank's part of the state. All ranks call it."""

    def load(self, folder: Path) -> None: ...


def choose_device() -> torch.device:
    if torch.cuda.is_available():
        if comm.local_rank() >= torch.cuda.device_count():
            raise InputError(
                f"launch.num_ranks: more ranks than the {torch.cuda.device_count()} GPU(s) of this machine"
            )
        torch.cuda.set_device(comm.local_rank())
        return torch.device("cuda", comm.local_rank())
    return torch.device("cpu")


def initialise_process_group(device: torch.device, config: EngineConfig) -> None:
    """From the launcher's environment; without a launcher a group of one, which DeepSpeed needs."""
    if comm.is_initialised():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    elif config.kind == "deepspeed":
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


_NO_DECAY = (
    *("positional_embedding", "class_embedding", "pos_embed", "cls_token"),
    *("position_embeddings.weight", "token_type_embeddings.weight"),
)


def parameter_groups(module: nn.Module, config: OptimizerConfig, lr_scales: LrScales) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay; vectors, scalars and position and class embeddings do not.

    `lr_scale` is the layer-wise factor of the learning rate, 1 for a name that `lr_scales` does not hold.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and not name.endswith(_NO_DECAY)
        scale = lr_scales.get(name, 1.0)
        weight_decay = config.weight_decay if decays else 0.0
        group = groups.setdefault(
            (decays, scale), {"params": [], "weight_decay": weight_decay, "lr_scale": scale, "lr": config.lr * scale}
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(module: nn.Module, config: OptimizerConfig, lr_scales: LrScales) -> torch.optim.AdamW:
    groups = parameter_groups(module, config, lr_scales)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def _set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class TorchEngine:
    """Plain torch: gradients are averaged by one all_reduce after the backward. fp32, fp64, or bf16 by autocast."""

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
        _set_learning_rate(self._optimizer, lr)
        self._optimizer.step()
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

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "torch_engine.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])


def deepspeed_config(optimizer: OptimizerConfig, config: EngineConfig, micro_batch_size: int) -> dict[str, Any]:
    """The one place where DeepSpeed's dictionary is made from ours."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.grad_clip_norm or 1e30,  # 0 would switch the norm off, which is logged
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": {"stage": config.zero_stage},
        # torch's AdamW: the JSON "AdamW" and DeepSpeedCPUAdam compile C++ for minutes at the first start
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


class DeepSpeedEngine:
    """DeepSpeed at ZeRO 0-3; AdamW's fp32 masters live in DeepSpeed."""

    _TAG = "engine"

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        lr_scales: LrScales,
        config: EngineConfig,
        micro_batch_size: int,
        device: torch.device,
    ) -> None:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # its import reads DS_ACCELERATOR, takes seconds, and the twin needs none

        if device.type == "cpu":
            # this operator is compiled for a minute at the first start; gloo does without it
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # its use of torch
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
        self._deepspeed, self._zero_stage, self._is_fp32 = deepspeed, config.zero_stage, config.precision == "fp32"
        # DeepSpeed keeps fp32 masters of what learns alone, so what does not is kept here, where the towers are rounded
        frozen = [p for p in module.parameters() if not p.requires_grad] if not self._is_fp32 else []
        self._frozen_fp32 = {id(parameter): parameter.detach().clone() for parameter in frozen}
        self._buffers_fp32 = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        module = module.to(device)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, optimizer, lr_scales),
            config=deepspeed_config(optimizer, config, micro_batch_size),
        )
        self.module = self._engine.module
        for norm in self.module.modules():  # DeepSpeed leaves its buffers in fp32, which batch_norm refuses
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
                for buffer in norm.buffers():
                    if buffer.is_floating_point():
                        buffer.data = buffer.to(norm.weight.dtype)
        self._norm: Tensor | float = 0.0

    def __call__(self, *args: Any) -> dict[str, Any]:
        return self._engine(*args)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        # to DeepSpeed a step is one micro-batch, so that it divides nothing; the boundary is set by hand
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, lr: float) -> None:
        _set_learning_rate(self._engine.optimizer, lr)
        if self._zero_stage == 0:  # where DeepSpeed does not keep the norm
            self._norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self._engine.step()
        if self._zero_stage > 0:
            self._norm = self._engine.get_global_grad_norm()

    def grad_norm(self) -> Tensor | float:
        return self._norm

    @torch.no_grad()
    def clamp_(self, parameter: nn.Parameter, maximum: float) -> None:
        utils = self._deepspeed.utils
        if self._zero_stage == 3:  # each rank its own part (the whole cannot be set: a scalar has less than W elements)
            utils.safe_set_local_fp32_param(parameter, utils.safe_get_local_fp32_param(parameter).clamp(max=maximum))
            return
        parameter.data.clamp_(max=maximum)
        if self._zero_stage > 0 or not self._is_fp32:
            utils.safe_set_full_fp32_param(parameter, utils.safe_get_full_fp32_param(parameter).clamp(max=maximum))

    def full_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in self.module.named_buffers():  # statistics that move are refused in bf16
            yield name, buffer if self._is_fp32 else self._buffers_fp32[name]

    def full_tensor(self, parameter: nn.Parameter) -> Tensor:
        if id(parameter) in self._frozen_fp32:
            return self._frozen_fp32[id(parameter)]
        if parameter.requires_grad and not (self._is_fp32 and self._zero_stage < 3):
            return self._deepspeed.utils.safe_get_full_fp32_param(parameter).detach()
        if self._zero_stage < 3:
            return parameter.detach().float()
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()

    def save(self, folder: Path) -> None:
        # save_latest=False: DeepSpeed's own pointer can name a checkpoint with a torn part; ours moves by rename
        self._engine.save_checkpoint(str(folder), tag=self._TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag=self._TAG)
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint here")


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
    if config.kind == "torch":
        return TorchEngine(module, optimizer, lr_scales, config, device)
    return DeepSpeedEngine(module, optimizer, lr_scales, config, micro_batch_size, device)
