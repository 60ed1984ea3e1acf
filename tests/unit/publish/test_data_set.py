"""What of prepared shards may be passed on, sample by sample."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from data_prep.errors import InputError
from data_prep.schema import Aspect, Caption, Sample
from data_prep.shards.manifest import read_hashes, verify, write_manifest
from data_prep.shards.shard import write_shard
from pretrain.data.manifest import ShardedDataset
from pretrain.publish.data_set import allowed, publish_data

LICENCES = ["CC BY 4.0", "CC BY-NC-ND 4.0", None, "research only", "CC0-1.0"]


@pytest.fixture
def split_dir(prepared_dir: Path, tmp_path: Path) -> Path:
    """The prepared validation split with other licences: two shards of ten samples, five licences in turn."""
    source = ShardedDataset(prepared_dir / "val")
    hashes = read_hashes(source.directory)
    folder = tmp_path / "val"
    folder.mkdir()
    records = []
    for number in range(2):
        samples = [
            (_with_licence(source.read_sample(p), LICENCES[p % 5]), source.read_image(p), hashes[p])
            for p in range(10 * number, 10 * number + 10)
        ]
        records.append(write_shard(folder / f"shard-{number:06d}.tar", samples, inputs_digest="test"))
    names = ("dataset", "split", "image_short_side", "decomposer", "config_digest", "num_rejected")
    write_manifest(folder, records, **{name: getattr(source.manifest, name) for name in names})
    return folder


def _with_licence(sample: Sample, licence: str | None) -> Sample:
    captions = (
        Caption(aspect=Aspect.CAPTION, text="as written", origin="column:caption"),
        Caption(aspect=Aspect.DIAGNOSIS, text="diagnosed as nevus", origin="ontology"),
        Caption(aspect=Aspect.MORPHOLOGY, text="brown", origin="rules-1"),
    )
    return sample.model_copy(update={"licence": licence, "captions": captions})


def test_images_and_captions_only_where_the_licence_allows(split_dir: Path, tmp_path: Path) -> None:
    made = publish_data([split_dir], "me/data", tmp_path / "out", dry_run=True)
    assert set(made.files) == {
        *("README.md", "val/captions.parquet", "val/manifest.json", "val/index.npy", "val/image_hashes.npy"),
        *("val/shard-000000.tar", "val/shard-000001.tar"),
    }
    rows = pq.read_table(tmp_path / "out" / "val" / "captions.parquet").to_pylist()
    by_licence = {licence: [row for row in rows if row["licence"] == licence] for licence in LICENCES}
    assert {name: len(found) for name, found in by_licence.items()} == {
        "CC BY 4.0": 12,  # four samples of three captions
        "CC BY-NC-ND 4.0": 4,  # the source's own words alone
        None: 0,
        "research only": 0,
        "CC0-1.0": 12,
    }
    assert {row["origin"] for row in by_licence["CC BY-NC-ND 4.0"]} == {"column:caption"}
    assert {row["has_image"] for row in by_licence["CC BY-NC-ND 4.0"]} == {False}
    assert {row["has_image"] for row in by_licence["CC0-1.0"]} == {True}
    manifest = verify(tmp_path / "out" / "val")  # every byte against the new manifest
    assert manifest.num_samples == 8 and manifest.samples_by_licence == {"CC BY 4.0": 4, "CC0-1.0": 4}
    published, source = ShardedDataset(tmp_path / "out" / "val"), ShardedDataset(split_dir)
    assert published.read_image(1) == source.read_image(4) and published.read_sample(1) == source.read_sample(4)


def test_the_card_says_what_was_left_out_and_why(split_dir: Path, tmp_path: Path) -> None:
    made = publish_data([split_dir], "me/data", tmp_path / "out", dry_run=True, is_gated=True)
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other" and "extra_gated_prompt" in card.data.to_dict()
    (facts,) = made.splits
    assert (facts.num_samples, facts.num_images, facts.num_captions) == (12, 8, 28)
    assert "| val | 20 | 12 | 8 | 28 |" in card.text
    for line in ("licence not known: 4 samples", "research only: may not be passed on: 4 samples"):
        assert f"- {line}" in card.text
    assert "CC BY-NC-ND 4.0: no derivatives" in card.text
    assert sum(facts.sources.values()) == 12 and all(f"| {name} |" in card.text for name in facts.sources)


def test_captions_alone(split_dir: Path, tmp_path: Path) -> None:
    made = publish_data([split_dir], "me/data", tmp_path / "out", dry_run=True, with_images=False)
    assert set(made.files) == {"README.md", "val/captions.parquet"}
    assert "captions alone" in (tmp_path / "out" / "README.md").read_text()


def test_everything_allowed_gives_the_same_shards(prepared_dir: Path, tmp_path: Path) -> None:
    """And one licence of all samples is that of the data set; publishing again changes no byte."""
    out = tmp_path / "out"
    publish_data([prepared_dir / "train", prepared_dir / "val"], "me/data", out, dry_run=True)
    for name in ("shard-000000.tar", "shard-000001.tar", "index.npy", "image_hashes.npy"):
        assert (out / "val" / name).read_bytes() == (prepared_dir / "val" / name).read_bytes()
    assert DatasetCard.load(out / "README.md").data.license == "apache-2.0"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    publish_data([prepared_dir / "train", prepared_dir / "val"], "me/data", out, dry_run=True)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_refusals(split_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="several of the folders are of one split"):
        publish_data([split_dir, split_dir], "me/data", tmp_path / "out", dry_run=True)
    with pytest.raises(InputError, match="expected ORG/NAME"):
        publish_data([split_dir], "../data", tmp_path / "out", dry_run=True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(InputError, match="HF_TOKEN is not set"):
        publish_data([split_dir], "me/data", tmp_path / "out")
    for out in (split_dir, tmp_path):  # onto the prepared split itself
        with pytest.raises(InputError, match=r"holds the prepared split .*/val; choose another folder"):
            publish_data([split_dir], "me/data", out, dry_run=True)
    verify(split_dir)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes.txt, which no publication wrote"):
        publish_data([split_dir], "me/data", tmp_path / "out", dry_run=True)


def test_what_a_licence_allows() -> None:
    assert allowed("CC BY-NC-SA 3.0").image and allowed("CC BY-NC-SA 3.0").captions == "all"
    assert not allowed("CC BY-ND 4.0").image and allowed("CC BY-ND 4.0").captions == "verbatim"
    for licence in (None, "unknown", "see website", "research only"):
        assert not allowed(licence).image and allowed(licence).captions == "none"
