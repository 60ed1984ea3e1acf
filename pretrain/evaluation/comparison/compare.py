"""Several models on the same evaluation sets: their values, differences with p-values, and ranks over the sets.

Shapes: N rows of one set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from data_prep.errors import InputError
from data_prep.schema import Frozen
from pretrain.evaluation.comparison.paired_rows import PairedRows, read_rows, read_trained_on
from pretrain.evaluation.config import TASKS
from pretrain.evaluation.metrics.significance import holm, paired_difference, rank_models
from pretrain.evaluation.metrics.statistics import Ints, group_codes
from pretrain.evaluation.results import (
    DatasetInfo,
    EvaluationResult,
    Metric,
    ModelInfo,
    Number,
    TaskResult,
    read_result,
)

#: settings of tasks that make another question of it
_OF_THE_QUESTION = (
    *("templates", "template_texts", "text_of_an_option", "ks"),
    *("layer", "split", "num_train", "num_seeds", "max_iterations"),
    *("prompts", "reference_prompts", "scale", "terms", "terms_digest", "min_images", "ontology", "ontology_digest"),
)


class ComparedModel(Frozen):
    label: str  # its name; with a part of its digest where two have the same
    info: ModelInfo


class Entry(Frozen):
    """One model on one set."""

    model: str  # a label
    dataset: str  # a name; one name is one set in a comparison
    result: EvaluationResult  # with all its metrics, curves and groups


class PValues(Frozen):
    """Two-sided, of "the two models are equally good on these patients"."""

    bootstrap: Number  # resampled patients on the other side of 0; None where the difference is undefined
    permutation: Number  # the two models' outputs swapped, patient by patient
    holm: Number  # the permutation's, corrected for all differences of this task (Holm, 1979)
    is_exact: bool  # all swaps were tried, not a random part


class Difference(Frozen):
    """Second minus first model on the rows that both have; in the metric's own unit."""

    dataset: str
    task: str
    metric: str
    first: str
    second: str
    value: Metric  # lower_is_better as the metric's own
    p: PValues
    num_patients: int  # independent units: patients, or rows where no patient is known
    #: over the rows that neither model was trained on; None where there is none that one was, or it is undefined
    without_overlap: Metric | None = None
    p_without_overlap: PValues | None = None  # holm: over all pairs, of those without such rows the p above

    @property
    def better(self) -> str | None:
        """The better model's label, None at 0 or where undefined. Says nothing of how sure that is."""
        if not self.value.value:
            return None
        return self.second if (self.value.value > 0) != self.value.lower_is_better else self.first


class Ranks(Frozen):
    """Ranks from 1 (best) over the sets that all models have (Demsar, 2006)."""

    task: str
    metrics: dict[str, str]  # set -> the metric that its ranks are of
    ranks: dict[str, dict[str, float]]  # model -> set -> rank; equal values share their mean rank
    mean_rank: dict[str, float]  # best first
    friedman_p: Number  # of "all models are equal"; None for two models, or where scipy has no answer
    critical_difference: Number  # Nemenyi, 5 %: mean ranks further apart than this differ
    not_different: tuple[tuple[str, ...], ...]  # largest runs of models within the critical difference: diagram's bars


class Comparison(Frozen):
    models: tuple[ComparedModel, ...]
    datasets: tuple[DatasetInfo, ...]
    entries: tuple[Entry, ...]
    differences: tuple[Difference, ...]
    ranks: tuple[Ranks, ...]  # of tasks that all models did on two sets or more
    confidence: float
    notes: tuple[str, ...] = ()  # what was left out and why, plain sentences


