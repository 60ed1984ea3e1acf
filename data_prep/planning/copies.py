"""Shows what the plan took for copies: OUT/duplicates.html, pairs of images side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.images import scan
from data_prep.job import Job
from data_prep.pages.copies_page import CopyPair, write_page
from data_prep.planning.plan import REJECTED, SPLITS, EvaluationImages, Plan, Why
from data_prep.planning.rows import RowTable

#: Of each sort, evenly over the distances: enough to judge the threshold by.
_MAX_SHOWN = 100
_OUTCOMES = {
    Why.COPY: "left out: a copy",
    Why.SAME_PAIR: "left out: the same pair",
    Why.VAL_IMAGE: "left out of train: in val",
    Why.VAL_GROUP: "left out of train: its group is in val",
    Why.EVALUATION_IMAGE: "left out of train: in an evaluation set",
    Why.EVALUATION_GROUP: "left out of train: its group is in an evaluation set",
}


def write_copies(
    job: Job, table: RowTable, facts: NDArray[np.void], plan: Plan, evaluation_sets: Sequence[EvaluationImages]
) -> None:
    """No page where there are no copies."""
    first_row = np.full(len(facts), -1, dtype=np.int64)
    first_row[table.rows["image"][::-1]] = np.arange(len(table.rows))[::-1]

    def label(image: int) -> str:
        row = table.rows[first_row[image]]
        return f"row {int(row['row'])} of {table.tables[row['table']]}"

    def outcome(image: int) -> str:
        position = first_row[image]
        if plan.fate[position] != REJECTED:
            return f"kept, in {SPLITS[int(plan.fate[position])]}"
        return _OUTCOMES.get(Why(plan.why[position]), "left out")

    pairs = []
    for which, theirs, ours, distance in _spread(plan.evaluation_pairs, plan.evaluation_pairs[:, 3]):
        judged = evaluation_sets[which]
        jpegs = scan.read_jpeg(job.scan_dir, facts[ours]), judged.read_jpeg(theirs)
        pairs.append(CopyPair(*jpegs, label(ours), f"{judged.name} #{theirs + 1}", distance, outcome(ours)))
    within = np.stack([plan.pairs.first, plan.pairs.second, plan.pairs.distance.astype(np.int64)], axis=1)
    for first, second, distance in _spread(within, within[:, 2]):
        exact = bool((facts["pixels"][first] == facts["pixels"][second]).all())
        jpegs = scan.read_jpeg(job.scan_dir, facts[first]), scan.read_jpeg(job.scan_dir, facts[second])
        pairs.append(CopyPair(*jpegs, label(first), label(second), None if exact else distance, outcome(second)))
    path = job.out_dir / "duplicates.html"
    if pairs:
        max_distance = job.config.duplicates.max_distance
        write_page(path, pairs, title=job.config.name, max_distance=max_distance, counts=plan.counts)
    else:
        path.unlink(missing_ok=True)


def _spread(rows: NDArray[np.int64], distance: NDArray[np.int64]) -> list[list[int]]:
    """At most `_MAX_SHOWN` of the rows, the farthest pairs first: they are the doubtful ones."""
    order = np.argsort(-distance, kind="stable")
    if len(order) > _MAX_SHOWN:
        order = order[np.linspace(0, len(order) - 1, _MAX_SHOWN).astype(np.int64)]
    chosen: list[list[int]] = rows[order].tolist()
    return chosen
