"""The reader: global batch s of the run, on this rank, prepared by worker processes a step ahead.

plan.py (which samples) -> texts.py (which texts, whose) -> shards -> transforms, tokens, masks -> Batch
"""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import multiprocessing.context
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from data_prep.errors import InputError
from data_prep.schema import NO_ASPECT_CODE, Aspect, text_hash
from pretrain.data.batch import Batch, PackedTexts
from pretrain.data.buffers import Buffers
from pretrain.data.diagnoses import DiagnosisTable, diagnosis_distances
from pretrain.data.manifest import DamagedSample, ShardedDataset
from pretrain.data.masks import MaskConfig, draw_mask, num_masked
from pretrain.data.plan import MASK_DOMAIN, SampleOrder, generator, sample_seed
from pretrain.data.texts import TextPlan, pack, plan_columns, plan_texts
from pretrain.data.tokenize import TextTokenizer
from pretrain.data.transforms import ImageTransform, UndecodableImage
from pretrain.data.workers import begin_worker, starting_workers

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ReaderSpec:
    """What a batch depends on. Equal specs give equal batches on any machine."""

    seed: int
    global_batch_size: int
    shards_per_block: int
    bucket_edges: tuple[int, ...]
    aspects_by_term: Mapping[str, Sequence[Aspect]]  # of the contrastive terms' columns, by label
    aspects_read: tuple[Aspect, ...]  # of the texts that are encoded; none: no text is read
    diagnoses: DiagnosisTable | None  # where a term has soft targets
    num_parts: int  # micro-batches that this rank's images and texts are encoded in
    mask: MaskConfig | None  # None: no masked-latent term
    patch_grid: tuple[int, int] | None


def check_batch_size(data: ShardedDataset, global_batch_size: int, world_size: int) -> None:
    """Raises InputError for a global batch that the ranks cannot share, or that the data cannot fill."""
    check_shared_evenly(global_batch_size, world_size)
    check_enough_samples(data, global_batch_size)


def check_shared_evenly(global_batch_size: int, world_size: int) -> None:
    if global_batch_size % world_size:
        raise InputError(
            f"global_batch_size: {global_batch_size} does not divide among {world_size} ranks; choose a multiple"
        )


def check_enough_samples(data: ShardedDataset, global_batch_size: int) -> None:
    if len(data) < global_batch_size:
        raise InputError(
            f"{data.directory}: {len(data)} samples are fewer than one global batch; lower global_batch_size "
            f"({global_batch_size}) or prepare more samples"
        )


