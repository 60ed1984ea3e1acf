"""The streaming mode: shards are read one after another, for storage without random access (docs/reading.md).

    plan.py deals an epoch's shards to readers -> remote.py reads each from its start -> a seeded shuffle buffer
    -> decode, tokens, masks, in the reader's process -> a rank's share of a step
    -> positions of all ranks' shares, exchanged a step ahead -> texts planned and packed as in reader.py -> Batch

A reader is one worker process of one rank (the rank itself with num_workers 0). Without damaged samples the order is a
pure function of (seed, epoch, manifest, ranks, readers of a rank, shuffle_buffer): the buffer is webdataset's, run over
positions alone where it must be known beforehand. So a resumed run goes on with the sample it had come to, reading
the shards that are not used up again from their start.

Shapes: B images of this rank, N of the global batch, W ranks, S steps, K caption slots, R readers of a rank.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from pydantic import ValidationError
from torch.utils.data import IterableDataset, get_worker_info

from data_prep.errors import InputError
from data_prep.schema import Sample, text_hash
from pretrain.config import DataConfig, StreamConfig
from pretrain.data.batch import Batch
from pretrain.data.manifest import ShardedDataset
from pretrain.data.plan import buffer_seed, order_digest, sample_seed, stream_shard_order
from pretrain.data.reader import BatchDataset, from_workers
from pretrain.data.remote import RawSample, check_opener, read_shard, shard_url
from pretrain.data.texts import TextPlan

#: (local,) -> a function that waits for all ranks' values, rank-major: `comm.start_cpu_gather`
StartGather = Callable[[torch.Tensor], Callable[[], torch.Tensor]]


def num_readers(config: DataConfig) -> int:
    """Of one rank: worker processes, or the rank itself."""
    return max(1, config.num_workers)


def stream_steps_per_epoch(shard_sizes: NDArray[np.int64], global_batch_size: int, world_size: int) -> int:
    """Steps that every rank can fill in every epoch, whichever shards it is dealt: the smallest of them."""
    sizes = np.sort(shard_sizes[shard_sizes > 0])
    return int(sizes[: len(sizes) // world_size].sum()) // (global_batch_size // world_size)


def check_stream(data: ShardedDataset, config: DataConfig, global_batch_size: int, world_size: int) -> None:
    """Raises InputError for a stream that cannot work: too few shards, too few samples of a rank, a bad shard name.

    Does nothing without `data.stream`.
    """
    if config.stream is None:
        return
    check_opener(config.stream.url)
    for shard in data.manifest.shards:
        shard_url(config.stream.url, shard.name)
    num_shards = int((data.shard_sizes > 0).sum())
    if num_shards < world_size * num_readers(config):
        raise InputError(
            f"data.stream: {num_shards} shard(s) are fewer than {world_size} rank(s) x {num_readers(config)} reader(s) "
            f"= {world_size * num_readers(config)}, and each reads shards of its own; lower data.num_workers, or "
            "prepare with a smaller samples_per_shard"
        )
    if stream_steps_per_epoch(data.shard_sizes, global_batch_size, world_size) == 0:
        raise InputError(
            f"data.stream: {num_shards} shards dealt to {world_size} rank(s) can leave one with fewer samples than its "
            f"{global_batch_size // world_size} of a step; lower global_batch_size ({global_batch_size}), or prepare "
            "with a smaller samples_per_shard"
        )


def first_samples(data: ShardedDataset, stream: StreamConfig, limit: int) -> list[Sample]:
    """The first samples of the first shards, read from the url."""
    shards = (raw for shard in range(len(data.manifest.shards)) for raw in read_shard(data, shard, stream.url))
    return [Sample.model_validate_json(raw.json) for raw in itertools.islice(shards, limit)]


@dataclass(frozen=True)
class ReaderPlan:
    """What one reader does in one epoch."""

    shards: NDArray[np.int64]  # in the order in which they are read
    seed: int  # of the shuffle buffer
    count_S: NDArray[np.int64]  # images that it gives to each step of its rank


def samples_by_step(num_samples: Sequence[int], images_per_rank: int, num_steps: int) -> NDArray[np.int64]:
    """(S, R) int64: how many images of each step come from each reader, so that all come to their end together.

    Args:
        num_samples: of each reader of the rank; in sum at least `num_steps * images_per_rank`.
    """
    readers = np.repeat(np.arange(len(num_samples)), num_samples)
    progress = np.concatenate([(np.arange(count) + 0.5) / max(1, count) for count in num_samples])
    reader_SB = readers[np.argsort(progress, kind="stable")][: num_steps * images_per_rank]
    reader_SB = reader_SB.reshape(num_steps, images_per_rank)
    return np.stack([(reader_SB == reader).sum(1) for reader in range(len(num_samples))], axis=1)


@dataclass
class _Share:
    """What one reader gives to one step of its rank."""

    sample_B: torch.Tensor  # (B',) int64 positions in the index
    image_BCHW: torch.Tensor | None  # uint8; None where it gives none
    token_ids: torch.Tensor  # (L,) int64: of all captions, one after another, an image's in the order of its slots
    num_tokens_BK: torch.Tensor  # (B', K) int64; 0 in an empty slot
    visible_BV: torch.Tensor | None
    masked_BM: torch.Tensor | None
    damaged: dict[int, str]  # passed over: the reason by position


@dataclass(frozen=True)
class _Example:
    position: int
    seed: int
    image: torch.Tensor
    tokens: list[NDArray[np.int64]]  # of each caption slot


class _DamagedError(Exception):
    """A sample that cannot be decoded."""


class StreamReader:
    """The streaming mode's reader for one rank; for the training loop what `BatchDataset` is in the other mode."""

    def __init__(self, batches: BatchDataset, config: DataConfig) -> None:
        """`batches`: knows what a batch is made of; its tars are not read."""
        assert config.stream is not None
        check_stream(batches.data, config, batches.spec.global_batch_size, batches.world_size)
        self.batches, self.config, self.stream = batches, config, config.stream
        self.data, self.spec = batches.data, batches.spec
        self.rank, self.world_size = batches.rank, batches.world_size
        self.num_readers = num_readers(config)
        self._sizes = self.data.shard_sizes
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        #: whole global batches that all ranks can fill
        self.steps_per_epoch = stream_steps_per_epoch(self._sizes, self.spec.global_batch_size, self.world_size)

    @property
    def order_of(self) -> str:
        """What the order depends on beside seed and data, in words."""
        return f"{self.world_size} rank(s) x {self.num_readers} reader(s), shuffle_buffer {self.stream.shuffle_buffer}"

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The shards in the order in which they are read, reader after reader: with `order_of` it fixes the samples."""
        readers = [(rank, reader) for rank in range(self.world_size) for reader in range(self.num_readers)]
        return np.concatenate([self._shards(epoch, *reader) for reader in readers])

    def order_digest(self, epoch: int) -> str:
        """Names the order of an epoch in the log."""
        return order_digest(self.order(epoch))

    def _shards(self, epoch: int, rank: int, reader: int) -> NDArray[np.int64]:
        filled = np.flatnonzero(self._sizes > 0)
        order = filled[stream_shard_order(len(filled), self.spec.seed, epoch)]
        return order[rank :: self.world_size][reader :: self.num_readers]

    def plan(self, epoch: int, reader: int) -> ReaderPlan:
        shards = [self._shards(epoch, self.rank, number) for number in range(self.num_readers)]
        images_per_rank = self.spec.global_batch_size // self.world_size
        num_samples = [int(self._sizes[own].sum()) for own in shards]
        count_SR = samples_by_step(num_samples, images_per_rank, self.steps_per_epoch)
        seed = buffer_seed(self.spec.seed, epoch, self.rank, reader)
        return ReaderPlan(shards[reader], seed, count_SR[:, reader])

    def _placeholders(self, shard: int) -> Iterator[RawSample]:
        return (RawSample(position, b"", b"") for position in range(self._starts[shard], self._starts[shard + 1]))

    def _shuffled(self, plan: ReaderPlan, samples: Iterator[RawSample]) -> Iterator[RawSample]:
        size = self.stream.shuffle_buffer
        # a quarter is read before the first sample is given, then two for each one given until the buffer is full
        shuffled: Iterator[RawSample] = webdataset.shuffle(size, initial=max(1, size // 4), seed=plan.seed)(samples)
        return shuffled

    def sample_order(self, plan: ReaderPlan) -> NDArray[np.int64]:
        """Positions in the order in which the reader gives them, where none is damaged. Reads nothing."""
        samples = itertools.chain.from_iterable(self._placeholders(int(shard)) for shard in plan.shards)
        return np.fromiter((sample.position for sample in self._shuffled(plan, samples)), dtype=np.int64)

    def _needed(self, plan: ReaderPlan, num_used: int) -> tuple[set[int], int]:
        """(shards with a sample still to come after the first `num_used`, how many used samples they hold)."""
        if num_used == 0:
            return set(plan.shards.tolist()), 0
        shard_of = np.searchsorted(self._starts, self.sample_order(plan), side="right") - 1
        needed = np.unique(shard_of[num_used:])
        return set(needed.tolist()), int(np.isin(shard_of[:num_used], needed).sum())

    def _raw_samples(self, plan: ReaderPlan, num_used: int) -> Iterator[RawSample]:
        """The reader's samples of an epoch after the first `num_used`; shards that are used up are not read."""
        needed, _ = self._needed(plan, num_used)
        shards = (
            read_shard(self.data, shard, self.stream.url) if shard in needed else self._placeholders(shard)
            for shard in plan.shards.tolist()
        )
        return itertools.islice(self._shuffled(plan, itertools.chain.from_iterable(shards)), num_used, None)

    def summary(self, first_step: int, order_before: str) -> list[str]:
        """For the log: what the mode leaves out, and at which shards a resumed run begins to read.

        Args:
            order_before: `order_of` of the run that wrote the checkpoint; empty where there was none.
        """
        left_out = len(self.data) - self.steps_per_epoch * self.spec.global_batch_size
        lines = [
            f"streaming from {self.stream.url}: {len(self.data.manifest.shards)} shards for {self.order_of}; each "
            f"epoch leaves out {left_out} samples, others each time, so that all ranks have the same number of steps"
        ]
        epoch, step = divmod(first_step, self.steps_per_epoch)
        if step:
            plans = [self.plan(epoch, reader) for reader in range(self.num_readers)]
            needed = [self._needed(plan, int(plan.count_S[:step].sum())) for plan in plans]
            num_shards, num_again = sum(len(plan.shards) for plan in plans), sum(again for _, again in needed)
            lines.append(
                f"streaming resumes at shards' boundaries: rank {self.rank} reads {sum(len(s) for s, _ in needed)} of "
                f"its {num_shards} shards of epoch {epoch} from their start, and drops {num_again} samples of them "
                "that were used before; samples that follow a damaged one of this epoch may be seen twice"
            )
        if order_before and order_before != self.order_of:
            lines.append(
                f"warning: the sample order is another one from here: {order_before} before, now {self.order_of}. In "
                "the epoch that was under way samples can come twice, or not at all"
            )
        return lines

    # ------------------------------------------------------------------------------------------ in a reader's process

    def shares(self, reader: int, first_step: int, num_steps: int) -> Iterator[_Share]:
        """What a reader gives to steps first_step .. num_steps - 1 of the run."""
        while first_step < num_steps:
            epoch, first = divmod(first_step, self.steps_per_epoch)
            stop = min(self.steps_per_epoch, first + num_steps - first_step)
            plan = self.plan(epoch, reader)
            samples = self._endless(plan, int(plan.count_S[:first].sum()))
            for count in plan.count_S[first:stop]:
                yield self._share(samples, int(count), epoch, int(self._sizes[plan.shards].sum()))
            first_step += stop - first

    def _endless(self, plan: ReaderPlan, num_used: int) -> Iterator[RawSample]:
        yield from self._raw_samples(plan, num_used)
        while True:  # damaged samples were passed over, and the epoch's others are used up: some come twice
            yield from self._raw_samples(plan, 0)

    def _share(self, samples: Iterator[RawSample], count: int, epoch: int, num_samples: int) -> _Share:
        examples: list[_Example] = []
        damaged: dict[int, str] = {}
        num_damaged = 0  # in a row
        while len(examples) < count:
            raw = next(samples)
            try:
                examples.append(self._example(raw, epoch))
                num_damaged = 0
            except _DamagedError as error:
                damaged[raw.position] = str(error)
                num_damaged += 1
            if num_damaged > num_samples:
                raise InputError(
                    f"data.stream: none of {num_samples} samples is sound (sample {raw.position}: "
                    f"{damaged[raw.position]}); are manifest.json and index.npy in {self.data.directory} those of the "
                    f"shards at {self.stream.url}?"
                )
        visible_BV, masked_BM = self.batches.masks([e.seed for e in examples]) if examples else (None, None)
        tokens = [ids for example in examples for ids in example.tokens]
        num_tokens = torch.tensor([len(ids) for ids in tokens], dtype=torch.int64)
        return _Share(
            sample_B=torch.tensor([example.position for example in examples], dtype=torch.int64),
            image_BCHW=torch.stack([example.image for example in examples]) if examples else None,
            token_ids=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *tokens])),
            num_tokens_BK=num_tokens.reshape(len(examples), -1) if examples else num_tokens.reshape(0, 1),
            visible_BV=visible_BV,
            masked_BM=masked_BM,
            damaged=damaged,
        )

    def _example(self, raw: RawSample, epoch: int) -> _Example:
        """Raises _DamagedError."""
        seed = sample_seed(self.spec.seed, epoch, raw.position)
        try:
            image = self.batches.transform(raw.jpeg, seed)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for bytes that are no image
            raise _DamagedError(f"image: {re.sub(r' <.*>', '', str(error))}") from None  # no address in memory
        try:
            captions = Sample.model_validate_json(raw.json).captions
        except ValidationError:
            raise _DamagedError("its JSON is no sample") from None
        hash_K = self.data.index[raw.position]["text_hash"]
        for k, caption in enumerate(captions):
            if text_hash(caption.text) != int(hash_K[k]):
                raise _DamagedError(f"caption {k} is not the text that index.npy names")
        # all of them: a text that no term reads here can be one that a term reads in another rank's image
        tokens = self.batches.tokenizer.encode([c.text for c in captions]) if self.spec.aspects_read else []
        return _Example(raw.position, seed, image, tokens + [np.empty(0, np.int64)] * (len(hash_K) - len(tokens)))

    # ------------------------------------------------------------------------------------------ in the rank's process

    def read_batches(self, first_step: int, num_steps: int, pin: bool, start_gather: StartGather) -> Iterator[Batch]:
        """Batches first_step .. num_steps - 1 of this rank. All ranks take them together: each waits for the others'.

        While a batch is trained on, the positions of the next one are on their way.
        """
        shares = self._rank_shares(first_step, num_steps)
        share = next(shares, None)
        gathered = None if share is None else start_gather(share.sample_B)
        while share is not None and gathered is not None:
            following = next(shares, None)
            sample_N = gathered().numpy()
            gathered = None if following is None else start_gather(following.sample_B)
            batch = self._batch(share, sample_N)
            try:
                yield batch.pin_memory() if pin else batch
            except GeneratorExit:  # the run stops, on all ranks at this step: no collective is left open
                if gathered is not None:
                    gathered()
                raise
            share = following

    def _rank_shares(self, first_step: int, num_steps: int) -> Iterator[_Share]:
        """The readers' shares of each step as one."""
        dataset, num_workers = _Shares(self, first_step, num_steps), self.config.num_workers
        items = from_workers(dataset, None, num_workers, self.config.prefetch_batches, pin=False)
        for _ in range(first_step, num_steps):
            yield _merged([next(items) for _ in range(self.num_readers)])

    def _batch(self, share: _Share, sample_N: NDArray[np.int64]) -> Batch:
        assert share.image_BCHW is not None
        ends = share.num_tokens_BK.reshape(-1).cumsum(0).tolist()
        ids, first_slot = share.token_ids.numpy(), self.batches.mine.start * share.num_tokens_BK.shape[1]

        def encode(plan: TextPlan) -> list[NDArray[np.int64]]:
            if not self.spec.aspects_read:
                return []
            slots = (plan.first_slot_U[plan.supplied_by(self.rank)] - first_slot).tolist()
            return [ids[ends[slot - 1] if slot else 0 : ends[slot]] for slot in slots]

        masks = share.visible_BV, share.masked_BM
        return self.batches.assemble(sample_N, share.image_BCHW, masks, encode, share.damaged)


#: of either mode, as the training loop sees it
Reader = BatchDataset | StreamReader


def _merged(shares: list[_Share]) -> _Share:
    filled = [share for share in shares if share.image_BCHW is not None]
    damaged = {sample: reason for share in shares for sample, reason in share.damaged.items()}

    def joined(name: str) -> torch.Tensor | None:
        parts = [getattr(share, name) for share in filled]
        return None if parts[0] is None else parts[0] if len(parts) == 1 else torch.cat(parts)

    names = ("sample_B", "image_BCHW", "token_ids", "num_tokens_BK", "visible_BV", "masked_BM")
    return _Share(**{name: joined(name) for name in names}, damaged=damaged)  # type: ignore[arg-type]


class _Shares(IterableDataset[_Share]):
    """The shares of the reader whose process iterates over it: one a step, so that they come in turn."""

    def __init__(self, reader: StreamReader, first_step: int, num_steps: int) -> None:
        self._reader, self._first_step, self._num_steps = reader, first_step, num_steps

    def __iter__(self) -> Iterator[_Share]:
        worker = get_worker_info()
        return self._reader.shares(0 if worker is None else worker.id, self._first_step, self._num_steps)
