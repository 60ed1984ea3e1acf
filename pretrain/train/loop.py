"""The training loop: build, resume, step, log, validate, save, stop."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.config_file import dump_yaml
from data_prep.files import write_atomically
from pretrain.config import TrainConfig
from pretrain.data.batch import Batch
from pretrain.data.manifest import ShardedDataset
from pretrain.data.reader import read_batches
from pretrain.data.streaming import Reader, StreamReader
from pretrain.distributed import comm
from pretrain.distributed.engine import choose_device, initialise_process_group
from pretrain.distributed.watch import PeerWatch
from pretrain.train.agreement import Agreement
from pretrain.train.checkpoint import resume, save_checkpoint, update_record, with_edges_of_checkpoint
from pretrain.train.curves import loss_curves, plot_losses
from pretrain.train.damage import Damage
from pretrain.train.guard import GoBack, Guard
from pretrain.train.metrics import MetricsLog, reduce_terms
from pretrain.train.record import RunRecord
from pretrain.train.schedule import learning_rate
from pretrain.train.signals import StopSignals
from pretrain.train.sole_writer import sole_writer
from pretrain.train.state import build_trainer, with_num_steps
from pretrain.train.step import training_step
from pretrain.train.trackers import check_trackers
from pretrain.train.trainer import Trainer, Validator

MakeValidator = Callable[[Trainer, TrainConfig], Validator | None]

#: by checkpoint.best_by: the validation's value, and whether more of it is better
#: raised where a value of the validation means something else than before: mean recall is over five ks since 2
VALIDATION_VERSION = 2
_BEST_BY = {
    "loss": ("val/loss", -1),
    "retrieval": ("val/retrieval/mean_recall", 1),
    "zero_shot": ("val/zero_shot/balanced_accuracy", 1),
}


@dataclass(frozen=True)
class Outcome:
    step: int  # steps done, all saved
    finished: bool  # False: a signal asked the run to stop


def train(config: TrainConfig, make_validator: MakeValidator | None = None) -> Outcome:
    """Runs (or goes on with) a training run on this rank.

    Raises InputError for a config, data or checkpoint that cannot work, before the first step; and for a bad step.
    """
    with StopSignals() as signals, ExitStack() as until_the_end:
        device = choose_device()
        if device.type == "cpu" and config.launch.threads_per_rank is not None:
            torch.set_num_threads(config.launch.threads_per_rank)
        initialise_process_group(device, config.engine)
        until_the_end.enter_context(PeerWatch())
        until_the_end.enter_context(sole_writer(config.run_dir))
        config = with_num_steps(config)
        check_trackers(config.trackers)
        trainer, reader = build_trainer(with_edges_of_checkpoint(config), device)
        validate = make_validator(trainer, trainer.config) if make_validator is not None else None
        record = resume(trainer, reader.data.digest)
        while True:
            log = _open_log(trainer, reader, record.step)
            try:
                outcome = _Run(trainer, reader, validate, record, log, signals).steps()
                break
            except GoBack as bad:
                record = resume(trainer, reader.data.digest, pass_over=bad.step)
            finally:
                log.close()
    _plot(config.run_dir)
    return outcome


def _plot(run_dir: Path) -> None:
    if comm.rank() == 0:
        try:
            plot_losses(loss_curves(run_dir), run_dir / "loss_curves.png")
        except (OSError, ValueError) as error:  # a picture is no reason to end, or to end with another status
            print(f"warning: {run_dir / 'loss_curves.png'}: not drawn ({error})", file=sys.stderr)


class _Run:
    """The steps from a checkpoint on."""

    def __init__(
        self,
        trainer: Trainer,
        reader: Reader,
        validate: Validator | None,
        record: RunRecord,
        log: MetricsLog,
        signals: StopSignals,
    ) -> None:
        self.trainer, self.config, self.reader, self.validate = trainer, trainer.config, reader, validate
        self.record, self.log, self.signals = record, log, signals
        self.guard = Guard(self.config, record, reader.data, log.say)
        trainer.is_bad = self.guard.is_bad if self.config.bad_steps.action == "skip" else None
        self.damage = Damage(reader, self.config.run_dir, self.config.data.max_damaged_fraction, record.step)
        self.window = _Window(record.step)
        self.first_step = self.saved_step = record.step
        self.saved_at = time.monotonic()
        self._forget_best_of_another_validation()

    def steps(self) -> Outcome:
        config, device = self.config, next(self.trainer.model.parameters()).device
        first_step = self.first_step
        if not comm.all_agree(not self.signals.received):  # while the towers were built
            self.log.say("stopped by a signal before the first step: the same command begins there")
            return Outcome(first_step, finished=False)
        if config.bad_steps.action == "rollback" and first_step == 0:
            self._save()  # something to go back to
        if first_step > 0 and self.record.validated_step != first_step:
            self._validate(first_step)  # killed between the save and the validation of this step
        batches = self._batches(first_step, pin=device.type == "cuda")
        agreement = Agreement()
        upcoming = next(batches, None)
        agreement.start(False, False, 0 if upcoming is None else len(upcoming.damaged))
        for step in range(first_step, config.steps):
            agreed = agreement.read()
            assert upcoming is not None
            batch = self.damage.replaced(upcoming, step) if agreed.num_damaged else upcoming
            self._say_order(step)
            self._step(batch.to(device), step)
            done = self.record.step
            if agreed.num_stop > 0 and done < config.steps:  # whoever sent the signal may not wait long
                self._save()
                self.log.say(f"stopped by a signal after step {done}; saved: the same command goes on from here")
                return Outcome(done, finished=False)
            # while the device works: the next batch, and what the ranks have to tell each other
            upcoming = self.window.wait_for(batches)
            is_due = comm.rank() == 0 and agreed.num_save == 0 and self._minutes_are_over()
            agreement.start(self.signals.received, is_due, 0 if upcoming is None else len(upcoming.damaged))
            by_clock = agreed.num_save > 0 and done - self.saved_step > 1  # not where it was saved meanwhile
            if by_clock or done % config.checkpoint.every == 0 or done == config.steps:
                self._save()  # before validation, which can fail
            self._validate(done)
        agreement.read()
        return Outcome(config.steps, finished=True)

    def _batches(self, first_step: int, pin: bool) -> Iterator[Batch]:
        reader, config, data = self.reader, self.config, self.config.data
        if not isinstance(reader, StreamReader):
            return read_batches(reader, first_step, config.steps, data.num_workers, data.prefetch_batches, pin)
        for line in reader.summary(first_step, self.record.order_of):
            self.log.say(line)
        self.record.order_of = reader.order_of
        return reader.read_batches(first_step, config.steps, pin, comm.start_cpu_gather)

    def _step(self, batch: Batch, step: int) -> None:
        """One step and what is said of it."""
        done = step + 1
        if step in self.record.passed_over:
            self.log.say(f"step {done}: its batch is passed over")
        else:
            loss, terms = training_step(self.trainer, batch, step)
            self.guard.note(step, loss, terms, self.trainer.engine.grad_norm(), batch)
            if done % self.config.log_every == 0 or done == self.config.steps:
                values = reduce_terms(loss, terms) | _state_values(self.trainer, batch, step)
                values |= self.window.values(done, self.config) | {"damaged_samples": float(self.damage.num_seen)}
                self.log.write(done, values)
                self.guard.check()
                _warn(values, self.log)
                self.window = _Window(done)
        self.record.step = done
        self.log.advance(done)

    def _forget_best_of_another_validation(self) -> None:
        """Values over other samples, or in other batches, cannot be compared."""
        validation = self.config.validation
        if validation is None:
            return
        digest = ShardedDataset(validation.val_dir).digest
        by = self.config.checkpoint.best_by
        how = f"{validation.max_num_samples} samples, {comm.world_size()} ranks, {validation.templates}"
        own = f"{by}, {digest}, {how}, {VALIDATION_VERSION}"
        if self.record.best_of != own:
            if self.record.best_step is not None:
                self.log.say(f"the best so far, step {self.record.best_step}, is forgotten: it was validated otherwise")
            self.record.best_of, self.record.best_step, self.record.best_value = own, None, None

    def _validate(self, done: int) -> None:
        """Where it is due; a new best is saved, or noted in the checkpoint of this step."""
        validation = self.config.validation
        if self.validate is None or validation is None:
            return
        if done % validation.every == 0 or done == self.config.steps:
            self.guard.check()  # features that are not finite would be refused without a step's name
            values = self.validate()
            self.log.write_validation(done, values)
            self.window = _Window(done)
            _plot(self.config.run_dir)
            name, sign = _BEST_BY[self.config.checkpoint.best_by]
            best, value = self.record.best_value, values[name]
            self.record.validated_step = done
            is_best = math.isfinite(value) and (best is None or sign * value > sign * best)
            if is_best:
                self.record.best_step, self.record.best_value = done, value
            if self.saved_step == done:
                update_record(self.config.run_dir, self.record)
            elif is_best and self.config.checkpoint.keep_best:
                self._save()

    def _save(self) -> None:
        self.guard.check()
        save_checkpoint(self.trainer, self.record, self.reader.data.digest)
        self.saved_at, self.saved_step = time.monotonic(), self.record.step
        self.window = _Window(self.record.step)

    def _minutes_are_over(self) -> bool:
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self.saved_at > 60 * minutes

    def _say_order(self, step: int) -> None:
        if step % self.reader.steps_per_epoch == 0 or step == self.first_step:
            epoch = step // self.reader.steps_per_epoch
            self.log.say(f"epoch {epoch}: sample order {self.reader.order_digest(epoch)}")


def _open_log(trainer: Trainer, reader: Reader, first_step: int) -> MetricsLog:
    """Writes the resolved config and says what the run starts from."""
    config = trainer.config
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if comm.rank() == 0:
        write_atomically(config.run_dir / "config.yaml", dump_yaml(config).encode())
    # under ZeRO-3 a parameter holds this rank's part; DeepSpeed notes the whole
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    log = MetricsLog(config, first_step)
    log.say(
        f"{num_parameters / 1e6:.1f} M parameters, {len(reader.data)} samples, "
        f"{reader.steps_per_epoch} steps an epoch, {comm.world_size()} rank(s), from step {first_step}, "
        f"text buckets {reader.spec.bucket_edges}"
    )
    if trainer.engine.settings:
        settings = json.dumps(trainer.engine.settings)
        log.say(f"DeepSpeed {settings}")
        if comm.rank() == 0:
            write_atomically(config.run_dir / "deepspeed.json", settings.encode())
    for report in trainer.model.weight_reports:
        for line in report.lines():
            log.say(line)
    return log


class _Window:
    """The steps since the last logged one: speed, and how long the reader was waited for."""

    def __init__(self, first_step: int) -> None:
        self._first_step, self._started = first_step, time.monotonic()
        self._waited_s = 0.0

    def wait_for(self, batches: Iterator[Batch]) -> Batch | None:
        asked_at = time.monotonic()
        batch = next(batches, None)
        self._waited_s += time.monotonic() - asked_at
        return batch

    def values(self, done: int, config: TrainConfig) -> dict[str, float]:
        elapsed_s = time.monotonic() - self._started
        num_samples = (done - self._first_step) * config.global_batch_size
        return {"samples_per_s": num_samples / elapsed_s, "reader_wait_fraction": self._waited_s / elapsed_s}


def _state_values(trainer: Trainer, batch: Batch, step: int) -> dict[str, float]:
    """All ranks call it: the temperature may lie in parts on them."""
    return {
        "lr": learning_rate(trainer.config.optimizer, step, trainer.config.steps),
        "logit_scale": math.exp(float(trainer.engine.full_tensor(trainer.model.logit_scale))),
        "grad_norm": float(trainer.engine.grad_norm()),
        "truncated_texts": float(comm.sum_over_ranks(torch.tensor([batch.num_truncated]))),
    }


def _warn(values: dict[str, float], log: MetricsLog) -> None:
    if any(name.endswith("/selected_fraction") and value == 0.0 for name, value in values.items()):
        log.say("warning: local_alignment selects no patch (sigma too high for these towers?) and learns nothing")
