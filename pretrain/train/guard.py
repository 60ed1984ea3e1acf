"""Losses that are not finite, or spikes: named with step and samples, then handled as `bad_steps` says.

The loss that is judged is the global one: a rank's own share says little, since its images meet all ranks' texts.
Losses stay on the device until a step is logged or saved, so that no step waits for them; to skip a step, its loss
is read before the weights move.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.data.batch import Batch
from pretrain.data.manifest import ShardedDataset
from pretrain.distributed import comm
from pretrain.objectives.base import Term
from pretrain.train.agreement import SharedInputError
from pretrain.train.metrics import to_json
from pretrain.train.record import RunRecord

_NUM_NAMED, _NUM_RANKS_NAMED = 10, 4  # samples of a rank, and ranks, in a message; the file has all


class GoBack(Exception):  # noqa: N818 (nothing is wrong with the program)
    """To the newest checkpoint before this step, whose batch is passed over then."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step


@dataclass(frozen=True)
class _Noted:
    """A step whose values have not been read yet."""

    step: int  # from 0; people count steps done, from 1
    share_V: Tensor  # W x this rank's share of the loss and of each objective's; then the gradient norm
    labels: tuple[str, ...]  # of the objectives
    sample_B: Tensor


@dataclass(frozen=True)
class _Bad:
    reason: str
    loss: float
    loss_by_objective: dict[str, float]


