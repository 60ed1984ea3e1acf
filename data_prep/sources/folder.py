"""A tree of image folders whose names say something, as `diagnosis/file.jpg` or `train/psoriasis/file.jpg`.

Folders are listed one at a time, in the order of their names, so the same tree gives the same rows.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.config import FolderSource
from data_prep.errors import InputError
from data_prep.sources.base import ImageReference, Rejection, SourceRow
from data_prep.sources.labels import Labels
from data_prep.sources.values import Tally, check_image_dir, is_utf8

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp"})
#: What operating systems leave behind, besides hidden files.
_LITTER = frozenset({"thumbs.db", "desktop.ini", "icon\r", "__macosx"})


class FolderRows:
    """The `Source` of a `FolderSource`. `row` is the position in the sorted tree, litter apart.

    A file that is no image by its ending, or lies above the folders that `levels` names, is a Rejection. Hidden files
    and an operating system's litter are counted in the log. Linked files are followed, linked folders are not: they
    can lead round in circles.

    Underscores in a folder's name count as spaces; `replace` goes by the name as it is. Raises InputError for settings
    that have no meaning here; `rows` raises it for a split that is not configured and a folder that cannot be read.
    """

    def __init__(self, config: FolderSource, needs_caption: bool = True) -> None:
        self.config = config
        if config.extra_columns:
            raise InputError("source.extra_columns: a folder tree has no columns; remove it")
        named = [level for level in config.levels if level != "ignore"]
        if twice := [level for level, num in Counter(named).items() if num > 1]:
            raise InputError(f"source.levels: {twice[0]!r} is there twice; call other levels ignore")
        fields: dict[str, str] = {level: level for level in named}
        self.labels = Labels(config, fields, "levels: ", needs_caption, has_captions=False)
        check_image_dir(config.image_dir, "source.image_dir")
        self.table = config.image_dir.resolve().name
        self._logged = False

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def rows(self) -> Iterator[SourceRow | Rejection]:
        skipped, tally = Counter[str](), Tally(self.table)
        for row, entry in enumerate(walk_images(self.config.image_dir, skipped), start=1):
            yield self._row(row, *entry, tally)
        if skipped and not self._logged:  # the tree is listed several times
            listed = ", ".join(f"{num} {what}" for what, num in sorted(skipped.items()))
            logger.warning("%s: not looked at: %s", self.table, listed)
        self._logged = True

    def _row(self, row: int, parts: tuple[str, ...], reason: str | None, tally: Tally) -> SourceRow | Rejection:
        name = "/".join(parts)
        if reason is None and not is_utf8(name):
            reason = "a file or folder name that is not UTF-8"
        if reason is None and len(parts) <= len(self.config.levels):
            reason = "the file lies above the folders that source.levels names"
        if reason is not None:
            return Rejection(self.table, row, "image", reason)
        record: dict[str, str] = {
            level: folder
            if folder in self.config.replace.get(level, {}) or level == "group"
            else folder.replace("_", " ")
            for level, folder in zip(self.config.levels, parts, strict=False)
        }
        image = ImageReference(name, self.config.image_dir / name)
        return self.labels.row(row, self.table, image, record, tally, None, "")


def walk_images(root: Path, skipped: Counter[str]) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """(parts of the path below the image folder, reason for rejection or None) of each file, in sorted order."""
    # a stack of our own: a tree can be deeper than Python may recurse
    open_folders: list[tuple[tuple[str, ...], Iterator[os.DirEntry[str]]]] = [((), _listing(root))]
    while open_folders:
        above, entries = open_folders[-1]
        entry = next(entries, None)
        if entry is None:
            open_folders.pop()
            continue
        parts = (*above, entry.name)
        if entry.name.startswith(".") or entry.name.lower() in _LITTER:
            skipped["hidden files or folders, and litter such as Thumbs.db"] += 1
        elif entry.is_dir(follow_symlinks=False):
            open_folders.append((parts, _listing(Path(entry.path))))
        elif entry.is_symlink() and entry.is_dir():
            skipped["links to folders"] += 1
        elif not entry.is_file():  # also a pipe, which would be waited for for ever
            yield parts, "neither a file nor a folder, or a link to nothing"
        elif Path(entry.name).suffix.lower() not in IMAGE_EXTENSIONS:
            yield parts, "not an image by its ending"
        else:
            yield parts, None


def _listing(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return iter(sorted(found, key=lambda entry: entry.name))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}; make it readable or move it away") from None
