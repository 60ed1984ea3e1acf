"""Finds the images that tables name, and sees that they are there: a missing one is one row, not the end of a run."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

from data_prep.images.convert import MISSING
from data_prep.sources.base import ImageReference
from data_prep.sources.folder import IMAGE_EXTENSIONS, walk_images
from data_prep.sources.values import check_image_dir, find_image


class ImageFiles:
    """The files below one folder. Raises InputError where there is no such folder."""

    def __init__(self, image_dir: Path, by: Literal["path", "name"] = "path") -> None:
        check_image_dir(image_dir, "source.image_dir")
        self.image_dir = image_dir
        self._by_name = _index(image_dir) if by == "name" else None

    def find(self, written: str) -> ImageReference:
        """The image that a table names; `num_bytes` is its size. Raises LookupError with the reason."""
        if self._by_name is None:
            return with_size(find_image(self.image_dir, written))
        if not written:
            raise LookupError("no image path")
        found = self._by_name.get(_stem(PurePosixPath(written.replace("\\", "/")).name), ())
        if len(found) > 1:
            raise LookupError("several images below source.image_dir have this name")
        if not found:
            raise LookupError(MISSING)
        return with_size(ImageReference(found[0], self.image_dir / found[0]))


def with_size(image: ImageReference) -> ImageReference:
    """With the number of bytes of its file. Raises LookupError for what is no regular file, or empty."""
    assert image.path is not None
    entry = _listing(image.path.parent).get(image.path.name)
    try:
        status = None if entry is None else entry.stat()
    except OSError:
        status = None  # a link to nothing
    if status is None:
        raise LookupError(MISSING)
    if not stat.S_ISREG(status.st_mode):
        raise LookupError("not a regular file")
    if status.st_size == 0:
        raise LookupError("empty file")
    return replace(image, num_bytes=status.st_size)


@lru_cache(maxsize=256)  # tables name the images of a folder one after another
def _listing(folder: Path) -> dict[str, os.DirEntry[str]]:
    """One request for a folder's files: on a cluster's file system asking for each of them takes minutes."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry for entry in entries}
    except OSError:
        return {}


def forget_listings() -> None:
    _listing.cache_clear()


def _index(image_dir: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for parts, reason in walk_images(image_dir, Counter()):
        if reason is None:
            stem = _stem(parts[-1])
            found[stem] = (*found.get(stem, ()), "/".join(parts))
    return found


def _stem(name: str) -> str:
    """Without the ending of an image; "a.b" is an id with a dot in it."""
    stem, extension = os.path.splitext(name)  # noqa: PTH122 (a path's `stem` would take the ending off any name)
    return stem if extension.lower() in IMAGE_EXTENSIONS else name
