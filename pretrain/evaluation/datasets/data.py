"""Items to rows: classes by their names, rows of one image joined, and a digest that names the set."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_prep.errors import InputError, PassingError
from data_prep.files import write_atomically
from data_prep.images.convert import ImageRejected, read_image
from data_prep.salt import hash_group, salt_of_environment
from data_prep.shards.manifest import read_manifest
from data_prep.sources.base import ImageReference, Rejection
from data_prep.sources.values import Tally
from pretrain.evaluation.datasets.description import EvalDataConfig, ShardsData, fold
from pretrain.evaluation.datasets.sources import read_items
from pretrain.evaluation.datasets.values import Item
from pretrain.evaluation.interfaces import EvalData, Row

_MAX_NAMED = 10  # values that a message repeats: of a column that was taken for another there would be thousands
_LEFT_OUT = "left out by the description"


@dataclass
class EvalSet:
    """An `interfaces.EvalData`: what `open_data` gives. Can be sent to worker processes."""

    name: str
    rows: Sequence[Row]
    classnames: tuple[str, ...]
    digest: str  # 16 hex digits, of all that rows say but for patients, and the images' sizes in bytes
    rejected: Sequence[Mapping[str, str]]
    images: tuple[ImageReference, ...] = field(repr=False)
    notes: tuple[str, ...] = ()  # what a reader must know: rows left out, values not used, classes without rows
    templates: str | None = None  # the list that the description names
    shards_dir: Path | None = None  # where the rows are those of prepared shards, ...
    positions: tuple[int, ...] = field(default=(), repr=False)  # ... and each row's place in their index

    @property
    def split(self) -> str | None:
        """DATASET-SPLIT where the rows are those of a prepared split."""
        if self.shards_dir is None:
            return None
        manifest = read_manifest(self.shards_dir)
        return f"{manifest.dataset}-{manifest.split}"

    def without(self, reason_of: Mapping[int, str]) -> EvalSet:
        """The same set, by its digest too, but for some rows (position -> reason), which join the rejected ones."""
        if not reason_of:
            return self
        kept = [position for position in range(len(self.rows)) if position not in reason_of]
        return replace(
            self,
            rows=tuple(self.rows[position] for position in kept),
            images=tuple(self.images[position] for position in kept),
            positions=tuple(self.positions[position] for position in kept) if self.positions else (),
            rejected=(*self.rejected, *undecodable(self, reason_of)),
            notes=(*self.notes, f"images that could not be decoded: {len(reason_of)}"),
        )

    def read_image(self, position: int) -> bytes:
        """The bytes of one image file. Raises InputError, naming the row by its key; PassingError for a fault of the
        disk."""
        try:
            return read_image(self.images[position])
        except ImageRejected as problem:
            message = f"{self.name}: {self.rows[position].key}: {problem}"
            if problem.may_pass:
                raise PassingError(f"{message}; when it can be, the same command goes on") from None
            raise InputError(f"{message}; put the image back or take its row out") from None


def undecodable(data: EvalData, reason_of: Mapping[int, str]) -> list[dict[str, str]]:
    """Lines of the ledger. reason_of: position -> why its image could not be decoded."""
    return [
        {"key": data.rows[position].key, "field": "image", "reason": reason} for position, reason in reason_of.items()
    ]


def write_rejected(path: Path, rejected: Iterable[Mapping[str, str]]) -> None:
    """A line of JSON for each row and image of a data set that cannot be used."""
    lines = [json.dumps(dict(row), ensure_ascii=False) for row in rejected]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def read_data(config: EvalDataConfig) -> EvalSet:
    """Reads all rows, and no image. Raises InputError where no row is left to evaluate on."""
    salt, is_random = salt_of_environment(), False
    if salt is None:
        salt, is_random = secrets.token_hex(16), True

    def hash_patient(patient: str) -> str:
        return hash_group(config.name, patient, salt)

    tally = Tally(config.name)
    builder = _Builder(config)
    for found in read_items(config, hash_patient, tally):
        builder.add(found)
    notes = [f"{what}: {num}" for what, num in (*tally.counts.items(), *builder.counts.items())]
    shards = config.source.path if isinstance(config.source, ShardsData) else None
    if is_random and shards is None and any(row.patient is not None for row in builder.rows):
        notes.append("patients' hashes are of this run alone: DERMVLP_SALT is not set")
    return builder.finish(notes, shards)


class _Builder:
    def __init__(self, config: EvalDataConfig) -> None:
        self.config = config
        self.rows: list[Row] = []
        self.items: list[Item] = []
        self.rejected: list[Rejection] = []
        self.counts: Counter[str] = Counter()
        self._strange: Counter[str] = Counter()  # labels that are no class
        self._spelling: dict[str, str] = {}  # of labels, where the description has no classnames
        self._classes = {fold(name): name for name in config.classnames}
        self._labels = {fold(raw): name for raw, name in config.labels.items()}
        self._purposes = {fold(value): purpose for value, purpose in config.splits.items()}
        self._seen: dict[str, list[tuple[int, Row]]] = {}  # by image: where its rows stand, and they but for texts

    def add(self, found: Item | Rejection) -> None:
        if isinstance(found, Rejection):
            self.rejected.append(found)
            return
        purpose = self._purpose(found)
        label: str | None = None
        if purpose != "leave_out" and found.label is not None:
            try:
                label = self._class_of(found.label)
            except LookupError:
                self._strange[found.label] += 1
                self.rejected.append(Rejection(found.table, found.row, "label", "its label is none of the classes"))
                return
            if label is None:
                purpose = "leave_out"
        if purpose == "leave_out":
            self.counts[f"rows {_LEFT_OUT}"] += 1
            return
        self._keep(found, self._row(found, label, purpose == "train"))

    def _purpose(self, item: Item) -> str:
        if item.split is None:
            return "test"
        purpose = self._purposes.get(fold(item.split))
        if purpose is None:
            raise InputError(
                f"{item.table}: row {item.row}: its split is none of {', '.join(self.config.splits)}; add it to splits "
                "as test, train or leave_out"
            )
        return purpose

    def _class_of(self, raw: str) -> str | None:
        """None for a label whose rows are left out. Raises LookupError for one that is no class."""
        if self.config.labels_are == "positions":
            try:
                number = float(raw)  # pandas writes 3.0
            except ValueError:
                raise LookupError from None
            if number not in range(len(self.config.classnames)):
                raise LookupError
            return self.config.classnames[int(number)]
        folded = fold(raw)
        if folded in self._labels:
            return self._labels[folded]
        if self._classes:
            return self._classes[folded]
        return self._spelling.setdefault(folded, raw)

    def _row(self, item: Item, label: str | None, is_train: bool) -> Row:
        concepts = item.concepts
        if concepts is None and item.concept_names:
            concepts = dict.fromkeys(item.concept_names, True)
        return Row(
            key=item.key or f"{self.config.name}-{item.row:09d}",
            label=label,
            texts=item.texts,
            patient=item.patient,
            attributes=item.attributes,
            concepts=concepts,
            diagnosis_path=item.diagnosis_path,
            question=item.question,
            licence=item.licence or self.config.licence,
            is_train=is_train,
        )

    def _keep(self, item: Item, row: Row) -> None:
        """Rows that differ in their captions alone are captions of one image; all others stay rows."""
        if row.texts and row.question is None:
            same = replace(row, key="", texts=())
            alike = self._seen.setdefault(item.image.name, [])
            for position, other in alike:
                if other == same:
                    before = self.rows[position]
                    self.rows[position] = replace(before, texts=tuple(dict.fromkeys((*before.texts, *row.texts))))
                    self.counts["rows with further captions of an image, joined with its first row"] += 1
                    return
            alike.append((len(self.rows), same))
        self.rows.append(row)
        self.items.append(item)

    def finish(self, notes: Sequence[str], shards: Path | None) -> EvalSet:
        config, rows = self.config, self.rows
        if not any(not row.is_train for row in rows):
            raise InputError(self._nothing_left())
        if config.unnamed_concepts == "absent":
            rows = _with_absent_concepts(rows, self.items)
        rows = _with_images_as_patients(rows, self.items)
        labelled = {row.label for row in rows if row.label is not None}
        classnames = config.classnames or tuple(sorted(labelled))
        classnames = classnames if labelled else ()
        notes = [*notes, *self._label_notes(classnames)]
        return EvalSet(
            name=config.name,
            rows=tuple(rows),
            classnames=classnames,
            digest=_digest(classnames, rows, self.items),
            rejected=tuple(
                {"table": each.table, "row": str(each.row), "field": each.field, "reason": each.reason}
                for each in self.rejected
            ),
            images=tuple(item.image for item in self.items),
            notes=tuple(notes),
            templates=config.templates,
            shards_dir=shards,
            positions=() if shards is None else tuple(item.row - 1 for item in self.items),
        )

    def _label_notes(self, classnames: Sequence[str]) -> list[str]:
        notes = []
        tested = [row for row in self.rows if not row.is_train]
        present_labels = {row.label for row in tested}
        if self._strange:
            num = sum(self._strange.values())
            # their number alone: notes are published, and a column that was taken for labels may hold names
            notes.append(f"labels that are none of the classes: {len(self._strange)} different ones, in {num} rows")
        if classnames and (num := sum(row.label is None for row in tested)):
            notes.append(f"rows without a label: {num}")
        if classnames and all(name.replace(".", "").isdigit() for name in classnames):
            notes.append("classes are numbers, and prompts made of them mean nothing: give classnames")
        if missing := [name for name in classnames if name not in present_labels]:
            notes.append(
                f"{len(missing)} of {len(classnames)} classes have no row: {', '.join(missing[:_MAX_NAMED])}"
                + (f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else "")
            )
        return notes

    def _nothing_left(self) -> str:
        reasons = Counter(f"{each.field}: {each.reason}" for each in self.rejected)
        reasons.update(self.counts)
        if self.rows:
            reasons["for training alone (splits)"] += len(self.rows)
        listed = "; ".join(f"{reason} ({num} rows)" for reason, num in reasons.most_common(_MAX_NAMED))
        strange = f"; the labels are {_named(self._strange.most_common())}" if self._strange else ""
        hint = ""
        if any("image path" in reason or "no such image" in reason for reason in reasons):
            hint = "; source.images_by=name finds a table's images by their file names, below source.image_dir"
        return f"{self.config.name}: no row to evaluate on: {listed or 'the source is empty'}{strange}{hint}"


def _named(counts: Iterable[tuple[str, int]]) -> str:
    """Few values with their numbers; of many, their number alone: they may be names of people."""
    counts = list(counts)
    if len(counts) > 2 * _MAX_NAMED:
        return f"{len(counts)} different ones, in {sum(num for _, num in counts)} rows"
    return ", ".join(f"{value[:60]!r} ({num})" for value, num in counts)


def _with_images_as_patients(rows: Sequence[Row], items: Sequence[Item]) -> list[Row]:
    """Rows of one image (several questions) are not independent, also where its patient is not known."""
    num_rows = Counter(item.image.name for item in items)
    number = {name: n for n, name in enumerate(num_rows)}
    return [
        replace(row, patient=f"image-{number[item.image.name]:06d}")
        if row.patient is None and num_rows[item.image.name] > 1
        else row
        for row, item in zip(rows, items, strict=True)
    ]


def _with_absent_concepts(rows: Sequence[Row], items: Sequence[Item]) -> list[Row]:
    vocabulary = sorted({name for item in items for name in item.concept_names})
    made: dict[tuple[str, ...], dict[str, bool]] = {}  # many rows share theirs
    found = []
    for row, item in zip(rows, items, strict=True):
        if names := item.concept_names:
            concepts = made.setdefault(names, {name: name in names for name in vocabulary})
            row = replace(row, concepts=concepts)
        found.append(row)
    return found


def _digest(classnames: Sequence[str], rows: Iterable[Row], items: Iterable[Item]) -> str:
    """Patients' hashes are not in it: their salt can be another one."""
    digest = hashlib.sha256(json.dumps(list(classnames)).encode())
    for row, item in zip(rows, items, strict=True):
        question = None if row.question is None else vars(row.question)
        told = vars(row) | {"patient": None, "question": question, "num_bytes": item.image.num_bytes}
        digest.update(json.dumps(told, sort_keys=True).encode())
    return digest.hexdigest()[:16]