def compare(
    folders: Sequence[Path], *, num_resamples: int = 1000, num_permutations: int = 2000, seed: int = 0
) -> Comparison:
    """Compare the folders of `dermvlp evaluate`, each one model on one set.

    Differences are of each task's primary metric, between all pairs of models on a set, over the rows that both tables
    hold; where a model was trained on some of them, also over the others (not of retrieval, where what is left out
    would be no candidate any more). Ranks are over the sets that all models did a task on, where there are two or more.

    folders: or the evaluation.json in them. Raises InputError for fewer than two models, two sets with one name, a
    model twice on a set, no set that two models share, intervals of different confidence, or a table that does not
    belong to its evaluation.json.
    """
    results = {path.parent if path.is_file() else path: read_result(path) for path in folders}
    models, labels = _models(results)
    datasets = _datasets(results)
    if len({result.confidence for result in results.values()}) > 1:
        raise InputError("the evaluations have intervals of different confidence; evaluate again with one")
    entries = tuple(
        Entry(model=labels[folder], dataset=result.dataset.name, result=result) for folder, result in results.items()
    )
    folder_of = {(entry.model, entry.dataset): folder for entry, folder in zip(entries, results, strict=True)}
    if len(folder_of) < len(entries):
        raise InputError("one model is there twice on one set; name each evaluation once")
    if len({entry.dataset for entry in entries}) == len(entries):
        raise InputError(f"no two models were evaluated on the same set: {_listed(entries)}; evaluate them on one")
    tests = _Tests(num_resamples, num_permutations, next(iter(results.values())).confidence, seed)
    notes: list[str] = []
    differences: list[Difference] = []
    ranks: list[Ranks] = []
    for task in _tasks(entries):
        found = []
        for data in datasets:
            found += _differences(task, [e for e in entries if e.dataset == data.name], folder_of, tests, notes)
        differences += _corrected(found)
        ranked = _ranks(task, entries, [model.label for model in models], notes)
        ranks += [ranked] if ranked is not None else []
    return Comparison(
        models=models,
        datasets=datasets,
        entries=entries,
        differences=tuple(differences),
        ranks=tuple(ranks),
        confidence=tests.confidence,
        notes=tuple(dict.fromkeys(notes)),
    )


@dataclass(frozen=True)
class _Tests:
    num_resamples: int
    num_permutations: int
    confidence: float
    seed: int


@dataclass(frozen=True)
class _OneModel:
    """One task of one model on one set."""

    entry: Entry
    result: TaskResult
    rows: PairedRows
    trained_on: frozenset[str] | None  # keys of images; None: not named


# ---------------------------------------------------------------------------------------------- what is compared


def _models(results: Mapping[Path, EvaluationResult]) -> tuple[tuple[ComparedModel, ...], dict[Path, str]]:
    """The models in the order of their first folder, and each folder's label."""
    infos = {(result.model.name, result.model.digest): result.model for result in results.values()}
    if len(infos) < 2:
        raise InputError("a comparison needs evaluations of two models or more")
    names = Counter(name for name, _ in infos)
    label_of = {key: key[0] if names[key[0]] == 1 else f"{key[0]} ({key[1][:6]})" for key in infos}
    models = tuple(ComparedModel(label=label_of[key], info=info) for key, info in infos.items())
    return models, {path: label_of[result.model.name, result.model.digest] for path, result in results.items()}


def _datasets(results: Mapping[Path, EvaluationResult]) -> tuple[DatasetInfo, ...]:
    """Raises InputError where one name stands for two sets: their rows, labels or texts differ."""
    first: dict[str, tuple[Path, DatasetInfo]] = {}
    for folder, result in results.items():
        data = result.dataset
        path, known = first.setdefault(data.name, (folder, data))
        if known.digest != data.digest:
            raise InputError(
                f"{path} and {folder} were evaluated on different sets called {data.name!r}: {known.num_images} images "
                f"with digest {known.digest}, {data.num_images} with {data.digest}. Evaluate both on the same data"
            )
    return tuple(data for _, data in first.values())


def _tasks(entries: Sequence[Entry]) -> list[str]:
    """In the order of the report."""
    done = {task.task for entry in entries for task in entry.result.tasks}
    return [name for name in TASKS if name in done]


def _listed(entries: Sequence[Entry]) -> str:
    return ", ".join(f"{entry.model} on {entry.dataset}" for entry in entries)


# ---------------------------------------------------------------------------------------------- differences


