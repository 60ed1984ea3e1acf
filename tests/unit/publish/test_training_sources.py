"""Which source has which licence: from the manifest where that is enough, else from the samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_prep.shards.manifest import read_hashes, read_manifest, write_manifest
from data_prep.shards.shard import write_shard
from pretrain.data.manifest import ShardedDataset
from pretrain.publish.training_sources import samples_by_source_and_licence

PAIRS = [("HAM10000", "CC-BY-NC-4.0"), ("PAD", "CC BY 4.0"), ("PAD", None), (None, "CC BY 4.0")]


@pytest.fixture
def split_dir(prepared_dir: Path, tmp_path: Path) -> Path:
    """Ten samples of the prepared validation split with the pairs in turn."""
    source, hashes = ShardedDataset(prepared_dir / "val"), read_hashes(prepared_dir / "val")
    folder = tmp_path / "train"
    folder.mkdir()
    samples = []
    for position in range(10):
        name, licence = PAIRS[position % len(PAIRS)]
        sample = source.read_sample(position).model_copy(update={"source": name, "licence": licence})
        samples.append((sample, source.read_image(position), hashes[position]))
    record = write_shard(folder / "shard-000000.tar", samples, inputs_digest="test")
    names = ("dataset", "split", "image_short_side", "decomposer", "config_digest", "num_rejected")
    write_manifest(folder, [record], **{name: getattr(source.manifest, name) for name in names})
    return folder


def test_samples_are_counted_by_both(split_dir: Path) -> None:
    expected = Counter(tuple(name or "unknown" for name in PAIRS[position % 4]) for position in range(10))
    assert samples_by_source_and_licence(split_dir, read_manifest(split_dir)) == dict(expected)


def test_one_licence_or_one_source_needs_no_shard(tmp_path: Path, split_dir: Path) -> None:
    manifest = read_manifest(split_dir)
    one_licence = manifest.model_copy(update={"samples_by_licence": {"MIT": 10}})
    found = samples_by_source_and_licence(tmp_path / "gone", one_licence)
    assert found == {("PAD", "MIT"): 5, ("HAM10000", "MIT"): 3, ("unknown", "MIT"): 2}
    one_source = manifest.model_copy(update={"samples_by_source": {"PAD": 10}})
    found = samples_by_source_and_licence(tmp_path / "gone", one_source)
    assert found == {("PAD", "CC BY 4.0"): 5, ("PAD", "CC-BY-NC-4.0"): 3, ("PAD", "unknown"): 2}


def test_nothing_is_said_without_the_shards_of_the_manifest(split_dir: Path) -> None:
    manifest = read_manifest(split_dir)
    other = manifest.model_copy(update={"samples_by_licence": {"MIT": 4, "CC0-1.0": 6}})
    assert samples_by_source_and_licence(split_dir, other) is None
    (split_dir / "shard-000000.tar").unlink()
    assert samples_by_source_and_licence(split_dir, manifest) is None
