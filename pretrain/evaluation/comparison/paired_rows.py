"""The tables of rows of an evaluation as a paired test needs them: one output a row, and the statistic of all rows.

Shapes: N rows of the table, K concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from data_prep.errors import InputError
from pretrain.evaluation.metrics.statistics import Floats, Ints, accuracy, balanced_accuracy, weighted_f1
from pretrain.evaluation.results import TABLES, TRAINED_ON_NAME, EvaluationResult, TaskResult
from pretrain.evaluation.tables import read_table

_OF_DECISIONS = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "weighted_f1": weighted_f1}


@dataclass(frozen=True)
class PairedRows:
    """`statistic(truth, output)` is the task's primary metric; `truth` is the same for every model."""

    keys: Sequence[tuple[str, ...]]  # N, distinct; the last part is the image's
    patients: Sequence[str | None]  # N
    truth: NDArray[np.int64]  # (N,) class, or direction; (N, K) for concepts
    output: NDArray[Any]  # (N,) or (N, K)
    statistic: Callable[..., float]  # of the truth and comparable outputs
    what: tuple[str, ...]  # names behind the codes of `truth`, such as the classes: equal, or not to be compared
    strata_N: NDArray[np.int64]  # how many rows of each are kept when rows are resampled
    is_score: bool = False  # the output is a model's own score: only its order can be compared
    min_images: int | None = None  # of concepts: one with fewer images of either kind is not in the mean

    def comparable(self, rows: Ints) -> NDArray[Any]:
        """Outputs of some rows in a unit that all models share: as they are, or their ranks among these rows, doubled
        since ties have halves."""
        output = self.output[rows]
        return (2 * rankdata(output, axis=0)).astype(np.int64) if self.is_score else output

    def without(self, image_keys: Collection[str]) -> PairedRows | None:
        """The rows of other images; None where they leave the statistic undefined."""
        kept = np.array([row for row, key in enumerate(self.keys) if key[-1] not in image_keys], dtype=np.int64)
        truth, strata_N = self.truth[kept], self.strata_N[kept]
        if self.min_images is not None:
            scarcer_K = _num_scarcer(truth)
            in_mean_K = scarcer_K >= self.min_images
            truth = np.where(in_mean_K, truth, -1)  # as the task's own numbers without the overlap
            annotated = (truth >= 0).any(axis=1)
            kept, truth = kept[annotated], truth[annotated]
            strata_N = truth[:, np.where(in_mean_K, scarcer_K, len(self.keys)).argmin()]
        if len(kept) == 0:
            return None
        left = replace(
            self,
            keys=[self.keys[row] for row in kept],
            patients=[self.patients[row] for row in kept],
            truth=truth,
            output=self.output[kept],
            strata_N=strata_N,
        )
        with np.errstate(invalid="ignore"):  # AUROC of one class alone
            value = left.statistic(left.truth, left.comparable(np.arange(len(kept))))
        return None if np.isnan(value) else left


def read_rows(folder: Path, result: TaskResult) -> PairedRows | None:
    """Of one task of an evaluation's folder; None where its table does not hold what the primary metric needs.

    Raises InputError for a table that is missing, damaged, holds a row twice, or is not that of `result`: what it gives
    is computed again, and compared with the value in evaluation.json.
    """
    reader = _READERS.get(result.task)
    found = None if reader is None else reader(folder, result)
    if found is None:
        return None
    path, rows = found
    if len(set(rows.keys)) < len(rows.keys):
        raise InputError(f"{path}: a row is there twice; evaluate again")
    stated = result.metrics[result.primary].value
    computed = rows.statistic(rows.truth, rows.comparable(np.arange(len(rows.keys))))
    if stated is None:
        return None
    if abs(stated - computed) > 1e-6:
        raise InputError(
            f"{path}: gives {result.primary} {computed:.6f}, evaluation.json beside it says {stated}; evaluate again"
        )
    return rows


def read_trained_on(folder: Path, result: EvaluationResult) -> frozenset[str] | None:
    """Keys of the rows tested on whose image the model was trained on, as far as it was compared; None where an
    earlier version of dermvlp counted them and did not name them. Raises InputError for a table of other rows."""
    if result.leakage is None or result.leakage.num_overlap == 0:
        return frozenset()
    path = folder / TRAINED_ON_NAME
    if not path.is_file():
        return None
    _, rows = read_table(path, ("key",), may_be_empty=True)
    if len(rows) != result.leakage.num_overlap:
        raise InputError(
            f"{path}: names {len(rows)} rows, evaluation.json beside it counts {result.leakage.num_overlap}; "
            "evaluate again"
        )
    return frozenset(row[0] for row in rows)


