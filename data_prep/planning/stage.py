"""The stage `plan`: reads what the scan found, decides every row's fate, and writes down why.

Writes WORK/{rows,facts,fate,splits}.npy, WORK/plan.json, WORK/rejected.csv and OUT/duplicates.html.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.config import EvaluationSet
from data_prep.errors import InputError
from data_prep.files import atomic, write_atomically
from data_prep.images import scan
from data_prep.images.convert import MISSING
from data_prep.job import Job
from data_prep.labels.coverage import concept_coverage, diagnosis_coverage
from data_prep.planning.copies import write_copies
from data_prep.planning.plan import REJECTED, SPLIT_FATE, TRAIN, EvaluationImages, Plan, Why, make_plan, names_of
from data_prep.planning.rows import RowTable, SourceState, read_rows
from data_prep.planning.splits import remember_splits
from data_prep.progress import Progress
from data_prep.rejected import write_ledger
from data_prep.salt import hash_name
from data_prep.shards.manifest import read_hashes, read_image, read_manifest
from data_prep.sources.base import ImageReference, Rejection
from data_prep.sources.folder import IMAGE_EXTENSIONS, walk_images

log = logging.getLogger(__name__)


@dataclass
class Planned:
    """A finished plan, memory-mapped."""

    rows: NDArray[np.void]  # (N,) ROW_DTYPE
    facts: NDArray[np.void]  # (M,) FACT_DTYPE
    fate: NDArray[np.uint8]  # (N,)
    summary: dict[str, Any]  # counts, warnings, coverage

    def positions(self, split: str) -> NDArray[np.int64]:
        """Of the rows of a split, ascending."""
        return np.flatnonzero(self.fate == SPLIT_FATE[split])

    def of_shard(self, split: str, number: int, size: int) -> tuple[NDArray[np.void], NDArray[np.void]]:
        """The rows of a shard of `size` rows, and the facts of their images."""
        mine = self.positions(split)[number * size : (number + 1) * size]
        return self.rows[mine], self.facts[self.rows["image"][mine]]


def load(job: Job) -> Planned:
    """Raises InputError where there is no plan, or one made under other settings."""
    try:
        summary = json.loads((job.work_dir / "plan.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise InputError(f"{job.work_dir}: not planned yet; run the stage plan first") from None
    if summary["settings"] != job.plan_settings:
        raise InputError(f"{job.work_dir}: planned under other settings; run the stage plan again")
    rows, facts, fate = (
        np.load(job.work_dir / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("rows", "facts", "fate")
    )
    return Planned(rows, facts, fate, summary)


def plan_stage(job: Job, *, accept_changes: bool) -> None:
    """Raises InputError where images are not scanned yet, the source changed, or there is leakage that must not be."""
    _ = job.tools  # an ontology or a prompt that cannot be used is refused before the old plan goes
    state = SourceState(job.work_dir)
    with Progress("planning", unit="rows") as progress:
        table = read_rows(job.source, job.config.name, job.salt, progress.advance)
    if not accept_changes:
        state.check_rows(table, job.source_settings)
    facts, reasons = scan.load(job.scan_dir, table.images, job.config)
    lost = _lost_images(job, facts, reasons)
    if lost and not accept_changes:
        raise InputError(
            f"{job.config.name}: {lost} images that were read before cannot be read now; is their folder away? Bring "
            "them back, or run with --accept-changes to leave their rows out"
        )
    sets = [_evaluation_images(job, each) for each in job.config.duplicates.against]
    evaluation_sets = [images for images, _ in sets]
    plan = make_plan(
        table.rows,
        facts,
        evaluation_sets,
        job.config.duplicates,
        job.config.val_fraction,
        _read_splits(job.work_dir),
        lambda name: log.info("planning: %s", name),
    )
    if lost:
        plan.warnings.append(f"{lost} images that were read before cannot be read now: their rows are left out")
    plan.warnings += [warning for _, warning in sets if warning is not None]
    for warning in plan.warnings:
        log.warning("%s: %s", job.config.name, warning)
    if plan.refusal is not None:
        write_copies(job, table, facts, plan, evaluation_sets)
        raise InputError(f"{plan.refusal}; the pairs of images are in {job.out_dir / 'duplicates.html'}")
    (job.work_dir / "plan.json").unlink(missing_ok=True)  # until all files are those of one plan
    state.save(table, job.source_settings)
    _write(job, table, facts, plan, reasons, evaluation_sets)


def _lost_images(job: Job, facts: NDArray[np.void], reasons: dict[int, str]) -> int:
    """How many images the last plan had, and this scan could not find or read, whatever chunks they were in."""
    try:
        before = np.load(job.work_dir / "facts.npy", mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError):
        return 0
    away = [position for position, reason in reasons.items() if reason == MISSING or "cannot be read" in reason]
    read_before = before["name"][~before["rejected"]]
    return int(np.isin(facts["name"][away], read_before).sum())


def _write(
    job: Job,
    table: RowTable,
    facts: NDArray[np.void],
    plan: Plan,
    reasons: dict[int, str],
    evaluation_sets: list[EvaluationImages],
) -> None:
    names = [each.name for each in evaluation_sets]
    num_rejected = write_ledger(
        job.work_dir / "rejected.csv", _in_order([*table.rejected, *_rejections(table, plan, reasons, names)])
    )
    for name, array in (("facts", facts), ("fate", plan.fate)):
        with atomic(job.work_dir / f"{name}.npy") as file:
            np.save(file, array, allow_pickle=False)
    _write_splits(job.work_dir, table.rows, facts, plan.fate)
    tools = job.tools
    summary = {
        "settings": job.plan_settings,
        "num_rows": len(table.rows) + len(table.rejected),
        "num_rejected": num_rejected,
        "counts": plan.counts,
        "warnings": plan.warnings,
        "diagnoses": None
        if tools.ontology is None
        else diagnosis_coverage(table.diagnoses, tools.ontology, job.config.ontology_min_similarity),
        "concepts": None if tools.concepts is None else concept_coverage(table.concepts, tools.concepts),
    }
    write_copies(job, table, facts, plan, evaluation_sets)
    write_atomically(job.work_dir / "plan.json", json.dumps(summary, indent=1).encode())


def _in_order(rejections: list[Rejection]) -> list[Rejection]:
    return sorted(rejections, key=lambda rejection: (rejection.table, rejection.row))


def _rejections(
    table: RowTable, plan: Plan, reasons: dict[int, str], evaluation_sets: list[str]
) -> Iterator[Rejection]:
    for position in np.flatnonzero(plan.why != Why.KEPT):
        why, detail = Why(plan.why[position]), int(plan.detail[position])

        def other(row: int = detail) -> str:
            return f"row {table.rows['row'][row]} of {table.tables[table.rows['table'][row]]}"

        match why:
            case Why.IMAGE:
                reason = reasons[detail]
            case Why.SAME_PAIR:
                reason = f"repeated pair: the image and the text of {other()}"
            case Why.COPY:
                reason = f"copy of an image: that of {other()}"
            case Why.VAL_GROUP:
                reason = "leakage: its group is also in val"
            case Why.VAL_IMAGE:
                reason = "leakage: its image, or a near copy, is also in val"
            case Why.EVALUATION_IMAGE:
                reason = f"leakage: its image, or a near copy, is in the evaluation set {evaluation_sets[detail]}"
            case Why.EVALUATION_GROUP:
                reason = f"leakage: an image of its group is in the evaluation set {evaluation_sets[detail]}"
            case Why.KEPT:
                continue
        row = table.rows[position]
        field = {Why.SAME_PAIR: "(row)", Why.VAL_GROUP: "group", Why.EVALUATION_GROUP: "group"}.get(why, "image")
        yield Rejection(table.tables[row["table"]], int(row["row"]), field, reason)


# ---------------------------------------------------------------------------------------------- splits, kept


def _read_splits(work_dir: Path) -> NDArray[np.void] | None:
    """(E,) SPLIT_DTYPE of earlier plans."""
    path = work_dir / "splits.npy"
    return np.load(path, allow_pickle=False) if path.is_file() else None


def _write_splits(work_dir: Path, rows: NDArray[np.void], facts: NDArray[np.void], fate: NDArray[np.uint8]) -> None:
    if not (alive := fate != REJECTED).any():
        return
    names, sides = names_of(rows[alive], facts), (fate[alive] - TRAIN).astype(np.uint8)
    kept = remember_splits(names, sides, _read_splits(work_dir))
    with atomic(work_dir / "splits.npy") as file:
        np.save(file, kept, allow_pickle=False)


# ---------------------------------------------------------------------------------------------- evaluation sets


def evaluation_images(each: EvaluationSet) -> tuple[list[ImageReference], int] | None:
    """The images to scan, and how many files are left aside (no images by their endings, links to folders, ...).

    None for a split made by `prepare`, which has its hashes with it. Raises InputError for a folder without images.
    """
    if not each.path.is_dir():
        raise InputError(f"duplicates.against: {each.name}: {each.path}: no such folder")
    if (each.path / "manifest.json").is_file():
        return None
    skipped: Counter[str] = Counter()
    images, num_unusable = [], 0
    for parts, reason in walk_images(each.path, skipped):
        if reason is None:
            images.append(ImageReference("/".join(parts), each.path.joinpath(*parts)))
        else:
            num_unusable += 1
    if not images:
        endings = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise InputError(f"duplicates.against: {each.name}: {each.path}: no image here ({endings})")
    return images, num_unusable + skipped["links to folders"]


def _evaluation_images(job: Job, each: EvaluationSet) -> tuple[EvaluationImages, str | None]:
    """The set, and a warning where some of it cannot be compared with."""
    found = evaluation_images(each)
    if found is None:
        hashes, manifest = read_hashes(each.path), read_manifest(each.path)
        index = np.load(each.path / "index.npy", mmap_mode="r", allow_pickle=False)

        def read_split(image: int) -> bytes:
            return read_image(each.path, manifest, index[image])

        return EvaluationImages(each.name, hashes["pixels"], _words(hashes), read_split), None
    images, num_skipped = found
    names = np.array([hash_name(image.name, job.salt) for image in images], dtype=np.uint64)
    facts, reasons = scan.load(job.against_dir(each), names, job.config)
    facts = facts[~facts["rejected"]]

    def read_scanned(image: int) -> bytes:
        return scan.read_jpeg(job.against_dir(each), facts[image])

    warning = None
    if reasons or num_skipped:
        warning = (
            f"evaluation set {each.name}: {len(reasons)} images that cannot be read and {num_skipped} other files or "
            "links to folders were not compared"
        )
    return EvaluationImages(each.name, facts["pixels"], _words(facts), read_scanned), warning


def _words(hashes: NDArray[np.void]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(hashes["perceptual"])