class Guard:
    """Watches the losses of a run. All ranks make the same calls, and decide alike."""

    def __init__(
        self, config: TrainConfig, record: RunRecord, data: ShardedDataset, say: Callable[[str], None] = print
    ) -> None:
        self.config, self.record, self._data, self._say = config.bad_steps, record, data, say
        self._path = config.run_dir / "bad_steps.jsonl"
        self._scales_losses = config.engine.precision == "fp16"  # the engine itself skips steps that overflow
        self._pending: list[_Noted] = []
        self._skipped: _Bad | None = None  # the step under way

    def is_bad(self, step: int, loss: Tensor, terms: dict[str, Term]) -> bool:
        """For `skip`, before the weights move: judges the loss at once, and waits for the device to know it."""
        (losses,) = _over_ranks([_shares(loss, terms)])
        self._skipped = self._judge(losses, tuple(terms))
        return self._skipped is not None

    def note(self, step: int, loss: Tensor, terms: dict[str, Term], grad_norm: Tensor | float, batch: Batch) -> None:
        """After each step. Raises SharedInputError when too many have been skipped."""
        norm = grad_norm.to(loss) if isinstance(grad_norm, Tensor) else loss.new_full((), grad_norm)
        noted = _Noted(step, torch.cat([_shares(loss, terms), norm.reshape(1)]), tuple(terms), batch.sample_B)
        if self._skipped is None:
            self._pending.append(noted)
        else:
            self._handle(noted, self._skipped)
            self._skipped = None

    def check(self) -> None:
        """Judges the steps noted since the last call, and waits for the device to know them.

        To be called on logged steps, and before a checkpoint is written: none may hold a bad step. Raises
        SharedInputError, or GoBack, at the first bad one.
        """
        pending, self._pending = self._pending, []
        for noted, (*losses, norm) in zip(pending, _over_ranks([noted.share_V for noted in pending]), strict=True):
            bad = None if self.config.action == "skip" else self._judge(losses, noted.labels)
            if bad is None and not math.isfinite(norm) and not self._scales_losses:  # the weights are not either, now
                bad = _Bad(f"the gradient norm is {norm}", losses[0], dict(zip(noted.labels, losses[1:], strict=True)))
            if bad is not None:
                self._handle(noted, bad)

    def _judge(self, losses: Sequence[float], labels: Sequence[str]) -> _Bad | None:
        """None for a good step, whose loss then counts for the median."""
        loss, by_objective = losses[0], dict(zip(labels, losses[1:], strict=True))
        if not math.isfinite(loss):
            broken = [label for label, value in by_objective.items() if not math.isfinite(value)]
            return _Bad(f"the loss is {loss}{f', of {_listed(broken)}' if broken else ''}", loss, by_objective)
        factor, window, recent = self.config.spike_factor, self.config.window, self.record.recent_losses
        if factor is None:
            return None
        if len(recent) >= window and loss > factor * (median := statistics.median(recent[-window:])):
            times = f"{loss / median:.3g} times the median of the last {window} steps" if median else "a spike"
            return _Bad(f"the loss is {loss:.4g}, {times}", loss, by_objective)
        self.record.recent_losses = [*recent, loss][-window:]
        return None

    def _handle(self, noted: _Noted, bad: _Bad) -> None:
        """Says and writes down what was found; raises unless the step was skipped."""
        by_rank = comm.gather(noted.sample_B).view(comm.world_size(), -1).tolist()
        keys = self._keys(by_rank) if comm.rank() == 0 else {}
        done, action = noted.step + 1, self.config.action
        if comm.rank() == 0:
            self._write(done, bad, by_rank, keys)
        losses = ", ".join(f"{label} {value:.4g}" for label, value in bad.loss_by_objective.items())
        what = f"step {done}: {bad.reason} ({losses}). {_samples(by_rank, keys)}; all of them in {self._path}"
        if action == "skip" and self._skipped is None:
            raise SharedInputError(f"{what}. Its loss gave no reason to skip it, and the weights have moved. {_REMEDY}")
        if action == "stop":
            raise SharedInputError(f"{what}. {_REMEDY}")
        if len(self.record.passed_over) >= self.config.max_num:
            raise SharedInputError(f"{what}. It is one more than bad_steps.max_num ({self.config.max_num})")
        if action == "rollback":
            self._say(f"{what}; going back to the newest checkpoint before it, to pass over its batch")
            raise GoBack(noted.step)
        self._say(f"{what}; skipped, the weights are as before it")
        self.record.passed_over.append(noted.step)

    def _keys(self, by_rank: Sequence[Sequence[int]]) -> dict[int, str]:
        """Of the samples that can be read: in streaming mode the shards are not at hand."""
        keys = {}
        for position in (position for positions in by_rank for position in positions):
            with contextlib.suppress(InputError, OSError):
                keys[position] = self._data.read_sample(position).key
        return keys

    def _write(self, done: int, bad: _Bad, by_rank: list[list[int]], keys: dict[int, str]) -> None:
        samples = [
            {"rank": rank, "position": position, "key": keys.get(position)}
            for rank, positions in enumerate(by_rank)
            for position in positions
        ]
        values = {"step": done, "action": self.config.action, "reason": bad.reason, "loss": bad.loss}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(to_json(values | {"losses": bad.loss_by_objective, "samples": samples}) + "\n")


_REMEDY = (
    "Every checkpoint is from before it: look at these samples, lower optimizer.lr, or set bad_steps.action to "
    "rollback or skip, and the same command goes on"
)


def _shares(loss: Tensor, terms: dict[str, Term]) -> Tensor:
    return torch.stack([loss.detach(), *(term.loss.detach() for term in terms.values())])


def _over_ranks(shares: Sequence[Tensor]) -> list[list[float]]:
    """The mean over ranks is the loss of the global batch (objectives/base.py). Waits for the device."""
    if not shares:
        return []
    means: list[list[float]] = (comm.sum_over_ranks(torch.stack(list(shares))) / comm.world_size()).tolist()
    return means


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)


def _samples(by_rank: list[list[int]], keys: dict[int, str]) -> str:
    """The first of the first ranks."""

    def name(position: int) -> str:
        return f"{position} ({keys[position]})" if position in keys else str(position)

    parts = []
    for rank, positions in enumerate(by_rank[:_NUM_RANKS_NAMED]):
        who = f"of rank {rank} " if len(by_rank) > 1 else ""
        parts.append(f"{who}{', '.join(name(position) for position in positions[:_NUM_NAMED])}")
    return f"Samples {'; '.join(parts)}"
