"""open_clip's own training loader reads our shards, and a step of its own loss runs on what it reads."""

from __future__ import annotations

import argparse
import io
from functools import partial
from pathlib import Path

import open_clip
import open_clip_train.data as loading
import pytest
import torch
from PIL import Image
from webdataset.tariterators import tar_file_expander

from pretrain.config import ModelConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.models.build import build_open_clip

BATCH_SIZE = 24


def test_open_clip_trains_on_the_shards(
    prepared_dir: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # webdataset 1.x marks the end of a shard, which open_clip 3.3 (made for 0.2) does not expect, whatever the shards
    monkeypatch.setattr(loading, "tar_file_expander", partial(tar_file_expander, eof_value=None))
    torch.manual_seed(0)
    model = build_open_clip(ModelConfig(name=str(tiny_model_path)))
    preprocess = open_clip.image_transform(48, is_train=False)
    dataset = ShardedDataset(prepared_dir / "train")
    arguments = argparse.Namespace(
        train_data=str(prepared_dir / "train" / "shard-{000000..000005}.tar"),
        train_data_upsampling_factors=None,
        train_num_samples=len(dataset),
        dataset_resampled=False,
        batch_size=BATCH_SIZE,
        workers=0,
        world_size=1,
        seed=0,
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=64)
    data = loading.get_wds_dataset(arguments, preprocess, is_train=True, tokenizer=tokenizer)
    batches = list(data.dataloader)
    assert data.dataloader.num_batches == len(batches) == 4

    # every sample once, each with its own caption
    captions = [dataset.read_sample(position).caption for position in range(len(dataset))]
    read = [tuple(row.tolist()) for _, tokens in batches for row in tokens]
    assert sorted(read) == sorted(tuple(row.tolist()) for row in tokenizer(captions))
    by_tokens = {tuple(tokenizer([caption])[0].tolist()): position for position, caption in enumerate(captions)}
    for image, tokens in zip(batches[0][0][:5], batches[0][1][:5], strict=True):
        position = by_tokens[tuple(tokens.tolist())]
        expected = preprocess(Image.open(io.BytesIO(dataset.read_image(position))))
        assert torch.equal(image, expected)

    images, texts = batches[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = open_clip.ClipLoss()(*model(images, texts)[:2], model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1  # it learns the batch
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
