"""Every task on sets that are small, one-sided or badly named: a whole result, or an InputError; nothing else."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from pretrain.evaluation.config import TASKS
from pretrain.evaluation.interfaces import JOINT, Question, Row, TaskInput
from pretrain.evaluation.results import Metric, TaskResult
from tests.unit.evaluation.stand_in import WIDTH, StandInData, task_input, unit

#: Of classes, concepts, kinds of question and groups alike.
NAMES = (
    "a, b",
    '=cmd|"x"',
    "<script>alert(1)</script>",
    "two\nlines",
    "{}",
    "{0.__class__}",
    "ключ 🦠",
    "key",
    "patient",
)
PLAIN = ("nevus", "melanoma", "eczema")


@dataclass(frozen=True)
class Hostile:
    rows: Sequence[Row]
    classnames: tuple[str, ...]
    image_ND: np.ndarray
    overlap_N: np.ndarray | None = None


def make_rows(num: int, names: Sequence[str]) -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        Row(
            f"k{i}",
            label=names[i % len(names)],
            texts=(f"a text of {names[i % len(names)]}",),
            patient=f"p{i // 2}",
            attributes={"sex": names[i % 3 % len(names)], "fitzpatrick": "III"} if i % 3 else None,
            concepts={name: bool(rng.random() < 0.5) for name in names},
            diagnosis_path=("skin disease", f"kind {i % 2}", names[i % len(names)]),
            question=Question(f"{names[0]} {{}}?", tuple(names[:3]), i % min(3, len(names)), names[i % len(names)]),
        )
        for i in range(num)
    ]


def images(num: int) -> np.ndarray:
    return unit(np.random.default_rng(1).normal(size=(num, WIDTH))).astype(np.float32)


def hostile(num: int, names: tuple[str, ...], change: Callable[[Row, int], Row] = lambda row, _: row) -> Hostile:
    return Hostile([change(row, i) for i, row in enumerate(make_rows(num, names))], names, images(num))


SETS: dict[str, Hostile] = {
    "hostile names": hostile(54, NAMES),
    "all in the training data": replace(hostile(54, NAMES), overlap_N=np.ones(54, dtype=bool)),
    "all but one in the training data": replace(hostile(54, NAMES), overlap_N=np.arange(54) > 0),
    "one class in the training data": replace(hostile(54, NAMES), overlap_N=np.arange(54) % 9 == 0),
    "two rows": hostile(2, PLAIN[:2]),
    "one row a class": hostile(3, PLAIN),
    "one patient": hostile(30, PLAIN, lambda row, _: replace(row, patient="p")),
    "no patient known": hostile(30, PLAIN, lambda row, _: replace(row, patient=None)),
    "all of the training part": hostile(30, PLAIN, lambda row, _: replace(row, is_train=True)),
    "one row left to test": hostile(30, PLAIN, lambda row, i: replace(row, is_train=i > 0)),
    "one class alone": replace(hostile(20, PLAIN[:1] * 2), classnames=PLAIN),
    "classes without rows": replace(hostile(30, PLAIN), classnames=(*PLAIN, *NAMES)),
    "nothing known": hostile(9, PLAIN, lambda row, _: Row(row.key)),
    "equal images": replace(hostile(30, PLAIN), image_ND=np.repeat(images(1), 30, axis=0)),
}


#: by set: the tasks that it has nothing for; every other task gives a result
REFUSED: dict[str, set[str]] = {
    "two rows": {"probe"},
    "one row a class": {"probe"},
    "one patient": {"probe"},
    "all of the training part": set(TASKS),
    "one row left to test": {"retrieval", "concepts"},
    "one class alone": {"retrieval", "probe", "hierarchy"},
    "nothing known": set(TASKS),
}


def given_of(data: Hostile, out_dir: Path) -> TaskInput:
    given = task_input(data.rows, data.image_ND, out_dir, data.overlap_N)
    stand_in = StandInData(data.rows)
    stand_in.classnames = data.classnames
    return replace(given, data=stand_in, features={JOINT: data.image_ND, "tower": data.image_ND}.__getitem__)


def run_or_refuse(name: str, given: TaskInput) -> TaskResult | None:
    module = importlib.import_module(f"pretrain.evaluation.tasks.{name}")
    if module.lacks(given.data) is not None:
        return None
    try:
        return module.run(TASKS[name](), given)
    except InputError as problem:
        assert len(str(problem)) > 20
        return None


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("data", list(SETS))
def test_a_whole_result_or_a_refusal(data: str, task: str, tmp_path: Path) -> None:
    result = run_or_refuse(task, given_of(SETS[data], tmp_path))
    assert (result is None) == (task in REFUSED.get(data, ()))
    if result is None:
        return
    assert TaskResult.model_validate_json(result.model_dump_json()) == result
    for name, metric in (*result.metrics.items(), *result.without_overlap.items(), *result.per_class.items()):
        check_metric(name, metric)
    (table,) = tmp_path.iterdir()
    with table.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file, strict=True)
    assert lines and {len(line) for line in lines} == {len(header)}


def check_metric(name: str, metric: Metric) -> None:
    assert metric.value is None or (metric.n > 0 and np.isfinite(metric.value)), name
    if metric.low is not None:
        assert metric.low - 1e-9 <= metric.value <= metric.high + 1e-9, name  # draws are moved by a rounded mean


@pytest.mark.parametrize("task", list(TASKS))
def test_names_come_back_as_they_were(task: str, tmp_path: Path) -> None:
    result = run_or_refuse(task, given_of(SETS["hostile names"], tmp_path))
    assert result is not None
    (table,) = tmp_path.iterdir()
    with table.open(encoding="utf-8", newline="") as file:
        cells = {cell for line in csv.reader(file, strict=True) for cell in line}
    if task not in ("retrieval", "multiple_choice"):  # whose tables have no names
        assert set(NAMES) <= cells
    if task in ("zero_shot", "concepts", "multiple_choice"):
        assert set(NAMES) <= set(result.per_class)
    assert {name for each in result.by_group for name in each.groups} <= {*NAMES, "III"}


@pytest.mark.parametrize("task", list(TASKS))
def test_undefined_features_are_refused(task: str, tmp_path: Path) -> None:
    """As a diverged training gives them."""
    data = replace(SETS["hostile names"], image_ND=np.full((54, WIDTH), np.nan, dtype=np.float32))
    module = importlib.import_module(f"pretrain.evaluation.tasks.{task}")
    with pytest.raises(InputError, match="not finite"):
        module.run(TASKS[task](), given_of(data, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", list(TASKS))
def test_the_training_part_and_the_order_of_rows_say_nothing(task: str, tmp_path: Path) -> None:
    """Rows in another order give equal values; rows of the training part count in the probe alone."""
    data = SETS["hostile names"]
    order = np.random.default_rng(3).permutation(54)
    turned = replace(data, rows=[data.rows[i] for i in order], image_ND=data.image_ND[order])
    extra = [replace(row, key=f"t{i}", patient=f"t{i}", is_train=True) for i, row in enumerate(data.rows)]
    joined = replace(data, rows=[*extra, *data.rows], image_ND=np.concatenate([data.image_ND[order], data.image_ND]))
    values, results = [], []
    for number, each in enumerate((data, turned, joined)):
        (tmp_path / str(number)).mkdir()
        result = run_or_refuse(task, given_of(each, tmp_path / str(number)))
        assert result is not None
        values.append({name: metric.value for name, metric in result.metrics.items()})
        results.append(result)
    if task == "probe":  # which splits by the order of rows where there is no training part
        assert all(result.metrics[result.primary].n == result.settings["num_test"] for result in results)
        assert results[2].settings["num_train"] == results[2].settings["num_test"] == 54
        assert "own training part" in str(results[2].settings["split"])
    else:
        assert values[1] == pytest.approx(values[0], abs=1e-9) and values[2] == pytest.approx(values[0], abs=1e-9)
