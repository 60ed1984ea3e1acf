"""An image as it is: reduced to a square, without randomness."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms import v2

from pretrain.data.transforms import decode


class PlainTransform:
    def __init__(self, image_px: int) -> None:
        self.image_px = image_px
        resize = v2.Resize(image_px, interpolation=v2.InterpolationMode.BICUBIC)
        self._transform = v2.Compose([resize, v2.CenterCrop(image_px), v2.PILToTensor()])

    def __call__(self, jpeg: bytes, seed: int = 0) -> Tensor:
        image: Tensor = self._transform(decode(jpeg))
        return image
