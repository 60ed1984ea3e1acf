"""Existing WebDataset tars, read in place: a sample is the members of one key, standing together.

    2024/case7.jpg, 2024/case7.txt, 2024/case7.json -> key "2024/case7", extensions "jpg", "txt", "json"

Nothing is unpacked. A row's image is a range of bytes of its tar; members' names are never used as paths.
"""

from __future__ import annotations

import fnmatch
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import ValidationError

from data_prep.config import WebDatasetSource
from data_prep.errors import InputError
from data_prep.schema import Aspect, Sample
from data_prep.sources.base import ImageReference, Rejection, SourceRow
from data_prep.sources.labels import FIELDS, Labels
from data_prep.sources.readers import check_keys, parse_json, plain_text
from data_prep.sources.values import Tally, is_utf8

logger = logging.getLogger(__name__)

_MAX_TEXT_BYTES = 16 * 2**20  # of a member that is read whole
_Found = TypeVar("_Found")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass
class _Members:
    """One sample's members by extension, lower-cased."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    problem: str | None = None
    num_seen: int = 0  # members of the tar up to the last of these


@dataclass(frozen=True)
class TarRecord:
    """A sample as text, before its fields are given a meaning."""

    row: int
    table: str
    image: ImageReference
    caption: str | None
    values: Mapping[str, str]  # of the keys asked for


class WebDatasetRows:
    """The `Source` of a `WebDatasetSource`: its tars in the order of their names.

    `row` counts samples over all tars, so that it tells them apart. A sample that cannot be used is a Rejection. Where
    a tar is damaged, its samples before the damage come through, then there is one Rejection, and the next tar goes on.
    """

    def __init__(self, config: WebDatasetSource, needs_caption: bool = True) -> None:
        self.config, self.needs_caption = config, needs_caption
        self.tars = _find_tars(config)
        self.labels: Labels | None = None
        self._warned = False
        if config.json_is_sample:
            if config.columns or config.extra_columns or config.replace or config.caption_template:
                raise InputError(
                    "source.json_is_sample: takes the samples over as they are; remove columns, extra_columns, replace "
                    "and caption_template"
                )
            return
        if unknown := sorted(set(config.columns) - set(FIELDS)):
            raise InputError(f"source.columns: no field {unknown[0]!r}; there are {', '.join(FIELDS)}")
        self.labels = Labels(config, config.columns, "columns.", needs_caption, has_captions=True)
        self.keys = {**config.columns, **config.extra_columns}
        if self.keys:
            wanted = {f"columns.{name}": key for name, key in config.columns.items()}
            wanted |= {f"extra_columns.{name}": key for name, key in config.extra_columns.items()}
            check_keys(config.tar_dir, wanted, (_flat(value) for value in self._json_objects()))

    @property
    def files(self) -> tuple[Path, ...]:
        return self.tars

    def rows(self) -> Iterator[SourceRow | Rejection]:
        yield from self._over_tars(self._row)

    def records(self, json_lists: Collection[str] = ()) -> Iterator[TarRecord | Rejection]:
        """The values of `columns` and `extra_columns` as they are; lists of the keys `json_lists` as JSON."""

        def record(row: int, path: Path, sample: _Members, file: BinaryIO, tally: Tally) -> TarRecord | Rejection:
            return self._record(row, path, sample, file, json_lists)

        yield from self._over_tars(record)

    def _over_tars(
        self, make: Callable[[int, Path, _Members, BinaryIO, Tally], _Found | Rejection]
    ) -> Iterator[_Found | Rejection]:
        row = 0
        for path in self.tars:
            tally, skipped = Tally(path.name), Counter[str]()
            for found in _samples(path, skipped):
                row += 1
                if isinstance(found, str):
                    yield Rejection(path.name, row, "(row)", found)
                else:
                    yield make(row, path, *found, tally)
            if not self._warned:  # the tars are read several times
                tally.warn()
                if skipped:
                    listed = ", ".join(f"{num} {what}" for what, num in sorted(skipped.items()))
                    logger.warning("%s: members not looked at: %s", path.name, listed)
        self._warned = True

    def _row(self, row: int, path: Path, sample: _Members, file: BinaryIO, tally: Tally) -> SourceRow | Rejection:
        if self.labels is None:
            try:
                return self._from_sample(row, path.name, self._image(path, sample), _read_json(sample, file))
            except _UnreadableError as error:
                return Rejection(path.name, row, error.field, error.reason)
        found = self._record(row, path, sample, file)
        if isinstance(found, Rejection):
            return found
        origin = f"column:{self.config.caption_extension}"
        return self.labels.row(row, path.name, found.image, found.values, tally, found.caption, origin)

    def _record(
        self, row: int, path: Path, sample: _Members, file: BinaryIO, json_lists: Collection[str] = ()
    ) -> TarRecord | Rejection:
        try:
            image = self._image(path, sample)
            caption = _read_text(sample, self.config.caption_extension, file)
            values = self._values(_read_json(sample, file), json_lists) if self.keys else {}
        except _UnreadableError as error:
            return Rejection(path.name, row, error.field, error.reason)
        return TarRecord(row, path.name, image, caption, values)

    def _image(self, path: Path, sample: _Members) -> ImageReference:
        if sample.problem is not None:
            raise _UnreadableError("(row)", sample.problem)
        images = [sample.members[ext] for ext in self.config.image_extensions if ext in sample.members]
        if len(images) != 1:
            reason = "several members are images" if images else "no member is an image by its extension"
            raise _UnreadableError("image", reason)
        name = f"{path.name}/{images[0].name}".encode("utf-8", "backslashreplace").decode()
        return ImageReference(name, path, images[0].offset_data, images[0].size)

    def _values(self, value: Mapping[str, Any], json_lists: Collection[str]) -> dict[str, str]:
        record = {}
        for key in self.keys.values():
            try:
                record[key] = text = plain_text(_reach(value, key), key in json_lists)
            except ValueError as error:
                raise _UnreadableError(key, f"{error}, where text or a number is expected") from None
            if "\0" in text or not is_utf8(text):
                raise _UnreadableError(key, "a NUL or half a character in the text")
        return record

    def _from_sample(self, row: int, table: str, image: ImageReference, value: dict[str, Any]) -> SourceRow | Rejection:
        """A sample of our own: everything but its key and its data set's name, which stands in for a missing source."""
        person = value.get("demographics")
        if isinstance(person, dict) and isinstance(age := person.get("age_years"), int | float) and age > 90:
            value["demographics"] = person | {"age_years": 90, "age_band": "90+"}  # schema 1 gave every age
        try:
            sample = Sample.model_validate(value)
        except ValidationError as error:
            where = error.errors(include_url=False, include_input=False)[0]["loc"]
            known = [str(part) for part in where if part in Sample.model_fields or isinstance(part, int)]
            return Rejection(table, row, "json", f"no Sample of ours{': ' if known else ''}{'.'.join(known)}")
        if "\\u0000" in sample.model_dump_json():
            return Rejection(table, row, "json", "a NUL in the text")
        whole = next((caption for caption in sample.captions if caption.aspect is Aspect.CAPTION), None)
        if whole is None and self.needs_caption:
            return Rejection(table, row, "json", "no caption")
        return SourceRow(
            row=row,
            table=table,
            image=image,
            caption=None if whole is None else whole.text,
            caption_origin="" if whole is None else whole.origin,
            subcaptions=tuple(caption for caption in sample.captions if caption.aspect is not Aspect.CAPTION),
            diagnosis=sample.diagnosis,
            diagnosis_path=sample.diagnosis_path,
            concepts=sample.concepts,
            body_site=sample.body_site,
            demographics=sample.demographics,
            modality=sample.modality,
            group=sample.group,
            source=sample.source or self.config.source or sample.dataset,
            licence=sample.licence or self.config.licence,
        )

    def _json_objects(self) -> Iterator[dict[str, Any]]:
        for path in self.tars:
            for found in _samples(path, Counter()):
                if not isinstance(found, str) and found[0].problem is None:
                    try:
                        yield _read_json(*found)
                    except _UnreadableError:
                        continue


