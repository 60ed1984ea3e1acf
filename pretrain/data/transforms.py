"""JPEG bytes to a square uint8 tensor for training. Normalisation happens on the device, where it costs nothing.

Evaluation uses open_clip's own preprocessing (`pretrain.models.build.eval_transform`).
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from pretrain.config import AugmentationConfig

#: (JPEG bytes, seed) -> (3, image_px, image_px) uint8
ImageTransform = Callable[[bytes, int], Tensor]


def decode(jpeg: bytes) -> Image.Image:
    with Image.open(io.BytesIO(jpeg)) as image:
        return image.convert("RGB")


class TrainTransform:
    """Random crop, flips and colour jitter, all drawn from the seed given with the image."""

    def __init__(self, image_px: int, augmentation: AugmentationConfig) -> None:
        jitter = augmentation.color_jitter
        steps: list[torch.nn.Module] = [
            v2.RandomResizedCrop(
                image_px,
                scale=(augmentation.crop_scale_min, 1.0),
                ratio=(0.85, 1.18),
                interpolation=v2.InterpolationMode.BICUBIC,
            )
        ]
        if augmentation.horizontal_flip:
            steps.append(v2.RandomHorizontalFlip())
        if augmentation.vertical_flip:
            steps.append(v2.RandomVerticalFlip())
        steps.append(v2.PILToTensor())
        if jitter > 0:
            steps.append(v2.ColorJitter(jitter, jitter, jitter, jitter / 10))
        self._transform = v2.Compose(steps)

    def __call__(self, jpeg: bytes, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image: Tensor = self._transform(decode(jpeg))
        return image
