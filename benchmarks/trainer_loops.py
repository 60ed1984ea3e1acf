"""The rivals of `benchmarks.trainer`: one rank of a bare training loop, under torchrun.

    torchrun --nproc_per_node=2 -m benchmarks.trainer_loops ddp|deepspeed CONFIG NUM_WARM_STEPS

The loop has nothing but the step: no reader (every batch is decoded, tokenised and in memory before the clock starts),
no record, no signals, no agreement between ranks, no clamp, no log. Towers, loss and batches are those of CONFIG.
Rank 0 prints a JSON object: seconds a step after the warm ones, and the loss of every step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.config_file import load_config
from pretrain.config import TrainConfig
from pretrain.data.batch import Batch
from pretrain.distributed import comm
from pretrain.models.build import PixelNormaliser, build_tokenizer
from pretrain.objectives.build import build_objectives
from pretrain.objectives.features import gather_features, gather_texts
from pretrain.train.state import build_dual_encoder, build_reader

CPU = torch.device("cpu")


def main(side: str, config_path: str, num_warm_steps: int) -> None:
    config = load_config(config_path, [], TrainConfig)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = build_dual_encoder(config)
    reader = build_reader(config, model, build_tokenizer(config.model, model.text))
    batches = [reader[step] for step in range(config.steps)]
    model.train()
    step = {"ddp": _ddp, "deepspeed": _deepspeed}[side](model, config, batches[0])
    losses, started = [], 0.0
    for number, batch in enumerate(batches):
        if number == num_warm_steps:
            started = time.perf_counter()
        losses.append(step(batch))
    elapsed_s = time.perf_counter() - started
    mean = [float(comm.sum_over_ranks(loss)) / comm.world_size() for loss in losses]
    if comm.rank() == 0:
        print(json.dumps({"s_per_step": elapsed_s / (config.steps - num_warm_steps), "losses": mean}), flush=True)
    dist.destroy_process_group()
    comm.end_process(0)


def _loss_of(forward: Any, model: Any, config: TrainConfig) -> Callable[[Batch], Tensor]:
    normalise = PixelNormaliser(model.visual, CPU, torch.float32)
    (objective,) = build_objectives(config.objectives)

    def loss(batch: Batch) -> Tensor:
        out = forward(normalise(batch.image_BCHW), batch.packed[0])
        text_UD = gather_texts(out["text_RD"], batch)
        features = gather_features(batch, out["image_BD"], text_UD, None, out["logit_scale"], None)
        value: Tensor = objective(features).loss
        return value

    return loss


def _optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    settings = config.optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, settings.lr, settings.betas, settings.eps, weight_decay=settings.weight_decay)


def _ddp(model: Any, config: TrainConfig, first: Batch) -> Callable[[Batch], Tensor]:
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    loss_of, optimizer = _loss_of(wrapped, model, config), _optimizer(model, config)

    def step(batch: Batch) -> Tensor:
        loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip_norm or float("inf"))
        optimizer.step()
        return loss.detach()

    return step


def _deepspeed(model: Any, config: TrainConfig, first: Batch) -> Callable[[Batch], Tensor]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute at the first start
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(model, config),
        config={
            "train_micro_batch_size_per_gpu": len(first.image_BCHW),
            "gradient_clipping": config.optimizer.grad_clip_norm,
            "zero_optimization": {"stage": config.engine.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    loss_of = _loss_of(engine, engine.module, config)

    def step(batch: Batch) -> Tensor:
        loss = loss_of(batch)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