class BatchDataset(Dataset[Batch]):
    """Batch `step` of the run, for one rank. Map-style: any step can be asked for, so a resume costs nothing."""

    def __init__(
        self,
        data: ShardedDataset,
        spec: ReaderSpec,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        rank: int,
        world_size: int,
    ) -> None:
        check_batch_size(data, spec.global_batch_size, world_size)
        self.data, self.spec, self.transform, self.tokenizer = data, spec, transform, tokenizer
        self.rank, self.world_size = rank, world_size
        self.buffers: Buffers | None = None  # of the reader's processes
        self._order = SampleOrder(data.shard_sizes, spec.seed, spec.shards_per_block)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches; the rest of the order, another one each epoch, is left out."""
        return len(self.data) // self.spec.global_batch_size

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The whole order of an epoch, for data that is small enough to hold it."""
        return self._order.slice(epoch, 0, len(self.data))

    def order_digest(self, epoch: int) -> str:
        """Names the order of an epoch in the log, without computing it."""
        return self._order.digest(epoch)

    def samples(self, step: int) -> NDArray[np.int64]:
        """(N,) int64: the global batch of a step as the order has it, rank-major."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        size = self.spec.global_batch_size
        return self._order.slice(epoch, step_in_epoch * size, (step_in_epoch + 1) * size)

    def __getitem__(self, step: int) -> Batch:
        return self.make_batch(step // self.steps_per_epoch, self.samples(step))

    def make_batch(self, epoch: int, sample_N: NDArray[np.int64]) -> Batch:
        """This rank's part of a global batch of these samples, `damaged` where they cannot be read.

        Raises InputError, or OSError, for what is not one sample's fault: a shard that is gone, a failing disk.
        """
        sample_B = sample_N[self.mine]
        seeds = [sample_seed(self.spec.seed, epoch, int(sample)) for sample in sample_B]
        damaged: dict[int, str] = {}
        lent = None if self.buffers is None else self.buffers.take()
        slot, memory_BCHW = lent or (None, None)
        images = self._images(sample_B, seeds, damaged, memory_BCHW)

        def encode(plan: TextPlan) -> list[NDArray[np.int64]]:
            return self.tokenizer.encode(self._strings(plan, sample_N, damaged))

        batch = self.assemble(sample_N, images, self.masks(seeds), encode, damaged)
        return dataclasses.replace(batch, slot=slot)

    @property
    def mine(self) -> slice:
        """This rank's images among the N of a global batch."""
        images_per_rank = self.spec.global_batch_size // self.world_size
        return slice(self.rank * images_per_rank, (self.rank + 1) * images_per_rank)

    def assemble(
        self,
        sample_N: NDArray[np.int64],
        image_BCHW: torch.Tensor,
        masks: tuple[torch.Tensor | None, torch.Tensor | None],
        encode: Callable[[TextPlan], list[NDArray[np.int64]]],
        damaged: Mapping[int, str],
    ) -> Batch:
        """This rank's part of the global batch of these samples, its texts planned for all ranks.

        Args:
            masks: as `masks` gives them for this rank's images.
            encode: the token ids of the texts that a plan has this rank encode, in the plan's order.
            damaged: the reason by position in the index; read after `encode`, which can add to it.
        """
        rows_N, mine = self.data.index[sample_N], self.mine
        aspect_NK = rows_N["text_aspect"]
        plan = plan_texts(rows_N["text_hash"], aspect_NK, self.world_size, self.spec.aspects_read)
        tokens = encode(plan)
        diagnoses = self.spec.diagnoses
        visible_BV, masked_BM = masks
        text_NK = torch.from_numpy(plan.text_NK)
        return Batch(
            image_BCHW=image_BCHW,
            sample_B=torch.from_numpy(sample_N[mine].copy()),
            text_BK=text_NK[mine],
            aspect_BK=torch.from_numpy(aspect_NK[mine].astype(np.int64)),
            text_NK=text_NK,
            packed=self._packed(tokens),
            gathered_row_U=torch.from_numpy(plan.gathered_rows()),
            num_padded_texts=int(plan.num_texts_by_rank.max()),
            columns=plan_columns(plan, aspect_NK, self.spec.aspects_by_term),
            diagnoses=None if diagnoses is None else diagnosis_distances(diagnoses, plan, rows_N, mine),
            visible_BV=visible_BV,
            masked_BM=masked_BM,
            num_truncated=sum(self.tokenizer.is_full(ids) for ids in tokens),
            damaged=tuple(damaged.items()),
        )

    def damage_of(self, sample: int) -> str | None:
        """Why this sample cannot be trained on, read whole; None where it can."""
        try:
            self.transform(self.data.read_image(sample), seed=0)
            captions = self.data.read_sample(sample).captions
        except (UndecodableImage, DamagedSample) as error:
            return str(error)
        texts = tuple(caption.text for caption in captions)
        num_slots = self.data.index["text_hash"].shape[1]
        return next((f for k in range(num_slots) if (f := self._fault_of_text(sample, k, texts)) is not None), None)

    def _packed(self, tokens: list[NDArray[np.int64]]) -> list[PackedTexts]:
        """One part a micro-batch; every part has every bucket, so all ranks run the same forwards."""
        if not self.spec.aspects_read:
            return []
        parts = np.array_split(np.arange(len(tokens)), self.spec.num_parts)
        edges, pad_id, trim = self.spec.bucket_edges, self.tokenizer.pad_id, self.tokenizer.can_trim
        return [pack([tokens[text] for text in part], edges, pad_id, trim) for part in parts]

    def _images(
        self,
        sample_B: NDArray[np.int64],
        seeds: Sequence[int],
        damaged: dict[int, str],
        memory_BCHW: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, 3, H, W) uint8, in the memory given, if any; zeros for what cannot be decoded."""
        images = []
        for sample, seed in zip(sample_B.tolist(), seeds, strict=True):
            try:
                image_CHW = self.transform(self.data.read_image(sample), seed)
            except (UndecodableImage, DamagedSample) as error:
                damaged[sample] = f"image: {error}"
                image_CHW = torch.zeros(3, self.transform.image_px, self.transform.image_px, dtype=torch.uint8)
            images.append(image_CHW)
        if memory_BCHW is None:
            image_BCHW: torch.Tensor = default_collate(images)  # in a reader process into shared memory of its own
            return image_BCHW
        return torch.stack(images, out=memory_BCHW)

    def _strings(self, plan: TextPlan, sample_N: NDArray[np.int64], damaged: dict[int, str]) -> list[str]:
        """The texts this rank encodes, from the samples that supply them (all of them this rank's own); nothing in the
        place of one that cannot be read."""
        if not self.spec.aspects_read:
            return []
        num_slots = plan.text_NK.shape[1]
        captions: dict[int, tuple[str, ...]] = {}
        strings = []
        for slot in plan.first_slot_U[plan.supplied_by(self.rank)]:
            image, k = divmod(int(slot), num_slots)
            sample = int(sample_N[image])
            try:
                if sample not in captions:
                    captions[sample] = tuple(caption.text for caption in self.data.read_sample(sample).captions)
                fault = self._fault_of_text(sample, k, captions[sample])
            except DamagedSample as error:
                captions[sample], fault = (), str(error)
            if fault is not None:
                damaged.setdefault(sample, fault)
            strings.append(captions[sample][k] if fault is None else "")
        return strings

    def _fault_of_text(self, sample: int, k: int, texts: Sequence[str]) -> str | None:
        row = self.data.index[sample]
        if row["text_aspect"][k] == NO_ASPECT_CODE:
            return None
        same = k < len(texts) and text_hash(texts[k]) == int(row["text_hash"][k])
        return None if same else f"caption {k} is not the text that index.npy names"

    def masks(self, seeds: Sequence[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """((B, V) visible, (B, M) masked) patch positions, ascending."""
        if self.spec.mask is None or self.spec.patch_grid is None:
            return None, None
        grid, mask = self.spec.patch_grid, self.spec.mask
        masked_BP = np.stack([draw_mask(mask, grid, generator(MASK_DOMAIN, seed)) for seed in seeds])
        count = num_masked(mask, grid)
        order_BP = np.argsort(masked_BP, axis=1, kind="stable")  # visible first, each part ascending
        return torch.from_numpy(order_BP[:, :-count].copy()), torch.from_numpy(order_BP[:, -count:].copy())


def read_batches(
    dataset: BatchDataset,
    first_step: int,
    num_steps: int,
    num_workers: int,
    prefetch_batches: int = 2,
    pin: bool = False,
) -> Iterator[Batch]:
    """Batches first_step .. num_steps - 1, in order, whatever the number of worker processes."""
    if num_workers:
        dataset = copy.copy(dataset)
        mine, px = dataset.mine, dataset.transform.image_px
        # the loader asks for a further batch while it hands one out, and the loop lets go of the last only then
        slots = prefetch_batches + 2
        dataset.buffers = Buffers(num_workers, slots, (mine.stop - mine.start, 3, px, px))
    yield from from_workers(dataset, range(first_step, num_steps), num_workers, prefetch_batches, pin)


def from_workers(
    dataset: Dataset[_Item], sampler: range | None, num_workers: int, prefetch_batches: int, pin: bool
) -> Iterator[_Item]:
    """The items of a dataset, prepared by worker processes. Raises a worker's InputError with its message alone."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin,
        prefetch_factor=prefetch_batches if num_workers else None,
        multiprocessing_context=_process_context() if num_workers else None,
        worker_init_fn=begin_worker,
    )
    with starting_workers():
        batches = iter(loader)
    try:
        yield from batches
    except InputError as error:  # from a worker process: its message comes inside a traceback
        raise type(error)(str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()) from None
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
            raise
        raise OSError(f"a reader process died ({error}); out of memory? Lower data.num_workers") from None


def _process_context() -> multiprocessing.context.ForkServerContext:
    """forkserver: a fork of a process with threads (gloo, DeepSpeed) can deadlock. Its server imports once what each of
    the reader's processes would import for itself, seconds of a core each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "open_clip"])
    return context
