"""The reader: global batch s of the run, on this rank, prepared by worker processes a step ahead.

plan.py (which samples) -> texts.py (which texts, whose) -> shards -> transforms, tokens, masks -> Batch
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from data_prep.errors import InputError
from data_prep.schema import Aspect, text_hash
from pretrain.data.batch import Batch, PackedTexts
from pretrain.data.diagnoses import DiagnosisTable, diagnosis_distances
from pretrain.data.manifest import ShardedDataset
from pretrain.data.masks import MaskConfig, draw_mask, num_masked
from pretrain.data.plan import MASK_DOMAIN, epoch_order, generator, sample_seed
from pretrain.data.texts import TextPlan, pack, plan_columns, plan_texts
from pretrain.data.tokenize import TextTokenizer
from pretrain.data.transforms import ImageTransform


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
    if global_batch_size % world_size:
        raise InputError(
            f"global_batch_size: {global_batch_size} does not divide among {world_size} ranks; choose a multiple"
        )
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
        self._order = lru_cache(2)(self._epoch_order)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(2)(self._epoch_order)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches; the rest of the order, another one each epoch, is left out."""
        return len(self.data) // self.spec.global_batch_size

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        return epoch_order(self.data.shard_sizes, self.spec.seed, epoch, self.spec.shards_per_block)

    def order(self, epoch: int) -> NDArray[np.int64]:
        return self._order(epoch)

    def __getitem__(self, step: int) -> Batch:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        size = self.spec.global_batch_size
        sample_N = self._order(epoch)[step_in_epoch * size : (step_in_epoch + 1) * size]
        rows_N = self.data.index[sample_N]
        aspect_NK = rows_N["text_aspect"]
        plan = plan_texts(rows_N["text_hash"], aspect_NK, self.world_size, self.spec.aspects_read)
        images_per_rank = size // self.world_size
        mine = slice(self.rank * images_per_rank, (self.rank + 1) * images_per_rank)

        seeds = [sample_seed(self.spec.seed, epoch, int(sample)) for sample in sample_N[mine]]
        images = [self._image(int(sample), seed) for sample, seed in zip(sample_N[mine], seeds, strict=True)]
        tokens = self.tokenizer.encode(self._strings(plan, sample_N))
        diagnoses = self.spec.diagnoses
        visible_BV, masked_BM = self._masks(seeds)
        text_NK = torch.from_numpy(plan.text_NK)
        return Batch(
            image_BCHW=torch.stack(images),
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
        )

    def _packed(self, tokens: list[NDArray[np.int64]]) -> list[PackedTexts]:
        """One part a micro-batch; every part has every bucket, so all ranks run the same forwards."""
        if not self.spec.aspects_read:
            return []
        parts = np.array_split(np.arange(len(tokens)), self.spec.num_parts)
        edges, pad_id, trim = self.spec.bucket_edges, self.tokenizer.pad_id, self.tokenizer.can_trim
        return [pack([tokens[text] for text in part], edges, pad_id, trim) for part in parts]

    def _image(self, sample: int, seed: int) -> torch.Tensor:
        jpeg = self.data.read_image(sample)
        try:
            return self.transform(jpeg, seed)
        except (OSError, SyntaxError) as error:  # what Pillow raises for bytes that are no image
            raise InputError(
                f"{self.data.directory}: the image of sample {sample} cannot be decoded ({error}); run `dermvlp verify`"
            ) from None

    def _strings(self, plan: TextPlan, sample_N: NDArray[np.int64]) -> list[str]:
        """The texts this rank encodes, from the samples that supply them (all of them this rank's own)."""
        if not self.spec.aspects_read:
            return []
        num_slots = plan.text_NK.shape[1]
        captions: dict[int, tuple[str, ...]] = {}
        strings = []
        for slot in plan.first_slot_U[plan.supplied_by(self.rank)]:
            image, k = divmod(int(slot), num_slots)
            sample = int(sample_N[image])
            if image not in captions:
                captions[image] = tuple(caption.text for caption in self.data.read_sample(sample).captions)
            text = captions[image][k] if k < len(captions[image]) else ""
            if text_hash(text) != int(self.data.index[sample]["text_hash"][k]):
                raise InputError(
                    f"{self.data.directory}: sample {sample}, caption {k} is not the text that index.npy names; "
                    "run `dermvlp verify`"
                )
            strings.append(text)
        return strings

    def _masks(self, seeds: Sequence[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
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
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first_step, num_steps),
        num_workers=num_workers,
        pin_memory=pin,
        prefetch_factor=prefetch_batches if num_workers else None,
        # forkserver: a fork of a process with threads (gloo, DeepSpeed) can deadlock
        multiprocessing_context="forkserver" if num_workers else None,
        worker_init_fn=_one_thread,
    )
    try:
        yield from loader
    except InputError as error:  # from a worker process: its message comes inside a traceback
        raise InputError(str(error).rsplit("InputError: ", 1)[-1].strip()) from None


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
