"""Samples that turn out undecodable while training: replaced on every rank alike, listed and counted.

    RUN_DIR/damaged.jsonl   a line for each: sample (position in index.npy), shard, key, reason, step, replacement

A replacement depends on (seed, epoch, sample) and on which samples are sound, and not on what was met before: a resumed
run, or one on another number of ranks, puts the same samples in the same places.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import write_atomically
from pretrain.data.batch import Batch
from pretrain.data.plan import REPLACEMENT_DOMAIN, generator
from pretrain.data.reader import BatchDataset
from pretrain.data.streaming import Reader, StreamReader
from pretrain.distributed import comm
from pretrain.train.agreement import SharedInputError
from pretrain.train.metrics import read_metrics

_MAX_ROUNDS = 10  # a text that moves to another image can show that this one is damaged, too
_MAX_CANDIDATES = 1000
_FEWEST_SEEN = 10_000  # the fraction is taken of no fewer, or the first damaged sample would end a run


class Damage:
    """Replaces damaged samples and keeps their ledger. `num_seen` is rank 0's."""

    def __init__(self, reader: Reader, run_dir: Path, max_fraction: float, first_step: int = 0) -> None:
        """On resume the lines past the checkpoint are dropped: those steps are done again."""
        self.reader, self.max_fraction = reader, max_fraction
        self._path = run_dir / "damaged.jsonl"
        self._noted: set[int] = set()
        if comm.rank() == 0 and self._path.is_file():
            kept = [record for record in read_metrics(self._path) if record["step"] <= first_step]
            write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())
            self._noted = {int(record["sample"]) for record in kept}

    @property
    def num_seen(self) -> int:
        """Distinct damaged samples of the run so far, on rank 0."""
        return len(self._noted)

    def replaced(self, batch: Batch, step: int) -> Batch:
        """The batch of this step with other samples in the place of damaged ones. All ranks call it.

        Raises SharedInputError, on all ranks, when too many samples are damaged.
        """
        reader = self.reader
        if isinstance(reader, StreamReader):
            self._note_of_stream(batch, step)
            return batch
        epoch = step // reader.steps_per_epoch
        sample_N = reader.samples(step)
        for _ in range(_MAX_ROUNDS):
            damaged = _of_all_ranks(batch)
            if not damaged:
                return batch
            decided = self._decide(reader, damaged, sample_N, epoch, step) if comm.rank() == 0 else None
            replacements, problem = comm.from_rank_0(decided)
            if problem:
                raise SharedInputError(problem)
            sample_N = np.array([replacements.get(sample, sample) for sample in sample_N.tolist()], dtype=np.int64)
            batch = reader.make_batch(epoch, sample_N)
        raise SharedInputError(
            f"step {step + 1}: its batch still holds damaged samples after {_MAX_ROUNDS} rounds of replacing them "
            f"({self._path}); run `dermvlp verify {reader.data.directory}`"
        )

    def _note_of_stream(self, batch: Batch, step: int) -> None:
        """The stream's next samples have taken their place already."""
        damaged, problem = _of_all_ranks(batch), ""
        if comm.rank() == 0:
            self._note(damaged, dict.fromkeys(damaged), step)
            problem = self._too_many(step)
        if problem := comm.from_rank_0(problem):
            raise SharedInputError(problem)

    def _decide(
        self,
        reader: BatchDataset,
        damaged: Mapping[int, str],
        sample_N: np.ndarray[Any, Any],
        epoch: int,
        step: int,
    ) -> tuple[dict[int, int], str]:
        """(the replacement of each, why the run has to end). Rank 0 alone: one process reads the candidates."""
        in_batch, replacements = set(sample_N.tolist()), dict[int, int]()
        for sample in (sample for sample in sample_N.tolist() if sample in damaged):
            replacement = _sound_sample(reader, epoch, sample, in_batch)
            if replacement is None:
                return {}, (
                    f"step {step + 1}: sample {sample} is damaged ({damaged[sample]}), and no sound one outside its "
                    f"batch was found; run `dermvlp verify {self.reader.data.directory}`"
                )
            in_batch.add(replacement)
            replacements[sample] = replacement
        self._note(damaged, replacements, step)
        return replacements, self._too_many(step)

    def _note(self, damaged: Mapping[int, str], replacements: Mapping[int, int | None], step: int) -> None:
        data = self.reader.data
        new = [sample for sample in replacements if sample not in self._noted]
        records = [
            {
                "sample": sample,
                "shard": data.shard_of(sample).name,
                "key": None if isinstance(self.reader, StreamReader) else data.read_key(sample),
                "reason": damaged[sample],
                "step": step + 1,  # as in metrics.jsonl
                "replacement": replacements[sample],
            }
            for sample in new
        ]
        self._append(records)
        self._noted.update(new)

    def _append(self, records: Iterable[Mapping[str, Any]]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def _too_many(self, step: int) -> str:
        """Why the run has to end, or nothing."""
        num_samples = min((step + 1) * self.reader.spec.global_batch_size, len(self.reader.data))
        if self.num_seen / max(num_samples, _FEWEST_SEEN) <= self.max_fraction:
            return ""
        return (
            f"step {step + 1}: {self.num_seen} of {num_samples} samples seen are damaged, more than "
            f"data.max_damaged_fraction ({self.max_fraction}) allows; they are listed in {self._path}. Run "
            f"`dermvlp verify {self.reader.data.directory}`, or raise data.max_damaged_fraction"
        )


def _of_all_ranks(batch: Batch) -> dict[int, str]:
    return {sample: reason for part in comm.gather_objects(batch.damaged) for sample, reason in part}


def _sound_sample(reader: BatchDataset, epoch: int, sample: int, excluded: set[int]) -> int | None:
    """The first of a sequence drawn from (seed, epoch, sample) that can be read whole and is not excluded."""
    random = generator(REPLACEMENT_DOMAIN, reader.spec.seed, epoch, sample)
    candidates = random.integers(len(reader.data), size=_MAX_CANDIDATES).tolist()
    return next((c for c in candidates if c not in excluded and reader.damage_of(c) is None), None)
