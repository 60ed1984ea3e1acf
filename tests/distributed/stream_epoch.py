"""One rank's epoch of the streaming mode, for tests that start it on several ranks: it imports little."""

from __future__ import annotations

from pathlib import Path

import torch

from data_prep.schema import ASPECTS, Aspect
from pretrain.config import AugmentationConfig, BlockMask, DataConfig, StreamConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.data.reader import BatchDataset, ReaderSpec
from pretrain.data.streaming import StreamReader
from pretrain.data.tokenize import TextTokenizer
from pretrain.data.transforms import TrainTransform
from pretrain.distributed import comm

SEED, GLOBAL_BATCH_SIZE, NUM_WORKERS = 3, 20, 2


class WordTokenizer:
    """An id for each word, as open_clip's tokenizers are called."""

    def __call__(self, texts: list[str], context_length: int) -> torch.Tensor:
        ids = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            words = [2 + sum(word.encode()) % 997 for word in text.split()][: context_length - 1]
            row[: len(words) + 1] = torch.tensor([1, *words])
        return ids


def read_epoch(index_dir: str, url: str, num_steps: int) -> dict[str, torch.Tensor]:
    """Positions and texts of this rank's batches, by step, read through two processes."""
    spec = ReaderSpec(
        seed=SEED,
        global_batch_size=GLOBAL_BATCH_SIZE,
        shards_per_block=2,
        bucket_edges=(16, 32, 64),
        aspects_by_term={"clip": [Aspect.CAPTION]},
        aspects_read=ASPECTS,
        diagnoses=None,
        num_parts=1,
        mask=BlockMask(min_num_patches=2),
        patch_grid=(4, 4),
    )
    tokenizer = TextTokenizer(WordTokenizer(), 64, pad_id=0, can_trim=True)
    data, transform = ShardedDataset(index_dir, with_tars=False), TrainTransform(48, AugmentationConfig())
    batches = BatchDataset(data, spec, transform, tokenizer, comm.rank(), comm.world_size())
    stream = StreamConfig(url=url, shuffle_buffer=20)
    reader = StreamReader(batches, DataConfig(train_dir=Path(index_dir), num_workers=NUM_WORKERS, stream=stream))
    read = list(reader.read_batches(0, num_steps, False, comm.start_cpu_gather))
    assert all(torch.equal(batch.text_BK, batch.text_NK[batches.mine]) for batch in read)
    return {
        "sample_SB": torch.stack([batch.sample_B for batch in read]),
        "text_SNK": torch.stack([batch.text_NK for batch in read]),
        "num_encoded_S": torch.tensor([len(batch.packed[0].order_R) for batch in read]),
        "num_texts_S": torch.tensor([batch.num_texts for batch in read]),
    }