# ---------------------------------------------------------------------------------------------- tars


def _find_tars(config: WebDatasetSource) -> tuple[Path, ...]:
    if not config.tar_dir.is_dir():
        raise InputError(f"{config.tar_dir}: no such folder; correct source.tar_dir")
    names = sorted(path.name for path in config.tar_dir.iterdir() if path.is_file())
    tars = tuple(config.tar_dir / name for name in names if fnmatch.fnmatchcase(name, config.pattern))
    if not tars:
        compressed = any(".tar." in name or name.endswith(".tgz") for name in names)
        hint = "; compressed tars have to be unpacked to .tar first (gunzip)" if compressed else ""
        raise InputError(f"{config.tar_dir}: no file matches {config.pattern!r}; correct source.pattern{hint}")
    for path in tars:
        with path.open("rb") as file:
            if file.read(6).startswith(_COMPRESSED):
                raise InputError(f"{path}: a compressed tar, whose members have no place; unpack it to .tar (gunzip)")
    return tars


def _samples(path: Path, skipped: Counter[str]) -> Iterator[tuple[_Members, BinaryIO] | str]:
    """Each sample of a tar; at last, where the tar is damaged, the reason.

    The sample in front of the damage counts as whole if it has the same extensions as the one before it: then none of
    its members can be among what is lost.
    """
    current, before = _Members(""), None
    seen: set[int] = set()  # hashes of keys: names would take ten times the memory
    with path.open("rb") as file:
        try:
            for number, member in enumerate(_members(file), start=1):
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if member.isdir() or not stem or not extension:
                    skipped["folders, hidden files, names without an extension"] += 1
                    continue
                key = f"{folder}/{stem}"
                if key != current.key:
                    if current.members:
                        yield current, file
                        before = current
                    current = _Members(key)
                    if hash(key) in seen:
                        current.problem = "its key stands in two places of the tar; members of a sample stand together"
                    seen.add(hash(key))
                _add(current, extension.lower(), member, number)
        # tarfile meets some damage with whatever int() or a slice raises
        except (tarfile.TarError, ValueError, IndexError, OverflowError):
            if before is not None and current.members.keys() == before.members.keys():
                yield current, file
                before = current
            num = 0 if before is None else before.num_seen
            yield f"corrupt tar: what follows its member {num} cannot be read"
            return
        if current.members:
            yield current, file


