"""What finds an image's copies, without its place in a shard: for images that are compared with prepared ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.config import ImageOptions
from data_prep.images.convert import ImageRejected, prepare_image
from data_prep.schema import HASH_DTYPE

#: All zero but `is_known` where an image could not be read.
FINGERPRINT_DTYPE = np.dtype([*HASH_DTYPE.descr, ("is_known", "?")])


def fingerprints(images: Sequence[bytes | None], options: ImageOptions) -> NDArray[np.void]:
    """(N,) FINGERPRINT_DTYPE of image files' bytes, None where there are none: as their pictures would stand in shards
    of these options."""
    found = np.zeros(len(images), FINGERPRINT_DTYPE)
    for position, image in enumerate(images):
        try:
            prepared = None if image is None else prepare_image(image, options)
        except ImageRejected:
            continue
        if prepared is not None:
            pixels = np.frombuffer(prepared.pixel_sha256, np.uint8)
            found[position] = (pixels, prepared.perceptual_hash, True)
    return found


def numbered_fingerprints(
    options: ImageOptions, piece: tuple[int, Sequence[bytes | None]]
) -> tuple[int, NDArray[np.void]]:
    """The same for a piece of work of `data_prep.pool.run`, whose number is kept."""
    return piece[0], fingerprints(piece[1], options)
