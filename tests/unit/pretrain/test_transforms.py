"""The training transform is seeded by the sample alone."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pretrain.config import AugmentationConfig
from pretrain.data.transforms import TrainTransform, UndecodableImage, decode, draw_crop, jitter_matrix
from tests.unit.pretrain.plain_transform import PlainTransform

STILL = AugmentationConfig(crop_scale_min=1.0, horizontal_flip=False, vertical_flip=False, color_jitter=0.0)


def jpeg(width: int, height: int, seed: int = 0, mode: str = "RGB") -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    image.save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def test_the_seed_decides_and_nothing_else() -> None:
    transform = TrainTransform(48, AugmentationConfig())
    torch.manual_seed(1)
    first = transform(jpeg(80, 64), 5)
    state = torch.random.get_rng_state()
    torch.rand(7)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert torch.equal(transform(jpeg(80, 64), 5), first)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers are left alone
    assert not torch.equal(state, before)
    assert len({transform(jpeg(80, 64), s).numpy().tobytes() for s in range(20)}) == 20
    assert not torch.equal(transform(jpeg(80, 64, seed=1), 5), first)


@pytest.mark.parametrize(
    "transform", [TrainTransform(48, AugmentationConfig()), PlainTransform(48)], ids=["train", "eval"]
)
@pytest.mark.parametrize(("width", "height", "mode"), [(80, 64, "RGB"), (40, 90, "RGB"), (48, 48, "L")])
def test_shape_and_type(transform: TrainTransform | PlainTransform, width: int, height: int, mode: str) -> None:
    image = transform(jpeg(width, height, mode=mode), 3)
    assert image.shape == (3, 48, 48) and image.dtype == torch.uint8


def test_with_everything_off_a_square_image_is_resized_alone() -> None:
    content = jpeg(96, 96)
    assert torch.equal(TrainTransform(96, STILL)(content, 0), PlainTransform(96)(content))


@pytest.mark.parametrize("flip", ["horizontal_flip", "vertical_flip"])
def test_flips_are_flips_half_of_the_time(flip: str) -> None:
    content = jpeg(48, 48)
    plain = PlainTransform(48)(content)
    flipped = plain.flip(-1 if flip == "horizontal_flip" else -2)
    transform = TrainTransform(48, STILL.model_copy(update={flip: True}))
    images = [transform(content, seed) for seed in range(100)]
    num_flipped = sum(torch.equal(image, flipped) for image in images)
    assert num_flipped + sum(torch.equal(image, plain) for image in images) == 100
    assert 30 <= num_flipped <= 70


def test_crops_keep_at_least_the_share_of_the_area() -> None:
    """A horizontal ramp of grey: its range in the crop is the crop's width, at least sqrt(0.6 * 0.85) of the whole."""
    ramp = np.tile(np.linspace(0, 255, 200, dtype=np.uint8), (200, 1))
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, format="JPEG", quality=100)
    transform = TrainTransform(64, STILL.model_copy(update={"crop_scale_min": 0.6}))
    widths = []
    for seed in range(60):
        image = transform(buffer.getvalue(), seed).float()
        widths.append(float(image.max() - image.min()) / 255)
    assert 0.68 < min(widths) < 0.8 and max(widths) > 0.9


def test_jitter_moves_colours_by_a_little() -> None:
    content = jpeg(48, 48)
    plain = PlainTransform(48)(content).float()
    for amount, low, high in ((0.1, 0.5, 20.0), (0.4, 4.0, 80.0)):
        transform = TrainTransform(48, STILL.model_copy(update={"color_jitter": amount}))
        moved = np.mean([float((transform(content, seed).float() - plain).abs().mean()) for seed in range(30)])
        assert low < moved < high


