"""The training loop: build, resume, step, log, save."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from data_prep.config import dump_yaml
from data_prep.errors import InputError
from data_prep.files import write_atomically
from pretrain.config import TrainConfig
from pretrain.data.batch import Batch
from pretrain.data.plan import order_digest
from pretrain.data.reader import BatchDataset, read_batches
from pretrain.distributed import comm
from pretrain.distributed.engine import choose_device, initialise_process_group
from pretrain.train.checkpoint import list_checkpoints, resume, save_checkpoint, with_edges_of_checkpoint
from pretrain.train.curves import loss_curves, plot_losses
from pretrain.train.metrics import MetricsLog, reduce_terms
from pretrain.train.schedule import learning_rate
from pretrain.train.state import build_trainer, with_num_steps
from pretrain.train.step import training_step
from pretrain.train.trainer import Trainer


def train(config: TrainConfig) -> Path:
    """Runs (or goes on with) a training run on this rank; returns the last checkpoint's folder.

    Raises InputError for a config, data or checkpoint that cannot work, before the first step.
    """
    device = choose_device()
    if device.type == "cpu" and config.launch.threads_per_rank is not None:
        torch.set_num_threads(config.launch.threads_per_rank)
    initialise_process_group(device, config.engine)
    config = with_num_steps(config)
    trainer, reader = build_trainer(with_edges_of_checkpoint(config), device)
    first_step = resume(trainer, reader.data.digest)
    log = _open_log(trainer, reader, first_step)
    batches = read_batches(reader, first_step, config.steps, config.data.num_workers, pin=device.type == "cuda")
    window = _Window(first_step)
    for step in range(first_step, config.steps):
        asked_at = time.monotonic()
        batch = next(batches).to(device)
        window.waited_s += time.monotonic() - asked_at
        if step % reader.steps_per_epoch == 0 or step == first_step:
            epoch = step // reader.steps_per_epoch
            log.say(f"epoch {epoch}: sample order {order_digest(reader.order(epoch))}")
        loss, terms = training_step(trainer, batch, step)
        done = step + 1
        log.advance(done)
        if done % config.log_every == 0 or done == config.steps:
            values = reduce_terms(loss, terms) | _state_values(trainer, batch, step) | window.values(done, config)
            log.write(done, values)
            _check_values(done, values, log)
            window = _Window(done)
        if done % config.checkpoint_every == 0 or done == config.steps:
            save_checkpoint(trainer, done, reader.data.digest)
            window = _Window(done)
    log.close()
    if comm.rank() == 0:
        plot_losses(loss_curves(config.run_dir), config.run_dir / "loss_curves.png")
    return list_checkpoints(config.run_dir)[-1]


def _open_log(trainer: Trainer, reader: BatchDataset, first_step: int) -> MetricsLog:
    """Writes the resolved config and says what the run starts from."""
    config = trainer.config
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if comm.rank() == 0:
        write_atomically(config.run_dir / "config.yaml", dump_yaml(config).encode())
    # under ZeRO-3 a parameter holds this rank's part; DeepSpeed notes the whole
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    log = MetricsLog(config.run_dir, first_step, config.steps)
    log.say(
        f"{num_parameters / 1e6:.1f} M parameters, {len(reader.data)} samples, "
        f"{reader.steps_per_epoch} steps an epoch, {comm.world_size()} rank(s), from step {first_step}, "
        f"text buckets {reader.spec.bucket_edges}"
    )
    for report in trainer.model.weight_reports:
        for line in report.lines():
            log.say(line)
    return log


class _Window:
    """The steps since the last logged one: speed, and how long the reader was waited for."""

    def __init__(self, first_step: int) -> None:
        self._first_step, self._started = first_step, time.monotonic()
        self.waited_s = 0.0

    def values(self, done: int, config: TrainConfig) -> dict[str, float]:
        elapsed_s = time.monotonic() - self._started
        num_samples = (done - self._first_step) * config.global_batch_size
        return {"samples_per_s": num_samples / elapsed_s, "reader_wait_fraction": self.waited_s / elapsed_s}


def _state_values(trainer: Trainer, batch: Batch, step: int) -> dict[str, float]:
    """All ranks call it: the temperature may lie in parts on them."""
    return {
        "lr": learning_rate(trainer.config.optimizer, step, trainer.config.steps),
        "logit_scale": math.exp(float(trainer.engine.full_tensor(trainer.model.logit_scale))),
        "grad_norm": float(trainer.engine.grad_norm()),
        "truncated_texts": float(comm.sum_over_ranks(torch.tensor([batch.num_truncated]))),
    }


def _check_values(done: int, values: dict[str, float], log: MetricsLog) -> None:
    if not math.isfinite(values["loss"]):
        raise InputError(
            f"step {done}: the loss is {values['loss']}; lower optimizer.lr, or remove the newest checkpoints and go on"
        )
    if any(name.endswith("/selected_fraction") and value == 0.0 for name, value in values.items()):
        log.say("warning: local_alignment selects no patch (sigma too high for these towers?) and learns nothing")
