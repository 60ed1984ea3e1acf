"""How fast features are written, beside the bare forward of the same open_clip model on the same decoded batches.

ViT-B/16 with random weights; the batches lie in memory, decoded. One side is `model.encode_image` in a loop that throws
the features away; the other is what `dermvlp embed` does from there on: forward, features to the CPU, chunks to disk,
and the table. Decoding, which has processes of its own, is on neither side.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.side_by_side import by_turns
from pretrain.config import ModelConfig
from pretrain.evaluation.encoding.encoders import OpenClipEncoder, as_encoder
from pretrain.evaluation.encoding.export_table import TableInfo, write_features
from pretrain.evaluation.encoding.feature_chunks import chunk_paths, read_rows, shape_of, write_chunk
from pretrain.evaluation.encoding.features import DecodedBatch, encode_chunks
from pretrain.evaluation.interfaces import JOINT
from pretrain.models.build import build_open_clip, build_tokenizer

MODEL = "ViT-B-16"
BATCH_SIZE = 8
NUM_BATCHES = 4


def embed_of_forward(
    num_rounds: int, batch_size: int = BATCH_SIZE, num_batches: int = NUM_BATCHES
) -> list[tuple[float, float]]:
    """(images/s of the bare forward, images/s of embedding) of each round; who begins changes each round."""
    encoder = build_encoder(MODEL)
    px = encoder.info.image_px
    batches = [
        torch.randn(batch_size, 3, px, px, generator=torch.Generator().manual_seed(n)) for n in range(num_batches)
    ]
    num_images = batch_size * num_batches
    forward_s(encoder, batches[:1])  # memory and threads

    with tempfile.TemporaryDirectory() as folder:
        return by_turns(
            lambda: num_images / forward_s(encoder, batches),
            lambda: num_images / embed_s(encoder, batches, Path(folder)),
            num_rounds,
        )


def build_encoder(name: str) -> OpenClipEncoder:
    config = ModelConfig(name=name)
    torch.manual_seed(0)
    model = build_open_clip(config)
    return as_encoder(model, build_tokenizer(config, model.text), name, "open_clip")


@torch.no_grad()
def forward_s(encoder: OpenClipEncoder, batches: Sequence[Tensor]) -> float:
    began_at = time.perf_counter()
    for image_BCHW in batches:
        encoder.model.encode_image(image_BCHW.to(encoder.device), normalize=True)
    if encoder.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_at


def embed_s(encoder: OpenClipEncoder, batches: Sequence[Tensor], folder: Path) -> float:
    """From decoded batches to a Parquet file on disk."""
    num_rows = sum(len(image_BCHW) for image_BCHW in batches)
    keys = [f"key-{row:06d}" for row in range(num_rows)]
    began_at = time.perf_counter()
    paths = chunk_paths(folder, num_rows)
    for number, chunks in encode_chunks(encoder, _decoded(batches), (JOINT,), num_rows):
        write_chunk(paths[number], chunks[JOINT])
    num_images, width = shape_of([read_rows(path) for path in paths])
    info = TableInfo(
        model=encoder.info.name,
        model_digest=encoder.info.digest,
        layer=JOINT,
        data="random pixels",
        data_digest="",
        num_images=num_images,
        num_rejected=0,
        width=width,
    )
    write_features(folder / "features.parquet", paths, keys, info)
    return time.perf_counter() - began_at


def _decoded(batches: Sequence[Tensor]) -> list[DecodedBatch]:
    starts = range(0, sum(map(len, batches)), len(batches[0]))
    return [
        DecodedBatch(tuple(range(start, start + len(image_BCHW))), image_BCHW, {})
        for start, image_BCHW in zip(starts, batches, strict=True)
    ]


def main() -> None:
    pairs = embed_of_forward(num_rounds=7)
    for forward, embedding in pairs:
        print(f"forward {forward:6.2f} images/s   embedding {embedding:6.2f} images/s   {embedding / forward:.3f}")


if __name__ == "__main__":
    main()