def _zero_shot(folder: Path, result: TaskResult) -> tuple[Path, PairedRows] | None:
    path = folder / TABLES["zero_shot"]
    header, rows = read_table(path, ("key", "patient", "label", "predicted"))
    classnames = tuple(header[4:])
    label_N, predicted_N = _codes(path, rows, 2, classnames), _codes(path, rows, 3, classnames)
    if result.primary in _OF_DECISIONS:
        output_N: NDArray[Any] = predicted_N
        statistic: Callable[..., float] = _OF_DECISIONS[result.primary]
    elif result.primary == "auroc" and len(classnames) == 2:
        first_N, second_N = _floats(path, rows, 4), _floats(path, rows, 5)
        with np.errstate(divide="ignore"):  # not of the probability itself: it saturates at 1
            output_N = np.log(second_N) - np.log(first_N)
        statistic = _auroc_of_ranks
    else:
        return None
    return path, PairedRows(
        _keys(rows, 0),
        _patients(rows, 1),
        label_N,
        output_N,
        statistic,
        classnames,
        label_N,
        is_score=statistic is _auroc_of_ranks,
    )


def _retrieval(folder: Path, result: TaskResult) -> tuple[Path, PairedRows] | None:
    """Of a query, the share of the ks at which it is found. One without a patient is a unit of its own."""
    directions = ("image_to_text", "text_to_image")
    prefix = "image_to_text_recall@"
    ks = [int(name.removeprefix(prefix)) for name in result.metrics if name.startswith(prefix)]
    if result.primary != "mean_recall":
        return None
    path = folder / TABLES["retrieval"]
    _, rows = read_table(path, ("direction", "key", "patient", "rank"))
    rank_N = _floats(path, rows, 3)
    found_N = np.mean([rank_N <= k for k in ks], axis=0)
    direction_N = _codes(path, rows, 0, directions)
    what = (*directions, *map(str, sorted(ks)))
    return path, PairedRows(
        _keys(rows, 0, 1), _patients(rows, 2), direction_N, found_N, _mean_of_kinds, what, direction_N
    )


def _probe(folder: Path, result: TaskResult) -> tuple[Path, PairedRows] | None:
    """Of "METRIC@10%" or "METRIC@4_shots": a mean over seeds, of which one image is a row each."""
    metric, _, amount = result.primary.partition("@")
    if metric not in _OF_DECISIONS:
        return None
    path = folder / TABLES["probe"]
    _, rows = read_table(path, ("share", "seed", "key", "patient", "label", "predicted"))
    rows = [row for row in rows if _amount(path, row[0]) == amount]
    if not rows:
        raise InputError(f"{path}: no row of {amount}, which evaluation.json ranks models by; evaluate again")
    classnames = tuple(sorted({row[4] for row in rows}))
    label_N = _codes(path, rows, 4, classnames)
    # a predicted class that no row has is wrong, whichever it is
    predicted_N = np.array([classnames.index(row[5]) if row[5] in classnames else len(classnames) for row in rows])
    seeds = sorted({row[1] for row in rows})
    seed_N = _codes(path, rows, 1, seeds)

    def mean_over_seeds(truth_N: Ints, output_N: NDArray[Any]) -> float:
        of_seed, label_N = np.divmod(truth_N, len(classnames))
        parts = [of_seed == seed for seed in range(len(seeds))]
        return float(np.mean([_OF_DECISIONS[metric](label_N[part], output_N[part]) for part in parts]))

    return path, PairedRows(
        keys=_keys(rows, 1, 2),
        # an image without a known patient is one unit, not one for each seed
        patients=[row[3] or f"key {row[2]}" for row in rows],
        truth=seed_N * len(classnames) + label_N,
        output=predicted_N,
        statistic=mean_over_seeds,
        what=(*classnames, *seeds),
        strata_N=label_N,  # every image has a row for each seed
    )


def _multiple_choice(folder: Path, result: TaskResult) -> tuple[Path, PairedRows] | None:
    if result.primary != "accuracy":
        return None
    path = folder / TABLES["multiple_choice"]
    _, rows = read_table(path, ("key", "patient", "answer", "predicted"))
    right_N = np.array([row[2] == row[3] for row in rows], dtype=np.float64)
    answer_N, one_stratum = _floats(path, rows, 2).astype(np.int64), np.zeros(len(rows), dtype=np.int64)
    return path, PairedRows(_keys(rows, 0), _patients(rows, 1), answer_N, right_N, _mean, (), one_stratum)


