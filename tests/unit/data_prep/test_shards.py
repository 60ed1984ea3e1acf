"""Shards: readable by others, byte-equal where the inputs are, addressed by the index, and damage is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep.config import ImageOptions
from data_prep.errors import InputError
from data_prep.images.convert import prepare_drawn
from data_prep.rejected import write_ledger
from data_prep.schema import ASPECT_CODE, HASH_DTYPE, NO_ASPECT_CODE, Aspect, Caption, Sample, text_hash
from data_prep.shards.manifest import damaged_shards, read_hashes, verify, write_manifest
from data_prep.shards.shard import ShardRecord, _header, read_record, write_shard
from data_prep.sources.base import Rejection
from pretrain.data.manifest import ShardedDataset

Pair = tuple[Sample, bytes, np.void]


def make_pair(number: int, num_sub_captions: int = 1) -> Pair:
    """A sample whose JPEG has a size of its own, so that wrong offsets cannot go unnoticed."""
    pixels = np.random.default_rng(number).integers(0, 255, (32, 32 + 3 * number, 3), dtype=np.uint8)
    image = prepare_drawn(Image.fromarray(pixels), ImageOptions())
    hashes = np.zeros(1, dtype=HASH_DTYPE)
    hashes["pixels"], hashes["perceptual"] = np.frombuffer(image.pixel_sha256, dtype=np.uint8), image.perceptual_hash
    captions = [Caption(aspect=Aspect.CAPTION, text=f"Ekzem Nr. {number}, größer als üblich")]
    captions += [Caption(aspect=Aspect.MORPHOLOGY, text=f"finding {k}") for k in range(num_sub_captions)]
    sample = Sample(
        key=f"set-{number:09d}",
        captions=tuple(captions),
        diagnosis="eczema" if number % 2 else None,
        dataset="set",
        licence="CC0" if number else None,
        image_sha256=image.sha256,
    )
    return sample, image.jpeg, hashes[0]


def write_split(directory: Path, sizes: Sequence[int]) -> list[ShardRecord]:
    """Shards of these sizes, with index and manifest."""
    directory.mkdir(exist_ok=True)
    records, start = [], 0
    for shard, size in enumerate(sizes):
        pairs = [make_pair(start + i, num_sub_captions=i % 3) for i in range(size)]
        rejected = [Rejection("t.csv", 100 + shard, "image", "empty file")]
        path = directory / f"shard-{shard:06d}.tar"
        records.append(write_shard(path, pairs, rejected=rejected, inputs_digest=f"inputs {shard}"))
        start += size
    write_manifest(
        directory,
        records,
        dataset="set",
        split="train",
        image_short_side=32,
        decomposer="rules-1",
        config_digest="0" * 16,
        num_rejected=len(sizes),
    )
    return records


@pytest.fixture(scope="module")
def split_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("split")
    write_split(directory, (3, 0, 4))
    return directory


# ---------------------------------------------------------------------------------------------- what is written


def test_webdataset_reads_every_member(split_dir: Path) -> None:
    urls = [str(path) for path in sorted(split_dir.glob("*.tar"))]
    rows = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "json", "txt"))
    assert [row[0] for row in rows] == [f"set-{number:09d}" for number in range(7)]
    dataset = ShardedDataset(split_dir)
    for number, (key, image, sample, caption) in enumerate(rows):
        expected, jpeg, hashes = make_pair(number, num_sub_captions=(0, 1, 2, 0, 1, 2, 0)[number])
        assert image.size == (32 + 3 * number, 32) and key == expected.key
        assert Sample.model_validate(sample) == expected == dataset.read_sample(number)
        assert caption == expected.caption == f"Ekzem Nr. {number}, größer als üblich"
        assert dataset.read_image(number) == jpeg
        assert read_hashes(split_dir)[number] == hashes


def test_index_offsets_name_the_bytes_that_tarfile_finds(split_dir: Path) -> None:
    index = np.load(split_dir / "index.npy")
    names = [shard.name for shard in ShardedDataset(split_dir).manifest.shards]
    position = 0
    for shard, name in enumerate(names):
        with tarfile.open(split_dir / name) as tar, (split_dir / name).open("rb") as file:
            members = tar.getmembers()
            assert [member.name.split(".")[1] for member in members] == ["jpg", "json", "txt"] * (len(members) // 3)
            for image, sample in zip(members[::3], members[1::3], strict=True):
                row = index[position]
                assert row["shard"] == shard
                for member, part in ((image, "image"), (sample, "json")):
                    extracted = tar.extractfile(member)
                    assert extracted is not None
                    offset, num_bytes = int(row[f"{part}_offset"]), int(row[f"{part}_num_bytes"])
                    assert (offset, num_bytes) == (member.offset_data, member.size)
                    assert os.pread(file.fileno(), num_bytes, offset) == extracted.read()
                position += 1
    assert position == len(index) == 7


def test_index_holds_the_hash_and_aspect_of_every_caption(split_dir: Path) -> None:
    index = np.load(split_dir / "index.npy")
    dataset = ShardedDataset(split_dir)
    for position, row in enumerate(index):
        captions = dataset.read_sample(position).captions
        used = row["text_aspect"] != NO_ASPECT_CODE
        assert row["text_hash"][used].tolist() == [text_hash(caption.text) for caption in captions]
        assert row["text_aspect"][used].tolist() == [ASPECT_CODE[caption.aspect] for caption in captions]
        assert not row["text_hash"][~used].any()


def test_manifest_counts_and_hashes(split_dir: Path) -> None:
    manifest = ShardedDataset(split_dir).manifest
    assert [shard.num_samples for shard in manifest.shards] == [3, 4]  # the shard without a sample is left out
    assert [shard.name for shard in manifest.shards] == ["shard-000000.tar", "shard-000002.tar"]
    for shard in manifest.shards:
        content = (split_dir / shard.name).read_bytes()
        assert (shard.num_bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest.index_sha256 == hashlib.sha256((split_dir / "index.npy").read_bytes()).hexdigest()
    # sub-captions: 0, 1, 2 in the first shard, 0, 1, 2, 0 in the second
    assert manifest.captions_by_aspect == {Aspect.CAPTION: 7, Aspect.MORPHOLOGY: 6}
    assert manifest.samples_by_diagnosis == {"unknown": 4, "eczema": 3}
    assert manifest.samples_by_licence == {"CC0": 6, "unknown": 1}
    assert manifest.num_rejected == 3
    assert [shard.licences for shard in manifest.shards] == [{"unknown": 1, "CC0": 2}, {"CC0": 4}]
    assert verify(split_dir) == manifest


def test_the_ledger_of_rejected_rows(tmp_path: Path) -> None:
    entries = [Rejection("t.csv", row, "image", "empty file") for row in (100, 101)]
    assert write_ledger(tmp_path / "rejected.csv", entries) == 2
    lines = (tmp_path / "rejected.csv").read_text(encoding="utf-8").splitlines()
    assert lines == ["table,row,field,reason", "t.csv,100,image,empty file", "t.csv,101,image,empty file"]


def test_equal_inputs_give_equal_bytes(split_dir: Path, tmp_path: Path) -> None:
    write_split(tmp_path / "again", (3, 0, 4))
    names = {path.name for path in split_dir.iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {
        *("shard-000000.tar", "shard-000002.tar"),
        *("shard-000000.json", "shard-000001.json", "shard-000002.json"),
        *("index.npy", "image_hashes.npy", "manifest.json"),
    }
    for name in names:
        assert (split_dir / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_while_a_shard_is_rewritten_nothing_vouches_for_the_folder(tmp_path: Path) -> None:
    """What fails while samples are taken leaves the old shard as it was; the manifest goes before the tar changes."""
    write_split(tmp_path, (2,))
    seen: list[set[str]] = []

    def pairs() -> Iterator[Pair]:
        for number in range(3):
            seen.append({path.name for path in tmp_path.iterdir()})
            yield make_pair(number)

    write_shard(tmp_path / "shard-000000.tar", pairs(), inputs_digest="other inputs")
    for names in seen:
        assert {"manifest.json", "shard-000000.json", "shard-000000.tar"} <= names
        assert any(name.endswith(".partial") for name in names)
    assert not (tmp_path / "manifest.json").exists()

    def failing() -> Iterator[Pair]:
        yield make_pair(0)
        raise OSError("no space")

    write_split(tmp_path, (2,))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="no space"):
        write_shard(tmp_path / "shard-000000.tar", failing(), inputs_digest="other inputs")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---------------------------------------------------------------------------------------------- what is damaged


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("shard-000000.tar", place) for place in (5, 700, -1)),
        *(("index.npy", 300), ("image_hashes.npy", 200)),
    ],
)
def test_verify_finds_a_flipped_bit(tmp_path: Path, name: str, place: int) -> None:
    write_split(tmp_path, (2,))
    content = bytearray((tmp_path / name).read_bytes())
    content[place] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: .*SHA-256 is not the manifest's; run `dermvlp repair`"):
        verify(tmp_path)


def test_verify_names_what_is_missing_or_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest.json: no manifest here; make the shards with `dermvlp prepare"):
        verify(tmp_path)
    write_split(tmp_path, (2,))
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(InputError, match=r"shard-000000.tar: missing"):
        verify(tmp_path)
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"manifest.json: not a manifest"):
        verify(tmp_path)


def test_a_record_vouches_only_for_its_own_inputs_and_bytes(tmp_path: Path) -> None:
    (record,) = write_split(tmp_path, (2,))
    path = tmp_path / "shard-000000.tar"
    assert read_record(path, "inputs 0") == record
    assert read_record(path, "inputs 1") is None
    assert read_record(tmp_path / "shard-000001.tar", "inputs 0") is None
    content = bytearray(path.read_bytes())
    content[700] ^= 1  # of the same size
    path.write_bytes(content)
    assert read_record(path, "inputs 0") is None
    path.unlink()
    assert read_record(path, "inputs 0") is None
    sidecar = path.with_suffix(".json")
    sidecar.write_text(sidecar.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert read_record(path, "inputs 0") is None


def test_a_truncated_shard_is_refused_with_file_and_remedy(tmp_path: Path) -> None:
    write_split(tmp_path, (2, 2))
    path = tmp_path / "shard-000001.tar"
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(InputError, match=r"shard-000001.tar: missing or not of the size .*run `dermvlp prepare` again"):
        ShardedDataset(tmp_path)


def test_a_shard_truncated_under_a_reader_is_noticed(tmp_path: Path) -> None:
    write_split(tmp_path, (2,))
    dataset = ShardedDataset(tmp_path)
    os.truncate(tmp_path / "shard-000000.tar", 1000)
    with pytest.raises(InputError, match=r"shard-000000.tar: ends before byte \d+; run `dermvlp prepare` again"):
        dataset.read_image(1)


@pytest.mark.parametrize("damage", ["missing", "truncated", "rows", "not numpy"])
def test_an_unusable_index_is_refused(tmp_path: Path, damage: str) -> None:
    write_split(tmp_path, (2,))
    path = tmp_path / "index.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "rows":
        np.save(path, np.load(path)[:1])
    else:
        path.write_bytes(b"words")
    with pytest.raises(InputError, match=r"index.npy: .*run `dermvlp prepare` again"):
        ShardedDataset(tmp_path)


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path, (1,))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "schema_version": 99}), encoding="utf-8")
    with pytest.raises(InputError, match=r"manifest.json: schema version 99, expected 2; prepare again"):
        ShardedDataset(tmp_path)


def test_a_manifest_cannot_name_a_shard_outside_its_folder(tmp_path: Path) -> None:
    write_split(tmp_path, (1,))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace("shard-000000.tar", "../other.tar"), encoding="utf-8")
    with pytest.raises(InputError, match=r"manifest.json: not a manifest"):
        ShardedDataset(tmp_path)


# ---------------------------------------------------------------------------------------------- in many processes


def test_a_pickled_dataset_carries_no_index(split_dir: Path) -> None:
    dataset = ShardedDataset(split_dir)
    dataset.read_image(0)
    content = pickle.dumps(dataset)
    assert dataset.index.tobytes() not in content
    copy = pickle.loads(content)
    assert [copy.read_image(i) for i in range(7)] == [dataset.read_image(i) for i in range(7)]


def test_files_stay_open_only_for_the_shards_read_last(tmp_path: Path) -> None:
    write_split(tmp_path, (1,) * 80)
    dataset = ShardedDataset(tmp_path)
    open_files = Path("/proc/self/fd")
    before = len(list(open_files.iterdir()))
    images = [dataset.read_image(position) for position in range(80)]
    assert 0 < len(list(open_files.iterdir())) - before <= 64
    assert [dataset.read_image(position) for position in range(80)] == images  # closed ones are opened again
    assert images == [make_pair(number)[1] for number in range(80)]


def test_verify_notices_an_index_that_names_other_captions(tmp_path: Path) -> None:
    """Files whose SHA-256 is right, and which do not belong together."""
    write_split(tmp_path, (2,))
    index = np.load(tmp_path / "index.npy")
    index["text_hash"][1, 0] ^= 1
    np.save(tmp_path / "index.npy", index)
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    manifest["index_sha256"] = hashlib.sha256((tmp_path / "index.npy").read_bytes()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(InputError, match="set-000000001: image or captions are not those of the index"):
        verify(tmp_path)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    write_split(tmp_path, (2, 2, 2))
    assert damaged_shards(tmp_path) == []
    (tmp_path / "shard-000000.tar").unlink()
    os.truncate(tmp_path / "shard-000002.tar", 512)
    assert damaged_shards(tmp_path) == [tmp_path / "shard-000000.tar", tmp_path / "shard-000002.tar"]


@pytest.mark.parametrize(("name", "num_bytes"), [("set-1.jpg", 0), ("a" * 99, 8**11 - 1), ("b.json", 511)])
def test_headers_are_those_of_tarfile(name: str, num_bytes: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = num_bytes
    assert _header(name, num_bytes) == member.tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(ValueError, match="too many"):
        _header("c" * 100, 1)
