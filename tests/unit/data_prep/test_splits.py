"""Splits: nothing on two sides, every diagnosis near its share, and nothing ever moves from train to val."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from data_prep.planning.splits import SPLIT_DTYPE, TRAIN, UNKNOWN, VAL, assign_splits, remember_splits
from data_prep.schema import text_hash

Ints = NDArray[np.int64]
Names = NDArray[np.uint64]


class Table:
    """Random rows with a patient (0 = none) and an image; components are those of the graph of both."""

    def __init__(self, rng: np.random.Generator, num_rows: int, num_diagnoses: int = 8) -> None:
        self.patient = rng.integers(0, max(2, num_rows), num_rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self.patient[rng.random(num_rows) < 0.3] = 0
        self.image = (rng.integers(1, max(2, 2 * num_rows), num_rows) * 2 + 1).astype(np.uint64) * np.uint64(
            0xD1342543DE82EF95
        )
        self.stratum = rng.geometric(0.4, num_rows).clip(max=num_diagnoses) - 2  # -1 is the commonest

    def __getitem__(self, rows: Ints | NDArray[np.bool_]) -> Table:
        part = object.__new__(Table)
        part.patient, part.image, part.stratum = self.patient[rows], self.image[rows], self.stratum[rows]
        return part

    @property
    def names(self) -> Names:
        return np.stack([self.patient, self.image], axis=1)

    @property
    def components(self) -> Ints:
        num = len(self.image)
        _, image = np.unique(self.image, return_inverse=True)
        _, patient = np.unique(self.patient, return_inverse=True)
        has = np.flatnonzero(self.patient)
        ends = np.concatenate([image, num + patient[has]]), np.concatenate([np.arange(num), has])
        graph = coo_matrix((np.ones(len(ends[0])), (ends[1] + 2 * num, ends[0])), shape=(3 * num, 3 * num))
        return connected_components(graph, directed=False)[1][2 * num :].astype(np.int64)

    def split(self, val_fraction: float, earlier: NDArray[np.void] | None = None) -> NDArray[np.uint8]:
        return assign_splits(self.components, self.stratum, self.names, val_fraction, earlier)


@pytest.mark.parametrize("seed", range(40))
def test_no_patient_and_no_image_is_on_both_sides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = Table(rng, int(rng.integers(1, 400)))
    split = table.split(float(rng.uniform(0, 0.6)))
    for key in (table.patient[table.patient != 0], table.image):
        side = split if len(key) == len(split) else split[table.patient != 0]
        assert not np.intersect1d(key[side == TRAIN], key[side == VAL]).size


@pytest.mark.parametrize("seed", range(40))
def test_order_of_rows_and_numbering_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = Table(rng, 200)
    split = table.split(0.2)
    order = rng.permutation(200)
    codes = np.concatenate([rng.permutation(20), [UNKNOWN]])
    shuffled = table[order]
    shuffled_split = assign_splits(
        rng.permutation(300)[shuffled.components] * 7 - 50, codes[shuffled.stratum], shuffled.names, 0.2
    )
    assert np.array_equal(shuffled_split, split[order])


@pytest.mark.parametrize("seed", range(20))
def test_codes_of_equally_rare_diagnoses_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    component, stratum = np.repeat(np.arange(60), 4), rng.permutation(np.repeat(np.arange(20), 12))
    names = np.arange(1, 241, dtype=np.uint64)
    split = assign_splits(component, stratum, names, 0.2)
    assert np.array_equal(assign_splits(component, rng.permutation(20)[stratum], names, 0.2), split)


def test_large_components_are_not_preferred() -> None:
    """The first name of a component of many names is small, which must not bring it forward."""
    sizes = np.tile([1, 19], 1000)
    component = np.repeat(np.arange(2000), sizes)
    names = np.arange(1, len(component) + 1, dtype=np.uint64)
    split = assign_splits(component, np.zeros(len(component), dtype=np.int64), names, 0.2)
    assert split[np.repeat(sizes, sizes) == 19].mean() == pytest.approx(0.2, abs=0.01)
    assert split[np.repeat(sizes, sizes) == 1].mean() == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("seed", range(60))
def test_rows_added_removed_and_merged_never_move_from_train_to_val(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = Table(rng, 500)
    earlier: NDArray[np.void] | None = None
    seen_in_train: set[int] = set()
    for _ in range(5):
        now = table[np.sort(rng.choice(500, int(rng.integers(50, 500)), replace=False))]
        component = now.components
        split = now.split(0.2, earlier)
        for number in np.unique(component):
            rows = component == number
            sides = set(split[rows].tolist())
            assert len(sides) == 1
            names = set(now.names[rows].ravel().tolist()) - {0}
            if earlier is None:
                continue
            known = earlier["split"][np.isin(earlier["name"], np.array(sorted(names), dtype=np.uint64))]
            if (known == TRAIN).any():
                assert sides == {TRAIN}
            elif len(known):
                assert sides == {VAL}
        val_names = set(now.names[split == VAL].ravel().tolist()) - {0}
        assert not val_names & seen_in_train
        seen_in_train |= set(now.names[split == TRAIN].ravel().tolist()) - {0}
        earlier = remember_splits(now.names, split, earlier)
        assert earlier.dtype == SPLIT_DTYPE
        assert np.all(np.diff(earlier["name"].astype(object)) > 0)


def singles(strata: list[int]) -> tuple[Ints, Ints, Names]:
    num = len(strata)
    return np.arange(num), np.array(strata), np.arange(1, num + 1, dtype=np.uint64)


def test_train_wins_where_a_row_joins_two_sides() -> None:
    earlier = np.array([(1, TRAIN), (2, VAL), (3, VAL)], dtype=SPLIT_DTYPE)
    names = np.array([[1, 0], [2, 0], [1, 2], [3, 0]], dtype=np.uint64)
    split = assign_splits(np.array([0, 0, 0, 1]), np.zeros(4, dtype=np.int64), names, 0.5, earlier)
    assert split.tolist() == [TRAIN, TRAIN, TRAIN, VAL]
    remembered = remember_splits(names, split, earlier)
    assert remembered.tolist() == [(1, TRAIN), (2, TRAIN), (3, VAL)]


def test_added_rows_fill_val_up_from_new_components_only() -> None:
    component, stratum, name = singles([0] * 100)
    split = assign_splits(component, stratum, name, 0.1)
    assert split.sum() == 10
    earlier = remember_splits(name, split)
    component, stratum, name = singles([0] * 200)
    grown = assign_splits(component, stratum, name, 0.1, earlier)
    assert np.array_equal(grown[:100], split)
    assert grown[100:].sum() == 10


def test_most_decisions_stay_without_an_earlier_split() -> None:
    component, stratum, name = singles([0] * 1000)
    before = assign_splits(component, stratum, name, 0.2)
    component, stratum, name = singles([0] * 1010)
    assert (assign_splits(component, stratum, name, 0.2)[:1000] != before).sum() <= 10


@pytest.mark.parametrize(
    ("num_rows", "val_fraction", "num_val"),
    [(20, 0.1, 2), (5, 0.1, 1), (2, 0.3, 1), (2, 0.9, 1), (10, 0.0, 0), (1, 0.4, 0)],
)
def test_rare_diagnoses(num_rows: int, val_fraction: float, num_val: int) -> None:
    """With two components or more and half a row due: at least one in val, and one in train."""
    split = assign_splits(*singles([7] * num_rows + [3] * 1000), val_fraction)
    assert split[:num_rows].sum() == num_val


def test_a_rare_diagnosis_of_large_components_has_its_smallest_in_val() -> None:
    component = np.repeat([0, 1, 2], [8, 6, 9])
    names = (component + 1).astype(np.uint64)
    split = assign_splits(component, np.zeros(23, dtype=np.int64), names, 0.1)
    assert np.array_equal(split == VAL, component == 1)


def test_very_rare_diagnoses_share_a_quota() -> None:
    """400 diagnoses of three rows each: none is due half a row in val, all of them are due 120."""
    split = assign_splits(*singles(sorted(list(range(400)) * 3)), 0.1)
    assert split.sum() == 120


def test_a_diagnosis_of_one_component_stays_in_train_while_others_can_fill_val() -> None:
    component = np.concatenate([np.zeros(30, dtype=np.int64), np.arange(1, 301)])
    stratum = np.repeat([5, 6], [30, 300])
    split = assign_splits(component, stratum, (component + 1).astype(np.uint64), 0.1)
    assert split[:30].sum() == 0
    assert split[30:].sum() == 30
    # where every diagnosis is of one component, val would be empty
    assert assign_splits(*singles(list(range(1000))), 0.1).sum() == 100


def test_a_component_of_several_diagnoses_counts_for_all_of_them() -> None:
    """Patients with one rare and nine common rows: the common diagnosis has its share from them alone."""
    component = np.repeat(np.arange(100), 10)
    stratum = np.tile([1] + [0] * 9, 100)
    component = np.concatenate([component, np.arange(100, 600)])
    stratum = np.concatenate([stratum, np.zeros(500, dtype=np.int64)])
    split = assign_splits(component, stratum, (component + 1).astype(np.uint64), 0.2)
    assert split[stratum == 1].sum() == 20
    assert split[stratum == 0].sum() == 280


@pytest.mark.parametrize("seed", range(20))
def test_each_diagnosis_is_within_half_its_largest_component(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.geometric(0.3, 300)
    diagnosis = rng.geometric(0.3, 300).clip(max=6)
    component, stratum = np.repeat(np.arange(300), sizes), np.repeat(diagnosis, sizes)
    split = assign_splits(component, stratum, (component + 1).astype(np.uint64), 0.15)
    for code in np.unique(diagnosis):
        target = 0.15 * (stratum == code).sum()
        smallest, largest = sizes[diagnosis == code].min(), sizes[diagnosis == code].max()
        assert abs(split[stratum == code].sum() - target) <= max(largest / 2, smallest - target)


def test_no_rows() -> None:
    empty = np.zeros(0, dtype=np.int64)
    assert assign_splits(empty, empty, empty.astype(np.uint64), 0.1).tolist() == []


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
@pytest.mark.parametrize("val_fraction", [0.05, 0.1, 0.2])
def test_real_lesions_and_patients(val_fraction: float) -> None:
    path = Path(os.environ["DERMVLP_DATA"]) / "derm-images" / "metadata.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    groups = [row["group_id"] for row in rows]
    _, component = np.unique(groups, return_inverse=True)
    labels, stratum = np.unique([row["label"] for row in rows], return_inverse=True)
    names = np.array([text_hash(group) for group in groups], dtype=np.uint64)
    split = assign_splits(component, stratum, names, val_fraction)
    assert not {g for g, s in zip(groups, split, strict=True) if s} & {
        g for g, s in zip(groups, split, strict=True) if not s
    }
    for code in range(len(labels)):
        error = split[stratum == code].sum() - val_fraction * (stratum == code).sum()
        assert abs(error) <= 1.0, (labels[code], error)


def test_a_million_rows_in_seconds() -> None:
    rng = np.random.default_rng(0)
    num = 1_000_000
    component = rng.integers(0, 400_000, num)
    stratum = rng.geometric(0.02, num).clip(max=2000) - 2
    names = (component + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    start_s = time.perf_counter()
    split = assign_splits(component, stratum, names, 0.1)
    again = assign_splits(component, stratum, names, 0.1, remember_splits(names, split))
    assert time.perf_counter() - start_s < 30
    assert np.array_equal(split, again)
    assert abs(split.mean() - 0.1) < 0.001