def _add(sample: _Members, extension: str, member: tarfile.TarInfo, number: int) -> None:
    if extension in sample.members:
        sample.problem = sample.problem or "two members of the same name"
    if not member.isfile() or member.issparse():
        sample.problem = sample.problem or "a member is a link, a device or sparse, not a plain file"
    sample.members[extension] = member
    sample.num_seen = number


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of an uncompressed tar, one after another. Raises TarError where it is damaged or cut off."""
    num_bytes = file.seek(0, 2)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        last = -1
        while (member := tar.next()) is not None:
            # a negative size would lead back, and round and round
            if member.size < 0 or tar.offset <= last or member.offset_data + member.size > num_bytes:
                raise tarfile.ReadError("a size that cannot be")
            last = tar.offset
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            yield member
        # tarfile takes a damaged header for the end of the tar
        file.seek(tar.offset)
        end = file.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise tarfile.ReadError("no end")
        while block := file.read(2**20):
            if any(block):
                raise tarfile.ReadError("more after the end")


# ---------------------------------------------------------------------------------------------- members


class _UnreadableError(Exception):
    def __init__(self, field_name: str, reason: str) -> None:
        super().__init__(reason)
        self.field, self.reason = field_name, reason


def _read_text(sample: _Members, extension: str, file: BinaryIO) -> str | None:
    """None where there is no such member. Raises _UnreadableError for what is no text."""
    member = sample.members.get(extension.lower())
    if member is None:
        return None
    if member.size > _MAX_TEXT_BYTES:
        raise _UnreadableError(extension, f"more than {_MAX_TEXT_BYTES:,} bytes of text")
    file.seek(member.offset_data)
    try:
        text = file.read(member.size).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _UnreadableError(extension, "not UTF-8") from None
    if "\0" in text:
        raise _UnreadableError(extension, "a NUL byte in the text")
    return text


def _read_json(sample: _Members, file: BinaryIO) -> dict[str, Any]:
    text = _read_text(sample, "json", file)
    if text is None:
        raise _UnreadableError("json", "the sample has no .json member")
    value, problem = parse_json(text)
    if problem is not None or not isinstance(value, dict):
        raise _UnreadableError("json", problem or "no JSON object")
    return value


def _reach(value: Mapping[str, Any], key: str) -> Any:
    """value["a"]["b"] for "a.b", unless there is a key "a.b"; None where there is none."""
    if key in value:
        return value[key]
    found: Any = value
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, None]:
    """Every key that `_reach` finds."""
    keys: dict[str, None] = {}
    for name, inner in value.items():
        keys[f"{prefix}{name}"] = None
        if isinstance(inner, dict):
            keys |= _flat(inner, f"{prefix}{name}.")
    return keys
