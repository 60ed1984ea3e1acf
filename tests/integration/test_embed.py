"""`dermvlp embed`: tables of features, a process that is killed, and the models that training leaves."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks import evaluate_embed
from data_prep.errors import InputError
from pretrain.data.manifest import ShardedDataset
from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.encoding.embed import embed, rejected_path, settings_of
from pretrain.evaluation.encoding.encoders import OpenClipEncoder, load_encoder
from pretrain.evaluation.encoding.feature_chunks import CHUNK_ROWS
from pretrain.evaluation.encoding.features import embed_images, shard_features
from pretrain.publish.export import export
from tests.integration.conftest import val_dir
from tests.integration.embed_process import NUM_IMAGES, UNDECODABLE, pictures, settings
from tests.integration.test_export import trained
from tests.unit.evaluation.models import MODELS, Pictures, encoded, picture, save_model

SETTINGS = EvaluationSettings(batch_size=16, num_workers=0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("clip") / "model", MODELS["clip"])


@pytest.fixture(scope="module")
def encoder(model_dir: Path) -> OpenClipEncoder:
    return load_encoder(model_dir)


def data_with_faults() -> Pictures:
    images = [encoded(picture(seed)) for seed in range(20)]
    images[7] = b"no image"
    ledger = [{"table": "rows.csv", "row": "3", "field": "label", "reason": "empty"}]
    return Pictures(images, rejected=ledger)


def table(path: Path) -> tuple[list[str], np.ndarray]:
    content = pq.read_table(path)
    width = content.schema.field("features").type.list_size
    return content["key"].to_pylist(), np.asarray(content["features"].combine_chunks().flatten()).reshape(-1, width)


@pytest.mark.parametrize("layer", ["joint", "tower", "block.0"])
def test_parquet_holds_keys_features_and_what_made_them(encoder: OpenClipEncoder, tmp_path: Path, layer: str) -> None:
    data, out = data_with_faults(), tmp_path / "new" / "features.parquet"
    info = embed(encoder, data, out, layer, SETTINGS)
    keys, found = table(out)
    sound = [row for row in range(20) if row != 7]
    assert keys == [f"key-{row:04d}" for row in sound]
    assert np.abs(found - embed_images(encoder, [picture_of(data.images[row]) for row in sound], layer)).max() < 1e-6
    metadata = json.loads(pq.read_schema(out).metadata[b"dermvlp"])
    assert metadata == info.model_dump()
    assert (metadata["model_digest"], metadata["layer"], metadata["num_images"]) == (encoder.info.digest, layer, 19)
    rejected = [json.loads(line) for line in rejected_path(out).read_text().splitlines()]
    assert rejected[0] == data.rejected[0]
    assert rejected[1]["key"] == "key-0007" and "not an image" in rejected[1]["reason"]
    assert {path.name for path in out.parent.iterdir()} == {out.name, rejected_path(out).name}


def picture_of(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg))


def test_npy_holds_the_same_rows_as_parquet(encoder: OpenClipEncoder, tmp_path: Path) -> None:
    data = data_with_faults()
    embed(encoder, data, tmp_path / "a.npy", settings=SETTINGS)
    embed(encoder, data, tmp_path / "a.parquet", settings=SETTINGS)
    keys, found = table(tmp_path / "a.parquet")
    assert np.array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), found)
    lines = [json.loads(line) for line in (tmp_path / "a.npy.keys.jsonl").read_text().splitlines()]
    assert lines == [{"row": row, "key": key} for row, key in enumerate(keys)]


@pytest.mark.parametrize("name", ["a.parquet", "a.npy"])
def test_a_finished_table_is_kept_and_never_overwritten(encoder: OpenClipEncoder, tmp_path: Path, name: str) -> None:
    data, out = data_with_faults(), tmp_path / name
    info = embed(encoder, data, out, settings=SETTINGS)
    num_read = len(data.read)
    parts = tmp_path / f"{name}.parts"
    parts.mkdir()  # as where a kill came between the two
    assert embed(encoder, data, out, settings=SETTINGS) == info and len(data.read) == num_read
    assert not parts.exists()
    with pytest.raises(InputError, match=r"holds layer 'joint'.*asked for is layer 'tower'"):
        embed(encoder, data, out, "tower", SETTINGS)
    other = Pictures(data.images, digest="f" * 16)
    with pytest.raises(InputError, match="choose another --out"):
        embed(encoder, other, out, settings=SETTINGS)
    out.write_bytes(b"mine")
    if name == "a.npy":
        (tmp_path / "a.npy.json").unlink()
    with pytest.raises(InputError, match="was not written by `dermvlp embed`"):
        embed(encoder, data, out, settings=SETTINGS)


def test_what_cannot_be_written(encoder: OpenClipEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.parquet or \.npy"):
        embed(encoder, data_with_faults(), tmp_path / "a.csv", settings=SETTINGS)
    with pytest.raises(InputError, match="no image could be decoded; the first: not an image"):
        embed(encoder, Pictures([b"no image"] * 3), tmp_path / "a.npy", settings=SETTINGS)
    with pytest.raises(InputError, match="at least 1 image"):
        settings_of(batch_size=0, num_workers=2)
    with pytest.raises(InputError, match="pictures: no image to encode"):
        embed(encoder, Pictures([]), tmp_path / "b.npy", settings=SETTINGS)


def test_a_killed_process_is_gone_on_with_and_the_table_is_bit_equal(
    encoder: OpenClipEncoder, model_dir: Path, tmp_path: Path
) -> None:
    """The process that is killed decodes in a worker."""
    out = tmp_path / "features.parquet"
    command = [sys.executable, "-m", "tests.integration.embed_process", str(model_dir), str(out), "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("features.parquet.parts/*/000000.npz")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()

    data = Pictures(pictures())
    embed(encoder, data, out, settings=settings(0))
    assert data.read == list(range(CHUNK_ROWS, NUM_IMAGES))
    embed(encoder, Pictures(pictures()), tmp_path / "whole.parquet", settings=settings(0))
    assert table(out)[0] == table(tmp_path / "whole.parquet")[0]
    assert np.array_equal(table(out)[1], table(tmp_path / "whole.parquet")[1])
    assert json.loads(rejected_path(out).read_text())["key"] == f"key-{UNDECODABLE:04d}"


def test_a_run_its_checkpoint_and_its_export_are_one_model(run_config: dict[str, Any], tmp_path: Path) -> None:
    run_dir = trained(run_config, tmp_path)
    checkpoint = run_dir / "checkpoints" / "step-00000003"
    encoders = [load_encoder(name) for name in (run_dir, checkpoint, export(run_dir, tmp_path / "export"))]
    assert [one.info.kind for one in encoders] == ["checkpoint", "checkpoint", "export"]
    assert len({one.info.digest for one in encoders}) == 1
    data = ShardedDataset(val_dir(run_config))
    found = [shard_features(one, data) for one in encoders]
    assert np.array_equal(found[0], found[1]) and np.abs(found[0] - found[2]).max() < 1e-6
    texts = ["a brown macule", "a longer sentence about a red plaque"]
    assert np.abs(encoders[0].encode_texts(texts) - encoders[2].encode_texts(texts)).max() < 1e-6
    pixels = torch.randn(2, 3, 48, 48)
    for layer in encoders[0].layers:
        assert torch.allclose(
            encoders[0].encode_pixels(pixels, layer), encoders[2].encode_pixels(pixels, layer), atol=1e-6
        )

    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for name in (run_dir, checkpoint):
        with pytest.raises(InputError, match=r"model\.safetensors: missing or not of the size"):
            load_encoder(name)


def test_the_benchmark_writes_the_features_that_the_forward_gives(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(evaluate_embed, "MODEL", str(tiny_model_path))
    rates = evaluate_embed.embed_of_forward(num_rounds=2)
    assert len(rates) == 2 and all(rate > 0 for pair in rates for rate in pair)
    encoder = evaluate_embed.build_encoder(str(tiny_model_path))
    batches = [torch.randn(4, 3, 48, 48), torch.randn(4, 3, 48, 48)]
    evaluate_embed.embed_s(encoder, batches, tmp_path)
    with torch.no_grad():
        expected = encoder.model.encode_image(torch.cat(batches), normalize=True).numpy()
    assert np.abs(table(tmp_path / "features.parquet")[1] - expected).max() < 1e-6


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is unset: no real images")
def test_real_images_equal_open_clips_preprocessing_of_the_files(encoder: OpenClipEncoder, tmp_path: Path) -> None:
    folder = Path(os.environ["DERMVLP_DATA"]) / "derm-images"
    with (folder / "metadata.csv").open(encoding="utf-8") as file:
        names = [row["filename"] for row in csv.DictReader(file)][::400]
    paths = [next(folder.rglob(Path(name).name)) for name in names]
    embed(encoder, Pictures([path.read_bytes() for path in paths]), tmp_path / "real.npy", settings=SETTINGS)
    pixels = torch.stack([encoder.transform(Image.open(path)) for path in paths])
    with torch.no_grad():
        expected = encoder.model.encode_image(pixels, normalize=True).numpy()
    assert np.abs(np.load(tmp_path / "real.npy") - expected).max() < 1e-6