def _differences(
    task: str,
    entries: Sequence[Entry],
    folder_of: Mapping[tuple[str, str], Path],
    tests: _Tests,
    notes: list[str],
) -> list[Difference]:
    """Of all pairs of models on one set; what cannot be compared is noted."""
    done: list[_OneModel] = []
    for entry in entries:
        result = entry.result.task(task)
        if result is None:
            continue
        folder = folder_of[entry.model, entry.dataset]
        rows = read_rows(folder, result)
        if rows is None:
            notes.append(f"{task}: the tables do not hold what {result.primary} needs; no paired differences.")
            return []
        done.append(_OneModel(entry, result, rows, read_trained_on(folder, entry.result)))
    found = []
    for first, second in combinations(done, 2):
        where = f"{task} on {first.entry.dataset}: {first.entry.model} and {second.entry.model}"
        if first.result.primary != second.result.primary or first.rows.what != second.rows.what:
            notes.append(f"{where} have different classes, seeds or primary metrics; no paired difference.")
            continue
        if differing := _differing_settings(first.result, second.result):
            notes.append(f"{where} have different {', '.join(differing)}; no paired difference.")
            continue
        found.append(_difference(where, first, second, tests, notes))
    return found


def _differing_settings(mine: TaskResult, theirs: TaskResult) -> list[str]:
    """What makes two values answers to different questions."""
    return [name for name in _OF_THE_QUESTION if mine.settings.get(name) != theirs.settings.get(name)]


def _difference(where: str, first: _OneModel, second: _OneModel, tests: _Tests, notes: list[str]) -> Difference:
    mine, theirs = _common(where, first.rows, second.rows)
    if num_alone := len(first.rows.keys) + len(second.rows.keys) - 2 * len(mine):
        notes.append(f"{where}: {num_alone} rows that only one of them has are not compared.")
    of = first.result
    value, p, num_patients = _test(of, (first.rows, mine), (second.rows, theirs), tests)
    found = Difference(
        dataset=first.entry.dataset,
        task=of.task,
        metric=of.primary,
        first=first.entry.model,
        second=second.entry.model,
        value=value,
        p=p,
        num_patients=num_patients,
    )
    rest = _without_overlap(where, first, second, notes)
    if rest is None:
        return found
    value, p, _ = _test(of, *rest, tests)
    return found.model_copy(update={"without_overlap": value, "p_without_overlap": p})


def _without_overlap(
    where: str, first: _OneModel, second: _OneModel, notes: list[str]
) -> tuple[tuple[PairedRows, Ints], tuple[PairedRows, Ints]] | None:
    """Both tables without the images that either model was trained on, with the rows that both have. None where there
    are no such images; where there are and no difference can be had without them, a note says so."""
    if first.trained_on is None or second.trained_on is None:
        notes.append(
            f"{where}: an evaluation does not name the images that its model was trained on; evaluate again for the "
            "difference without them."
        )
        return None
    trained_on = first.trained_on | second.trained_on
    num = len(trained_on & {key[-1] for rows in (first.rows, second.rows) for key in rows.keys})
    if num == 0:
        return None
    if first.result.task == "retrieval":
        notes.append(
            f"{where}: {num} of the images were trained on; no difference without them, since there would be other "
            "candidates to choose from."
        )
        return None
    mine, theirs = first.rows.without(trained_on), second.rows.without(trained_on)
    if mine is None or theirs is None:
        notes.append(f"{where}: undefined without the {num} images that were trained on.")
        return None
    if unknown := [model.entry.model for model in (first, second) if model.entry.result.leakage is None]:
        notes.append(
            f"{where}: {' and '.join(unknown)} was not compared with its training data, so the difference without the "
            "images that were trained on leaves out the other's alone."
        )
    try:
        my_rows, their_rows = _common(where, mine, theirs)
    except InputError as error:
        notes.append(f"{error} (without the images that were trained on).")
        return None
    return (mine, my_rows), (theirs, their_rows)


def _common(where: str, mine: PairedRows, theirs: PairedRows) -> tuple[Ints, Ints]:
    """Where in each table the rows stand that both have. Raises InputError for none, and for other labels."""
    position = {key: row for row, key in enumerate(theirs.keys)}
    my_rows = np.array([row for row, key in enumerate(mine.keys) if key in position], dtype=np.int64)
    if len(my_rows) == 0:
        raise InputError(f"{where} have no row in common, though their sets are the same; evaluate both again")
    their_rows = np.array([position[mine.keys[row]] for row in my_rows])
    if (mine.truth[my_rows] != theirs.truth[their_rows]).any():
        raise InputError(f"{where} have different labels, though their sets are the same; evaluate both again")
    return my_rows, their_rows


