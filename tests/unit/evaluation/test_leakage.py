from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.config import FolderSource, ImageOptions, PrepareConfig, RulesDecomposer, TableColumns, TableSource
from data_prep.errors import InputError
from data_prep.images.convert import prepare_image
from data_prep.prepare import prepare
from data_prep.shards.manifest import read_hashes
from pretrain.evaluation import leakage
from pretrain.evaluation.datasets import EvalSet, open_data
from pretrain.evaluation.leakage import hash_images, overlap
from tests.unit.evaluation.dataset_files import picture

NUM_TRAIN = 12


def saved(image: Image.Image, path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the folder of images that were prepared, the training split) at 64 px, as they are."""
    folder = tmp_path_factory.mktemp("trained")
    for seed in range(NUM_TRAIN):
        saved(picture(seed, 64), folder / "images" / "nevus" / f"{seed:02d}.png")
    config = PrepareConfig(
        name="tiny",
        source=FolderSource(image_dir=folder / "images", caption_template=("A photograph of {a:diagnosis}.",)),
        decomposer=RulesDecomposer(),
        images=ImageOptions(short_side_px=64),
        val_fraction=0,
        num_workers=1,
        out_dir=folder / "out",
    )
    prepare(config)
    return folder / "images" / "nevus", folder / "out" / "train"


def overlapping(data: EvalSet, training_dir: Path | list[Path], **options: int) -> tuple[set[str], leakage.Leakage]:
    """(names of the images that are in the training data, the counts)."""
    overlap_N, counts = overlap(data, training_dir, num_workers=0, **options)
    assert overlap_N.shape == (len(data.rows),)
    assert counts.num_overlap == overlap_N.sum()
    return {data.images[position].name for position in np.flatnonzero(overlap_N)}, counts


def test_copies_are_found_and_none_is_invented(trained: tuple[Path, Path], tmp_path: Path) -> None:
    images, training_dir = trained
    with Image.open(images / "00.png") as first:
        saved(first, tmp_path / "same.bmp")  # another file, the same pixels
        turned = Image.Exif()
        turned[0x0112] = 6  # shown turned by 90 degrees: stored the other way round it is the same picture
        saved(first.transpose(Image.Transpose.ROTATE_90), tmp_path / "turned.png", exif=turned)
    with Image.open(images / "01.png") as second:
        saved(second, tmp_path / "recompressed.jpg", quality=60)
        saved(second.resize((50, 50), Image.Resampling.LANCZOS), tmp_path / "rescaled.png")
        saved(second.resize((300, 300), Image.Resampling.BICUBIC), tmp_path / "enlarged.jpg", quality=85)
        saved(second.resize((20, 20), Image.Resampling.LANCZOS), tmp_path / "tiny.png")  # too small to be trained on
    for seed in range(100, 140):
        saved(picture(seed, 96), tmp_path / f"other_{seed}.png")
    found, counts = overlapping(open_data(tmp_path), training_dir)
    copies = {"same.bmp", "turned.png", "recompressed.jpg", "rescaled.png", "enlarged.jpg"}
    assert found - {"tiny.png"} == copies
    assert (counts.num_same_pixels, counts.num_without_hash) == (2, 0)
    assert counts.num_near == len(found) - 2
    assert counts.training_data == "tiny/train"


def test_agrees_with_brute_force(trained: tuple[Path, Path], tmp_path: Path) -> None:
    _, training_dir = trained
    rng = np.random.default_rng(0)
    for seed in range(30):  # from a copy to another picture, in steps
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        mixed = Image.blend(picture(seed % NUM_TRAIN, 64), Image.fromarray(noise), seed / 29)
        saved(mixed, tmp_path / f"{seed:02d}.png")
    data = open_data(tmp_path)
    train = read_hashes(training_dir)
    bits_M = np.unpackbits(train["perceptual"].view(np.uint8).reshape(len(train), 32), axis=1)
    expected = set()
    for image in data.images:
        assert image.path is not None
        mine = prepare_image(image.path.read_bytes(), ImageOptions(short_side_px=64))
        distance_M = (bits_M != np.unpackbits(mine.perceptual_hash.view(np.uint8))).sum(axis=1)
        if distance_M.min() <= 24 or mine.pixel_sha256 in {row.tobytes() for row in train["pixels"]}:
            expected.add(image.name)
    assert overlapping(data, training_dir)[0] == expected
    assert 0 < len(expected) < 30
    assert overlapping(data, training_dir, max_distance=0)[0] < expected


def test_what_cannot_be_read_is_counted(trained: tuple[Path, Path], tmp_path: Path) -> None:
    images, training_dir = trained
    (tmp_path / "torn.png").write_bytes((images / "00.png").read_bytes()[:200])
    (tmp_path / "text.jpg").write_bytes(b"no image at all")
    saved(picture(200, 96), tmp_path / "gone.png")
    saved(picture(0, 64), tmp_path / "same.png")
    data = open_data(tmp_path)
    (tmp_path / "gone.png").unlink()
    found, counts = overlapping(data, training_dir)
    assert found == {"same.png"}
    assert counts.num_without_hash == 3


def test_rows_for_training_are_told_and_not_counted(trained: tuple[Path, Path], tmp_path: Path) -> None:
    _, training_dir = trained
    saved(picture(0, 64), tmp_path / "train" / "nevus" / "a.png")
    saved(picture(1, 64), tmp_path / "test" / "nevus" / "b.png")
    overlap_N, counts = overlap(open_data(tmp_path), training_dir)
    assert overlap_N.tolist() == [True, True]
    assert counts.num_overlap == 1


def test_shards_have_their_hashes(trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, training_dir = trained

    def never(*_: object) -> Iterable[object]:
        raise AssertionError("an image was hashed")

    monkeypatch.setattr(leakage, "_chunks", never)
    found, counts = overlapping(open_data(training_dir), training_dir)
    assert len(found) == NUM_TRAIN
    assert (counts.num_same_pixels, counts.num_near) == (NUM_TRAIN, 0)


def test_several_training_sets(trained: tuple[Path, Path], prepared_dir: Path, tmp_path: Path) -> None:
    _, training_dir = trained
    saved(picture(0, 64), tmp_path / "a.png")
    saved(picture(300, 96), tmp_path / "b.png")
    found, counts = overlapping(open_data(tmp_path), [prepared_dir / "train", training_dir])
    assert found == {"a.png"}
    assert counts.training_data == "synthetic/train, tiny/train"
    with pytest.raises(InputError, match="no training data given"):
        overlap(open_data(tmp_path), [])
    with pytest.raises(InputError, match=r"manifest.json: no manifest here"):
        overlap(open_data(tmp_path), tmp_path)


def test_hashes_are_kept_and_torn_ones_made_again(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(5):
        saved(picture(seed, 64), tmp_path / "images" / f"{seed}.png")
    data = open_data(tmp_path / "images")
    first = hash_images(data, 64, tmp_path / "cache", num_workers=0)
    (kept,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(leakage, "numbered_fingerprints", None)  # is not called again
    assert (hash_images(data, 64, tmp_path / "cache", num_workers=0) == first).all()
    monkeypatch.undo()
    kept.write_bytes(kept.read_bytes()[:100])
    assert (hash_images(data, 64, tmp_path / "cache", num_workers=0) == first).all()
    hash_images(data, 32, tmp_path / "cache", num_workers=0)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_worker_processes_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "_CHUNK", 4)
    for seed in range(10):
        saved(picture(seed, 40), tmp_path / f"{seed:02d}.png")
    data = open_data(tmp_path)
    assert (hash_images(data, 64, num_workers=2) == hash_images(data, 64, num_workers=0)).all()


@pytest.mark.slow
def test_on_real_images(tmp_path: Path) -> None:
    """Train on the real `train` part: its recompressed and rescaled images are found; of `val` only what is a copy."""
    if "DERMVLP_DATA" not in os.environ:
        pytest.skip("DERMVLP_DATA is unset: no real images")
    folder = Path(os.environ["DERMVLP_DATA"]) / "derm-images"
    columns = TableColumns(image="filename", diagnosis="label", group="group_id", split="split_hint")
    prepare(
        PrepareConfig(
            name="real",
            source=TableSource(
                table_path=folder / "metadata.csv",
                image_dir=folder,
                columns=columns,
                caption_template=("{A:diagnosis}.",),
            ),
            images=ImageOptions(short_side_px=160),
            out_dir=tmp_path / "out",
        )
    )
    data = open_data("configs/eval/datasets/derm_images.yaml")
    trained_N = np.array([row.is_train for row in data.rows])
    overlap_N, counts = overlap(data, tmp_path / "out" / "train", tmp_path / "cache")
    # rows that `prepare` left out as copies of `val` are not in train; all others are
    assert overlap_N[trained_N].mean() > 0.99
    assert not overlap_N[~trained_N].any()
    assert (counts.num_overlap, counts.num_without_hash) == (0, 0)  # of `val`, which is tested on

    chosen = np.random.default_rng(0).choice(np.flatnonzero(trained_N & overlap_N), 200, replace=False)
    for position in chosen:
        with Image.open(io.BytesIO(data.read_image(int(position)))) as image:
            small = image.resize((180, 180), Image.Resampling.BICUBIC)
            saved(small, tmp_path / "copies" / f"{position}.jpg", quality=70)
    found_N, _ = overlap(open_data(tmp_path / "copies"), tmp_path / "out" / "train")
    assert found_N.mean() > 0.98
