"""The training loop: build, resume, step, log, save."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from data_prep.config import dump_yaml
from pretrain.config import TrainConfig
from pretrain.data.plan import order_digest
from pretrain.data.reader import read_batches
from pretrain.distributed import comm
from pretrain.distributed.engine import choose_device, initialise_process_group
from pretrain.train.checkpoint import list_checkpoints, resume, save_checkpoint
from pretrain.train.curves import loss_curves, plot_losses
from pretrain.train.metrics import MetricsLog, reduce_terms
from pretrain.train.schedule import learning_rate
from pretrain.train.state import build_trainer
from pretrain.train.step import training_step


def train(config: TrainConfig) -> Path:
    """Runs (or goes on with) a training run on this rank; returns the last checkpoint's folder.

    Raises InputError for a config, data or checkpoint that cannot work, before the first step.
    """
    device = choose_device()
    if device.type == "cpu" and config.launch.threads_per_rank is not None:
        torch.set_num_threads(config.launch.threads_per_rank)
    initialise_process_group(device, config.engine)
    trainer, reader = build_trainer(config, device)
    first_step = resume(trainer, reader.data.digest)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if comm.rank() == 0:
        edges = reader.spec.bucket_edges
        resolved = config.model_copy(update={"data": config.data.model_copy(update={"text_bucket_edges": edges})})
        (config.run_dir / "config.yaml").write_text(dump_yaml(resolved), encoding="utf-8")
    # under ZeRO-3 a parameter holds this rank's part; DeepSpeed notes the whole
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    log = MetricsLog(config.run_dir, first_step, config.num_steps)
    log.say(
        f"{num_parameters / 1e6:.1f} M parameters, {len(reader.data)} samples, "
        f"{reader.steps_per_epoch} steps an epoch, {comm.world_size()} rank(s), from step {first_step}, "
        f"text buckets {reader.spec.bucket_edges}"
    )
    batches = read_batches(reader, first_step, config.num_steps, config.data.num_workers, pin=device.type == "cuda")
    logged_at, logged_step, waited_s = time.monotonic(), first_step, 0.0
    for step in range(first_step, config.num_steps):
        asked_at = time.monotonic()
        batch = next(batches).to(device)
        waited_s += time.monotonic() - asked_at
        if step % reader.steps_per_epoch == 0 or step == first_step:
            epoch = step // reader.steps_per_epoch
            log.say(f"epoch {epoch}: sample order {order_digest(reader.order(epoch))}")
        loss, terms = training_step(trainer, batch, step)
        done = step + 1
        log.advance(done)
        if done % config.log_every == 0 or done == config.num_steps:
            values = reduce_terms(loss, terms)
            elapsed_s = time.monotonic() - logged_at
            log.write(
                done,
                {
                    **values,
                    "lr": learning_rate(config.optimizer, step, config.num_steps),
                    "logit_scale": math.exp(float(trainer.engine.full_tensor(trainer.model.logit_scale))),
                    "grad_norm": float(trainer.engine.grad_norm()),
                    "samples_per_s": (done - logged_step) * config.global_batch_size / elapsed_s,
                    "reader_wait_fraction": waited_s / elapsed_s,
                    "truncated_texts": float(batch.num_truncated),
                },
            )
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"step {done}: the loss is {values['loss']}; lower optimizer.lr or resume earlier"
                )
            if values.get("local_alignment/selected_fraction") == 0.0:
                log.say(
                    "warning: local_alignment selects no patch (sigma too high for these towers?) and learns nothing"
                )
            logged_at, logged_step, waited_s = time.monotonic(), done, 0.0
        if done % config.checkpoint_every == 0 or done == config.num_steps:
            save_checkpoint(trainer, done, reader.data.digest)
    log.close()
    if comm.rank() == 0:
        plot_losses(loss_curves(config.run_dir), config.run_dir / "loss_curves.png")
    return list_checkpoints(config.run_dir)[-1]