def _test(
    of: TaskResult, first: tuple[PairedRows, Ints], second: tuple[PairedRows, Ints], tests: _Tests
) -> tuple[Metric, PValues, int]:
    """The difference on these rows of the two tables, not yet corrected, and the number of patients."""
    (mine, my_rows), (theirs, their_rows) = first, second
    patients, strata_N = [mine.patients[row] for row in my_rows], mine.strata_N[my_rows]
    tested = paired_difference(
        mine.statistic,
        mine.comparable(my_rows),
        theirs.comparable(their_rows),
        [mine.truth[my_rows]],
        groups=patients,
        strata=strata_N,
        num_resamples=tests.num_resamples,
        num_permutations=tests.num_permutations,
        confidence=tests.confidence,
        seed=tests.seed,
    )
    metric = of.metrics[of.primary]
    value = Metric.of(tested.estimate, is_share=metric.is_share, lower_is_better=metric.lower_is_better)
    p = PValues(bootstrap=tested.p_bootstrap, permutation=tested.p_permutation, holm=None, is_exact=tested.is_exact)
    patient_N = group_codes(patients)
    if mine.is_score and min(len(np.unique(patient_N[strata_N == kind])) for kind in (0, 1)) < 2:
        # as in the task itself: an AUROC with one patient of a kind, who is in every resample
        value = value.model_copy(update={"low": None, "high": None})
        p = p.model_copy(update={"bootstrap": None})
    return value, p, tested.num_groups


def _corrected(differences: Sequence[Difference]) -> list[Difference]:
    with_all = _holm([given.p for given in differences])
    rest = _holm([given.p_without_overlap or given.p for given in differences])
    return [
        given.model_copy(update={"p": p, "p_without_overlap": p_rest if given.p_without_overlap else None})
        for given, p, p_rest in zip(differences, with_all, rest, strict=True)
    ]


def _holm(tested: Sequence[PValues]) -> list[PValues]:
    known = [number for number, p in enumerate(tested) if p.permutation is not None]
    adjusted = dict(zip(known, holm([float(tested[n].permutation or 0) for n in known]), strict=True))
    return [p.model_copy(update={"holm": adjusted.get(number)}) for number, p in enumerate(tested)]


# ---------------------------------------------------------------------------------------------- ranks


def _ranks(task: str, entries: Sequence[Entry], labels: Sequence[str], notes: list[str]) -> Ranks | None:
    """Over the sets on which all models have one primary metric with a value; None where those are fewer than two."""
    results = {(entry.dataset, entry.model): entry.result.task(task) for entry in entries}
    columns: dict[str, tuple[str, list[Metric]]] = {}
    for dataset in dict.fromkeys(entry.dataset for entry in entries):
        done = [result for label in labels if (result := results.get((dataset, label))) is not None]
        primaries = {result.primary for result in done}
        metrics = [result.metrics[result.primary] for result in done]
        is_one_question = len(primaries) == 1 and not any(_differing_settings(done[0], other) for other in done[1:])
        if len(done) == len(labels) and is_one_question and all(metric.value is not None for metric in metrics):
            columns[dataset] = (primaries.pop(), metrics)
        elif done:
            notes.append(f"{task}: {dataset} is not among the ranks: not every model has a value by the same settings.")
    if len(columns) < 2:
        return None
    values_MS = np.array([[float(metric.value or 0) for metric in metrics] for _, metrics in columns.values()]).T
    table = rank_models(values_MS, [metrics[0].lower_is_better for _, metrics in columns.values()])
    order = np.argsort(table.mean_rank_M, kind="stable").tolist()
    return Ranks(
        task=task,
        metrics={dataset: metric for dataset, (metric, _) in columns.items()},
        ranks={
            label: dict(zip(columns, ranks, strict=True))
            for label, ranks in zip(labels, table.ranks_MS.tolist(), strict=True)
        },
        mean_rank={labels[model]: float(table.mean_rank_M[model]) for model in order},
        friedman_p=table.friedman_p,
        critical_difference=table.critical_difference,
        not_different=tuple(tuple(labels[model] for model in run) for run in table.not_different),
    )
