"""Features of a data set: equal to a direct computation, kept, resumed bit by bit, and what cannot be decoded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.config import ImageOptions
from data_prep.errors import InputError, PassingError
from data_prep.images.convert import decode_image
from pretrain.data.manifest import ShardedDataset
from pretrain.data.transforms import decode
from pretrain.evaluation import embed_images, load_encoder
from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.encoding.encoders import OpenClipEncoder
from pretrain.evaluation.encoding.feature_chunks import CHUNK_ROWS
from pretrain.evaluation.encoding.features import batches_of, image_features, shard_features
from tests.unit.evaluation.models import MODELS, Pictures, encoded, picture, save_model

SETTINGS = EvaluationSettings(batch_size=48, num_workers=0)  # 48 does not divide a chunk
NUM_IMAGES = CHUNK_ROWS + 40


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> OpenClipEncoder:
    return load_encoder(save_model(tmp_path_factory.mktemp("clip") / "model", MODELS["clip"]))


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [encoded(picture(seed)) for seed in range(NUM_IMAGES)]


def joint(encoder: OpenClipEncoder, data: Pictures, folder: Path) -> np.ndarray:
    return image_features(encoder, data, ("joint",), folder, SETTINGS).by_layer["joint"]


def directly(encoder: OpenClipEncoder, images: list[bytes]) -> np.ndarray:
    pixels = torch.stack([encoder.transform(decode(image)) for image in images])
    with torch.no_grad():
        return torch.nn.functional.normalize(encoder.model.visual(pixels), dim=-1).numpy()


class Interrupted(Pictures):
    """Ends in the middle, as by Ctrl-C."""

    def read_image(self, position: int) -> bytes:
        if position == CHUNK_ROWS + 20:
            raise KeyboardInterrupt
        return super().read_image(position)


def test_equal_a_direct_computation_and_are_read_once(
    encoder: OpenClipEncoder, images: list[bytes], tmp_path: Path
) -> None:
    data = Pictures(images)
    found = joint(encoder, data, tmp_path)
    assert isinstance(found, np.memmap) and found.dtype == np.float32
    assert np.abs(found - directly(encoder, images)).max() < 1e-6
    assert data.read == list(range(NUM_IMAGES))
    assert np.array_equal(joint(encoder, data, tmp_path), found)
    assert len(data.read) == NUM_IMAGES  # not once more
    stem = f"{encoder.info.digest}-{data.digest}-joint"
    assert {path.name for path in tmp_path.iterdir()} == {".lock", f"{stem}.npy", f"{stem}.rejected.json"}


def test_an_interrupted_run_goes_on_and_ends_bit_equal(
    encoder: OpenClipEncoder, images: list[bytes], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        joint(encoder, Interrupted(images), tmp_path / "resumed")
    data = Pictures(images)
    resumed = joint(encoder, data, tmp_path / "resumed")
    assert data.read == list(range(CHUNK_ROWS, NUM_IMAGES))
    whole = joint(encoder, Pictures(images), tmp_path / "whole")
    assert np.array_equal(resumed, whole)


def test_other_layers_data_and_weights_do_not_meet(
    encoder: OpenClipEncoder, images: list[bytes], tmp_path: Path
) -> None:
    few = images[:3]
    first = joint(encoder, Pictures(few), tmp_path)
    tower = image_features(encoder, Pictures(few), ("tower",), tmp_path, SETTINGS).by_layer["tower"]
    other = joint(encoder, Pictures(few[::-1], digest="f" * 16), tmp_path)
    assert not np.allclose(first, tower) and np.allclose(first, other[::-1], atol=1e-6)
    assert len(list(tmp_path.glob("*.npy"))) == 3
    with pytest.raises(InputError, match="layer 'no'"):
        image_features(encoder, Pictures(few), ("no",), tmp_path, SETTINGS)


def test_layers_together_are_those_of_one_layer_each_from_one_pass(
    encoder: OpenClipEncoder, images: list[bytes], tmp_path: Path
) -> None:
    data = Pictures(images)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    layers = ("joint", "tower", "block.0")
    with pytest.raises(KeyboardInterrupt):
        image_features(encoder, Interrupted(images), layers, tmp_path / "together", SETTINGS)
    handle = encoder.model.visual.register_forward_hook(count)
    together = image_features(encoder, data, layers, tmp_path / "together", SETTINGS).by_layer
    handle.remove()
    assert data.read == list(range(CHUNK_ROWS, NUM_IMAGES)) and forwards == 1
    for layer in layers:
        alone = image_features(encoder, data, (layer,), tmp_path / layer, SETTINGS).by_layer[layer]
        assert np.array_equal(together[layer], alone)


def test_an_image_that_cannot_be_decoded_is_left_out_with_its_reason(
    encoder: OpenClipEncoder, images: list[bytes], tmp_path: Path
) -> None:
    data = Pictures([*images[:4], images[4][:-200], *images[5:8]])
    for _ in range(2):  # computed, and read again
        found = image_features(encoder, data, ("joint", "tower"), tmp_path, SETTINGS)
        assert list(found.rejected) == [4] and "truncated or corrupt" in found.rejected[4]
        assert np.abs(found.by_layer["joint"] - directly(encoder, images[:4] + images[5:8])).max() < 1e-6
        assert len(found.by_layer["tower"]) == 7
    (tmp_path / f"{encoder.info.digest}-{data.digest}-tower.rejected.json").write_text("{}")
    with pytest.raises(InputError, match="repaired or damaged between layers"):
        image_features(encoder, data, ("joint", "tower"), tmp_path, SETTINGS)


def test_a_fault_of_the_disk_ends_the_run_and_rejects_nothing(
    encoder: OpenClipEncoder, images: list[bytes], tmp_path: Path
) -> None:
    class Ill(Pictures):
        def read_image(self, position: int) -> bytes:
            if position == CHUNK_ROWS + 1:
                raise PassingError("pictures: key-0257: the image file cannot be read (OSError)")
            return super().read_image(position)

    with pytest.raises(PassingError, match="key-0257: the image file cannot be read"):
        joint(encoder, Ill(images), tmp_path)
    again = Pictures(images)
    found = image_features(encoder, again, ("joint",), tmp_path, SETTINGS)
    assert not found.rejected and len(found.by_layer["joint"]) == NUM_IMAGES
    assert again.read[0] == CHUNK_ROWS  # and what was done is kept


def test_no_image_at_all_is_an_error(encoder: OpenClipEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image could be decoded; the first: not an image"):
        joint(encoder, Pictures([b"no image"]), tmp_path)


def test_files_that_were_damaged_are_named_with_the_remedy(
    encoder: OpenClipEncoder, images: list[bytes], tmp_path: Path
) -> None:
    stem = f"{encoder.info.digest}-{Pictures(images).digest}-joint"
    with pytest.raises(KeyboardInterrupt):
        joint(encoder, Interrupted(images), tmp_path)
    chunk = tmp_path / f"{stem}.chunks" / "000000.npz"
    chunk.write_bytes(chunk.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"000000\.npz: cannot be read .*; remove it"):
        joint(encoder, Pictures(images), tmp_path)
    np.save(tmp_path / f"{stem}.npy", np.zeros((5, 2), np.float32))
    (tmp_path / f"{stem}.rejected.json").write_text("{")
    with pytest.raises(InputError, match=r"rejected\.json: cannot be read .*; remove it"):
        joint(encoder, Pictures(images), tmp_path)
    (tmp_path / f"{stem}.rejected.json").write_text("{}")
    with pytest.raises(InputError, match=f"not the features of {NUM_IMAGES} images; remove it"):
        joint(encoder, Pictures(images), tmp_path)


def test_batches_end_with_their_chunk() -> None:
    batches = batches_of([0, 2], 2 * CHUNK_ROWS + 10, 100)
    assert [(batch.start, batch.stop) for batch in batches] == [
        (0, 100),
        (100, 200),
        (200, CHUNK_ROWS),
        (2 * CHUNK_ROWS, 2 * CHUNK_ROWS + 10),
    ]


# ------------------------------------------------------------------------------------------------ pictures


def test_a_split_of_shards_gives_the_same_pixels_as_before(encoder: OpenClipEncoder, prepared_dir: Path) -> None:
    data = ShardedDataset(prepared_dir / "val")
    jpegs = [data.read_image(position) for position in range(len(data))]
    for jpeg in jpegs:  # what `features` decodes with, beside what training decodes with
        assert decode_image(jpeg, ImageOptions(min_side_px=1)).tobytes() == decode(jpeg).tobytes()
    assert np.abs(shard_features(encoder, data) - directly(encoder, jpegs)).max() < 1e-6


def test_pictures_are_upright_and_opaque() -> None:
    image = picture(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert decode_image(turned, ImageOptions()).tobytes() == image.tobytes()
    transparent = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    assert decode_image(encoded(transparent, "PNG"), ImageOptions()).getpixel((5, 5)) == (255, 255, 255)


def test_files_and_pictures_in_three_lines(encoder: OpenClipEncoder, tmp_path: Path) -> None:
    paths = []
    for seed in range(5):
        paths.append(tmp_path / f"{seed}.png")
        paths[-1].write_bytes(encoded(picture(seed), "PNG"))
    found = embed_images(encoder, paths, batch_size=2)
    expected = directly(encoder, [encoded(picture(seed), "JPEG", quality=100, subsampling=0) for seed in range(5)])
    assert np.abs(found - expected).max() < 0.02  # of a JPEG of the same picture
    assert np.abs(embed_images(encoder, [str(paths[1]), picture(2)]) - found[1:3]).max() < 1e-6
    assert embed_images(encoder, [picture(0)], layer="tower").shape == (1, 32)
    paths[3].write_bytes(b"no image")
    with pytest.raises(InputError, match=r"3\.png: not an image"):
        embed_images(encoder, paths)
    with pytest.raises(InputError, match="no image to encode"):
        embed_images(encoder, [])


def test_results_are_read_without_torch() -> None:
    code = "import sys, pretrain.evaluation.results; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