@pytest.mark.parametrize(("width", "height"), [(160, 120), (90, 200), (64, 64)])
def test_the_crop_is_the_one_torchvision_makes_of_the_same_box(width: int, height: int) -> None:
    """But for rounding, and for what the decoder reduces."""
    content = jpeg(width, height)
    transform = TrainTransform(48, STILL.model_copy(update={"crop_scale_min": 0.5}))
    for seed in range(5):
        left, top, right, bottom = (int(x) for x in draw_crop(width, height, 0.5, random.Random(seed).random))
        factor = 2 if min(right - left, bottom - top) >= 96 else 1  # the decoder gives every second pixel
        left, top = left // factor * factor, top // factor * factor
        right, bottom = -(-right // factor) * factor, -(-bottom // factor) * factor
        expected = F.resized_crop(
            decode(content), top, left, bottom - top, right - left, [48, 48], v2.InterpolationMode.BICUBIC
        )
        difference = transform(content, seed).float() - F.pil_to_tensor(expected).float()
        assert difference.abs().max() <= (2 if factor == 1 else 6)


def test_crops_are_drawn_as_announced() -> None:
    boxes = np.array([draw_crop(300, 200, 0.5, random.Random(seed).random) for seed in range(2000)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    share, ratio = width * height / 60_000, width / height
    assert 0.495 < share.min() < 0.51 and share.max() <= 1.0 and 0.84 < ratio.min() < 0.87 and 1.16 < ratio.max() < 1.2
    assert boxes[:, :2].min() == 0 and boxes[:, 2].max() == 300 and boxes[:, 3].max() == 200
    # no box of the whole area has one of the ratios: the middle of the picture
    assert draw_crop(300, 100, 1.0, random.Random(0).random) == (91, 0, 209, 100)


def test_a_large_picture_is_reduced_by_the_decoder_and_looks_the_same() -> None:
    content = jpeg(1600, 1200)
    for seed in range(3):
        box = draw_crop(1600, 1200, 1.0, random.Random(seed).random)
        slow = decode(content).resize((100, 100), Image.Resampling.BICUBIC, box)
        fast = TrainTransform(100, STILL)(content, seed).float()
        assert (fast - F.pil_to_tensor(slow).float()).abs().max() <= 6


def colours(size: int = 32) -> Image.Image:
    """Muted, so that no change of a tenth leaves the range."""
    return Image.fromarray(np.random.default_rng(0).integers(70, 180, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("which", range(3), ids=["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_jitter_is_torchvisions(which: int, end: float) -> None:
    """Each of the three at either end of its range, the others at the middle."""
    draws = iter([end if position == which else 0.5 for position in range(4)])
    matrix = jitter_matrix(colours(), 0.2, lambda: next(draws))
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[which]
    before = F.pil_to_tensor(colours())
    ours = F.pil_to_tensor(colours().convert("RGB", matrix)).float()
    theirs = adjust(before, 1 + 0.2 * (2 * end - 1)).float()
    assert (ours - theirs).abs().max() <= 1.5
    assert (theirs - before).abs().max() > 5  # it is seen


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_hue_turns_the_way_it_does_in_hsv(end: float) -> None:
    """Greys and luma stay; red goes towards yellow, or towards blue, by about the angle."""
    draws = iter([0.5, 0.5, 0.5, end])
    matrix = np.array(jitter_matrix(colours(), 0.4, lambda: next(draws))).reshape(3, 4)
    assert np.allclose(matrix.sum(axis=1), 1.0) and np.allclose(
        np.array([0.299, 0.587, 0.114]) @ matrix[:, :3], 0.3, atol=0.3
    )
    _, green, blue = matrix[:, :3] @ np.array([180.0, 80.0, 80.0])
    expected = F.adjust_hue(
        torch.tensor([180, 80, 80], dtype=torch.uint8).view(3, 1, 1), 0.04 * (2 * end - 1)
    ).flatten()
    assert np.sign(green - blue) == np.sign(int(expected[1]) - int(expected[2])) == 2 * end - 1
    assert 0.5 < (green - blue) / (int(expected[1]) - int(expected[2])) < 2.0


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "png"])
def test_what_is_no_jpeg_is_said(damage: str) -> None:
    whole = jpeg(80, 64)
    buffer = io.BytesIO()
    Image.new("RGB", (60, 60)).save(buffer, format="PNG")
    content = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"GIF no", "png": buffer.getvalue()}[damage]
    with pytest.raises(UndecodableImage):
        TrainTransform(48, STILL)(content, 0)


def test_damaged_bytes_are_an_image_or_undecodable() -> None:
    """Nothing else comes out of it, whatever the bytes (100 JPEGs with eight random bytes)."""
    whole, rng, num_refused = jpeg(80, 64), np.random.default_rng(0), 0
    for _ in range(100):
        damaged = bytearray(whole)
        for at in rng.integers(0, min(700, len(damaged)), 8):
            damaged[at] = rng.integers(256)
        try:
            assert TrainTransform(48, STILL)(bytes(damaged), 0).shape == (3, 48, 48)
        except UndecodableImage:
            num_refused += 1
    assert 5 < num_refused < 100