def _concepts(folder: Path, result: TaskResult) -> tuple[Path, PairedRows] | None:
    """Of an image and each concept of the mean, the rank of its score; annotations are kept of the scarcest concept."""
    in_mean = result.settings.get("concepts_in_mean")
    if not isinstance(in_mean, tuple) or not in_mean:
        return None
    path = folder / TABLES["concepts"]
    header, rows = read_table(path, ("key", "patient"))
    num_concepts = (len(header) - 2) // 2
    concepts = header[2 : 2 + num_concepts]
    if header[2 + num_concepts :] != [f"{c}:present" for c in concepts] or not {*in_mean} <= {*concepts}:
        raise InputError(f"{path}: does not say which image shows which concept; evaluate again")
    columns = [2 + concepts.index(str(concept)) for concept in in_mean]
    present_NK = np.stack([_present(path, rows, column + num_concepts) for column in columns], axis=1)
    score_NK = np.stack([_floats(path, rows, column) for column in columns], axis=1)
    return path, PairedRows(
        keys=_keys(rows, 0),
        patients=_patients(rows, 1),
        truth=present_NK,
        output=score_NK,
        statistic=_mean_auroc_of_ranks,
        what=tuple(map(str, in_mean)),
        strata_N=present_NK[:, _num_scarcer(present_NK).argmin()],
        is_score=True,
        min_images=int(str(result.settings.get("min_images", 1))),
    )


def _hierarchy(folder: Path, result: TaskResult) -> tuple[Path, PairedRows] | None:
    path = folder / TABLES["hierarchy"]
    _, rows = read_table(path, ("key", "patient", "label", "predicted", result.primary))
    classnames = tuple(sorted({row[2] for row in rows}))
    label_N, distance_N = _codes(path, rows, 2, classnames), _floats(path, rows, 4)
    return path, PairedRows(_keys(rows, 0), _patients(rows, 1), label_N, distance_N, _mean, classnames, label_N)


_READERS: dict[str, Callable[[Path, TaskResult], tuple[Path, PairedRows] | None]] = {
    "zero_shot": _zero_shot,
    "retrieval": _retrieval,
    "probe": _probe,
    "concepts": _concepts,
    "multiple_choice": _multiple_choice,
    "hierarchy": _hierarchy,
}


def _mean(_truth_N: Ints, output_N: Floats) -> float:
    return float(np.mean(output_N))


def _mean_of_kinds(kind_N: Ints, output_N: Floats) -> float:
    return float(np.mean([output_N[kind_N == kind].mean() for kind in np.unique(kind_N)]))


def _auroc_of_ranks(label_N: Ints, double_rank_N: Ints) -> float:
    """Of class 1 against class 0, without sorting: ranks are small integers, doubled since ties have halves."""
    size = int(double_rank_N.max()) + 1
    negative, positive = (np.bincount(double_rank_N[label_N == code], minlength=size) for code in (0, 1))
    num_below = np.cumsum(negative) - negative / 2  # a tie counts one half
    return float(positive @ num_below / (positive.sum() * negative.sum()))


def _mean_auroc_of_ranks(present_NK: Ints, double_rank_NK: Ints) -> float:
    """Over the concepts that the rows define: some show it, others do not."""
    kept = [
        (present_N >= 0, present_N, rank_N) for present_N, rank_N in zip(present_NK.T, double_rank_NK.T, strict=True)
    ]
    defined = [(present_N[k], rank_N[k]) for k, present_N, rank_N in kept if 0 in present_N and 1 in present_N]
    return float(np.mean([_auroc_of_ranks(present_N, rank_N) for present_N, rank_N in defined]))


def _num_scarcer(present_NK: Ints) -> Ints:
    """(K,): images that show the concept or images that do not, whichever are fewer."""
    fewer: Ints = np.minimum((present_NK == 1).sum(axis=0), (present_NK == 0).sum(axis=0))
    return fewer


def _present(path: Path, rows: Sequence[Sequence[str]], column: int) -> NDArray[np.int64]:
    """1, 0, and -1 for an empty cell: not annotated."""
    return _codes(path, rows, column, ("", "0", "1")) - 1


def _keys(rows: Sequence[Sequence[str]], *columns: int) -> list[tuple[str, ...]]:
    return [tuple(row[column] for column in columns) for row in rows]


def _patients(rows: Sequence[Sequence[str]], column: int) -> list[str | None]:
    return [row[column] or None for row in rows]


def _codes(path: Path, rows: Sequence[Sequence[str]], column: int, names: Sequence[str]) -> NDArray[np.int64]:
    code_of = {name: code for code, name in enumerate(names)}
    for number, row in enumerate(rows, start=1):
        if row[column] not in code_of:
            raise InputError(f"{path}: row {number}: {row[column]!r} is none of {', '.join(names)}; evaluate again")
    return np.array([code_of[row[column]] for row in rows])


def _amount(path: Path, cell: str) -> str:
    """As metrics are named: "0.3" -> "30%", "4 shots" -> "4_shots"."""
    if cell.endswith(" shots"):
        return cell.replace(" ", "_")
    try:
        return f"{100 * float(cell):g}%"
    except ValueError:
        raise InputError(f"{path}: share {cell!r} is no number; evaluate again") from None


def _floats(path: Path, rows: Sequence[Sequence[str]], column: int) -> NDArray[np.float64]:
    try:
        return np.array([float(row[column]) for row in rows])
    except ValueError as error:
        raise InputError(f"{path}: column {column + 1}: {error}; evaluate again") from None
