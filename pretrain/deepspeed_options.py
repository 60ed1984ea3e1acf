"""Which options of DeepSpeed's own dictionary `engine.deepspeed` cannot hold, because this config decides them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: elements: 40 MB of fp32 gradients, 20 MB of bf16, as DDP's. DeepSpeed's own 5 x 10^8 are allocated in every step.
REDUCE_BUCKET_SIZE = 10_000_000

_OFFLOAD_DEVICE = "zero_optimization.offload_optimizer.device"
_PARALLEL = "this trainer, which divides data over the ranks and nothing else,"
#: paths in DeepSpeed's dictionary, and what decides them
_DECIDED: dict[str, str] = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "managed_gradient_accumulation": "micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip_norm",
    "gradient_allreduce_op": "the loss, which is made for gradients averaged over ranks,",
    "bf16.enabled": "engine.precision",
    "bf16.bf16_master_weights_and_grads": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16.enabled": "engine.precision",
    "torch_autocast": "engine.precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
    _OFFLOAD_DEVICE: "engine.offload_optimizer",
    # steps at other times than the trainer's, or with an optimizer that it does not schedule
    "zero_optimization.zenflow": "the trainer's step",
    "zero_optimization.offload_optimizer.ratio": "the trainer's step",
    "zero_optimization.offload_optimizer.super_offload": "the trainer's step",
    "zero_optimization.elastic_checkpoint": "the trainer's checkpoint",
    "zero_optimization.load_from_fp32_weights": "the trainer's checkpoint",
    "datastates_ckpt": "the trainer's checkpoint",  # as checkpoint.writer
    "checkpoint.load_universal": "the trainer's checkpoint",
    "checkpoint.use_node_local_storage": "the trainer's checkpoint",
    "checkpoint.writer": "the trainer's checkpoint",  # can write after the step has gone on
    "steps_per_print": "log_every",
    "sequence_parallel_size": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "pipeline": _PARALLEL,
    "autotuning": _PARALLEL,
    "hybrid_engine": _PARALLEL,
    "data_efficiency": "the reader",
    "compile": "the model as it is built",
}


def refused_option(options: Mapping[str, Any], offloads: bool) -> str | None:
    """Why `options` cannot be merged into what is derived from the rest of the config; None where they can.

    `offloads`: engine.offload_optimizer is set; where it is not, a device (nvme) can be given here.
    """
    for path, decided_by in _DECIDED.items():
        if _holds(options, path) and (offloads or path != _OFFLOAD_DEVICE):
            return f"deepspeed.{path} is not free: {decided_by} decides it; remove it here"
    return None


def _holds(options: Mapping[str, Any], path: str) -> bool:
    key, _, rest = path.partition(".")
    if key not in options:
        return False
    if not rest:
        return True
    inner = options[key]
    return isinstance(inner, Mapping) and _holds(inner, rest)
