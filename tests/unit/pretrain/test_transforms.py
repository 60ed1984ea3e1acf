"""The training transform is seeded by the sample alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.config import AugmentationConfig
from pretrain.data.transforms import TrainTransform
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
