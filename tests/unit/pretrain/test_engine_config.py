"""DeepSpeed's dictionary: derived, merged with `engine.deepspeed`, and refused where it cannot be meant."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from data_prep.errors import InputError
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.deepspeed_options import REDUCE_BUCKET_SIZE
from pretrain.distributed.engine import build_engine
from pretrain.distributed.engine_deepspeed import check_options, deepspeed_config

ADAMW = OptimizerConfig(grad_clip_norm=0.5)


def dictionary(**engine: Any) -> dict[str, Any]:
    return deepspeed_config(ADAMW, EngineConfig(**engine), micro_batch_size=6)


def test_what_the_config_says_is_in_the_dictionary() -> None:
    settings = dictionary(precision="bf16", zero_stage=2, offload_optimizer="cpu")
    assert settings["train_micro_batch_size_per_gpu"] == 6
    assert settings["gradient_clipping"] == 0.5
    assert (settings["bf16"], settings["fp16"]) == ({"enabled": True}, {"enabled": False})
    bucket = {"reduce_bucket_size": REDUCE_BUCKET_SIZE}
    assert settings["zero_optimization"] == {"stage": 2, **bucket, "offload_optimizer": {"device": "cpu"}}
    assert dictionary(zero_stage=1)["zero_optimization"] == {"stage": 1, **bucket, "contiguous_gradients": False}
    assert dictionary(zero_stage=0)["zero_optimization"] == {"stage": 0}
    assert "optimizer" not in settings and "scheduler" not in settings


def test_further_options_are_merged_at_every_depth() -> None:
    options = {
        "zero_optimization": {"reduce_bucket_size": 1000, "offload_optimizer": {"pin_memory": True}},
        "bf16": {"check_grad_overflow": False},
        "communication_data_type": "fp32",
    }
    settings = dictionary(precision="bf16", zero_stage=2, offload_optimizer="cpu", deepspeed=options)
    assert settings["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert settings["communication_data_type"] == "fp32"
    assert settings["train_micro_batch_size_per_gpu"] == 6


@pytest.mark.parametrize(
    ("options", "path", "decided_by"),
    [
        ({"train_batch_size": 8}, "train_batch_size", "global_batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu", "micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", "micro_batch_size"),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "optimizer.grad_clip_norm"),
        ({"bf16": {"enabled": False}}, "bf16.enabled", "engine.precision"),
        ({"fp16": {"enabled": None}}, "fp16.enabled", "engine.precision"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "engine.zero_stage"),
        ({"optimizer": {"type": "Adam"}}, "optimizer", "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "optimizer.schedule"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal", "the trainer's checkpoint"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel", "this trainer"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device",
            "engine.offload_optimizer",
        ),
    ],
)
def test_an_option_that_ours_decides_is_refused_by_name(options: dict[str, Any], path: str, decided_by: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        EngineConfig(zero_stage=1, offload_optimizer="cpu", deepspeed=options)
    assert f"deepspeed.{path} is not free: {decided_by}" in str(refusal.value)


def test_another_offload_device_can_be_given_where_ours_is_none() -> None:
    nvme = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}}
    merged = dictionary(zero_stage=3, deepspeed=nvme)["zero_optimization"]
    assert merged == {"stage": 3, "reduce_bucket_size": REDUCE_BUCKET_SIZE, **nvme["zero_optimization"]}


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "torch", "precision": "fp16"}, "fp16 needs kind: deepspeed"),
        ({"kind": "torch", "offload_optimizer": "cpu", "zero_stage": 1}, "cpu needs kind: deepspeed"),
        ({"kind": "torch", "deepspeed": {"fp16": {}}}, "options needs kind: deepspeed"),
        ({"offload_optimizer": "cpu"}, "needs zero_stage 1 or more"),
        ({"precision": "bf16"}, "bf16 needs zero_stage 1 or more"),
        ({"precision": "fp16"}, "fp16 needs zero_stage 1 or more"),
    ],
)
def test_what_cannot_work_together_is_refused(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EngineConfig(**engine)


def test_a_value_in_the_place_of_a_section_is_refused() -> None:
    with pytest.raises(InputError, match=r"engine\.deepspeed\.zero_optimization: 3 stands where"):
        dictionary(deepspeed={"zero_optimization": 3})


def test_fp16_is_refused_on_a_cpu() -> None:
    config = EngineConfig(precision="fp16", zero_stage=2)
    with pytest.raises(InputError, match=r"engine\.precision: fp16 needs a GPU"):
        build_engine(torch.nn.Linear(2, 2), ADAMW, {}, config, 1, torch.device("cpu"))


os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is first imported, below


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero_optimization": {"overlap_comm": False, "stage3_max_live_parameters": 1000}},
        {"zero_optimization": {"offload_optimizer": {"device": "nvme", "buffer_count": 5}, "sub_group_size": 9}},
        {"bf16": {"check_grad_overflow": False}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"fp16": {"initial_scale_power": 10, "loss_scale_window": 100}},
        {"communication_data_type": "fp32", "prescale_gradients": False, "gradient_predivide_factor": 2.0},
        {"flops_profiler": {"enabled": True, "profile_step": 3}, "wall_clock_breakdown": True},
        {"comms_logger": {"enabled": True, "verbose": False}, "dump_state": False, "memory_breakdown": False},
        {"aio": {"block_size": 1048576, "queue_depth": 8}},
        {"activation_checkpointing": {"partition_activations": False}},
        {"checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": False}}},
    ],
)
def test_options_that_deepspeed_knows_are_taken(options: dict[str, Any]) -> None:
    check_options(dictionary(precision="bf16", zero_stage=3, deepspeed=options))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"zero_optimisation": {"overlap_comm": True}}, "zero_optimisation"),
        ({"communication_dtype": "fp32"}, "communication_dtype"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com"),
        ({"zero_optimization": {"offload_optimizer": {"pin": True}}}, "pin"),
        ({"bf16": {"check_overflow": False}}, "check_overflow"),
        ({"data_types": {"grad_acc_dtype": "fp32"}}, "data_types.grad_acc_dtype"),
        ({"activation_checkpointing": {"partition": True}}, "activation_checkpointing.partition"),
        ({"checkpoint": {"validation": "Warn"}}, "checkpoint.validation"),
        ({"aio": {"blocksize": 1}}, "aio.blocksize"),
        ({"zero_optimization": {"reduce_bucket_size": "large"}}, "reduce_bucket_size"),
        ({"communication_data_type": "fp8"}, "communication_data_type"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning"),
    ],
)
def test_an_option_that_deepspeed_does_not_know_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=r"engine\.deepspeed") as refusal:
        check_options(dictionary(precision="bf16", zero_stage=3, deepspeed=options))
    assert name in str(refusal.value)
