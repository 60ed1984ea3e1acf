"""DeepSpeed's engine. With universal.py the only files that import deepspeed, and only where a run uses it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.deepspeed_options import REDUCE_BUCKET_SIZE
from pretrain.distributed import comm
from pretrain.distributed.optimizer import LrScales, build_optimizer, set_learning_rate
from pretrain.distributed.universal import convert, load_universal


def deepspeed_config(optimizer: OptimizerConfig, config: EngineConfig, micro_batch_size: int) -> dict[str, Any]:
    """The one place where DeepSpeed's dictionary is made from ours; `engine.deepspeed` is merged into it.

    Raises InputError where an option stands in the place of a section.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage:
        zero["reduce_bucket_size"] = REDUCE_BUCKET_SIZE
    if config.zero_stage == 1:
        zero["contiguous_gradients"] = False  # which stay whole until the step: one copy less
    if config.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": config.offload_optimizer}
    derived = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.grad_clip_norm or 1e30,  # 0 would switch the norm off, which is logged
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},  # with DeepSpeed's dynamic loss scale
        "zero_optimization": zero,
        # torch's AdamW: the JSON "AdamW" and DeepSpeedCPUAdam compile C++ for minutes at the first start
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    return _merged(derived, config.deepspeed, "engine.deepspeed")


def _merged(derived: Mapping[str, Any], options: Mapping[str, Any], path: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in options.items():
        ours = derived.get(key)
        if isinstance(ours, Mapping):
            if not isinstance(value, Mapping):
                raise InputError(f"{path}.{key}: {value!r} stands where DeepSpeed has a section of options")
            value = _merged(ours, value, f"{path}.{key}")
        merged[key] = value
    return merged


def check_further_options(optimizer: OptimizerConfig, config: EngineConfig) -> None:
    """As `check_options`, before there is an engine; nothing, and no import, where no further option is given."""
    if config.deepspeed:
        _import_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        check_options(deepspeed_config(optimizer, config, micro_batch_size=1))


def check_options(settings: Mapping[str, Any]) -> None:
    """Raises InputError for an option that this version of DeepSpeed does not know, or does not take.

    DeepSpeed refuses what is wrong inside most sections, and passes over an unknown key elsewhere without a word.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    options = _Watched(settings)
    try:
        with contextlib.redirect_stdout(None):
            DeepSpeedConfig(options)
    except (DeepSpeedConfigError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise InputError(f"engine.deepspeed: DeepSpeed refuses its options: {error}") from error
    unknown = sorted(options.unread())
    if unknown:
        raise InputError(f"engine.deepspeed.{unknown[0]}: DeepSpeed knows no such option; correct or remove it")


class _Watched(dict[str, Any]):
    """A dictionary that notes which keys are asked for, in its inner dictionaries too."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({k: _Watched(v) if isinstance(v, Mapping) else v for k, v in values.items()})
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:  # without it `f(**options)` would not ask for its keys one by one
        return super().__iter__()

    def unread(self) -> Iterator[str]:
        for key, value in self.items():
            if key not in self._read:
                yield key
            elif isinstance(value, _Watched) and value._read:  # else it was taken as a whole, by a model that checks
                yield from (f"{key}.{inner}" for inner in value.unread())


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
        self._deepspeed = _import_deepspeed(device)
        self._zero_stage, self._is_fp32 = config.zero_stage, config.precision == "fp32"
        self.settings: Mapping[str, Any] = deepspeed_config(optimizer, config, micro_batch_size)
        check_options(self.settings)
        timeout = timedelta(minutes=config.collective_timeout_minutes)
        backend = "nccl" if device.type == "cuda" else "gloo"
        self._deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        # DeepSpeed keeps fp32 masters of what learns alone, so what does not is kept here, where the towers are rounded
        frozen = [p for p in module.parameters() if not p.requires_grad] if not self._is_fp32 else []
        self._frozen_fp32 = {id(parameter): parameter.detach().clone() for parameter in frozen}
        self._buffers_fp32 = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        module = module.to(device)
        self._engine, *_ = self._deepspeed.initialize(
            model=module, optimizer=build_optimizer(module, optimizer, lr_scales), config=dict(self.settings)
        )
        for group in (self._engine.data_parallel_group, self._engine.seq_data_parallel_group):
            comm.set_timeout(group, timeout)  # DeepSpeed makes them with torch's default
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
        set_learning_rate(self._engine.optimizer, lr)
        if self._zero_stage == 0:  # where DeepSpeed does not keep the norm
            self._norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self._engine.step()
        if self._zero_stage > 0:
            self._norm = self._engine.get_global_grad_norm()

    def forget(self) -> None:
        """What DeepSpeed's own step does after an overflow, without its change of the loss scale."""
        optimizer = self._engine.optimizer
        self._engine.zero_grad()
        if self._zero_stage == 0:
            return
        optimizer.zero_grad(set_to_none=True)  # at ZeRO 3 also: the next backward overwrites, and does not add
        if hasattr(optimizer, "averaged_gradients"):  # not where bf16 gradients are added up in fp32 at ZeRO 1
            for name in ("averaged_gradients", "all_grad_tensors"):
                kept = getattr(optimizer, name, {})
                kept.update(dict.fromkeys(kept))
            optimizer.reset_cpu_buffers()  # norms of offloaded gradients
            optimizer.micro_step_id = 0 if self._zero_stage == 3 else -1  # as before the first backward of a step

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

    def load(self, folder: Path, num_ranks_before: int) -> None:
        """Through a universal checkpoint, FOLDER.universal, where ZeRO's shards are of another number of ranks."""
        if self._zero_stage > 0 and num_ranks_before != comm.world_size():
            with convert(folder / self._TAG, folder.with_name(f"{folder.name}.universal")) as universal:
                load_universal(self._engine.optimizer, self._zero_stage, universal)
            return
        path, _ = self._engine.load_checkpoint(str(folder), tag=self._TAG)
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint here")


def _import_deepspeed(device: torch.device) -> Any:
    """Its import reads DS_ACCELERATOR and takes seconds, and the twin needs none."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        # this operator is compiled for a minute at the first start; gloo does without it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # its use of torch
    return deepspeed
