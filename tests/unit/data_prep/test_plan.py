"""Every row's fate: by hand on small sets, and against a slow reference on random ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from data_prep.config import DuplicateOptions
from data_prep.images.scan import FACT_DTYPE
from data_prep.planning.plan import REJECTED, TRAIN, VAL, EvaluationImages, Plan, Why, make_plan, names_of
from data_prep.planning.rows import ROW_DTYPE
from data_prep.planning.splits import remember_splits

Row = tuple[int, int, int, int, int]  # image, caption, group, diagnosis, split


def rows_of(rows: Sequence[Row]) -> NDArray[np.void]:
    array = np.zeros(len(rows), dtype=ROW_DTYPE)
    for field, column in zip(("image", "caption", "group", "diagnosis", "split"), zip(*rows, strict=True), strict=True):
        array[field] = column
    array["row"] = np.arange(1, len(rows) + 1)
    array["digest"] = np.arange(1, len(rows) + 1)
    return array


def facts_of(perceptual: Sequence[int], pixels: Sequence[int] | None = None) -> NDArray[np.void]:
    """Hashes as Python integers of 256 bits; pixels: equal numbers are equal pixels."""
    facts = np.zeros(len(perceptual), dtype=FACT_DTYPE)
    for position, value in enumerate(perceptual):
        facts["perceptual"][position] = [(value >> (64 * word)) % 2**64 for word in range(4)]
        facts["pixels"][position, :4] = np.frombuffer(
            np.uint32((pixels or range(len(perceptual)))[position] + 1).tobytes(), dtype=np.uint8
        )
        facts["name"][position] = position
    return facts


def far(number: int) -> int:
    """A hash far from those of other numbers."""
    random = np.random.default_rng(number)
    return int.from_bytes(random.bytes(32), "little")


def near(value: int, distance: int) -> int:
    return value ^ ((1 << distance) - 1) << 100


def plan(
    rows: Sequence[Row],
    facts: NDArray[np.void],
    *sets: EvaluationImages,
    val_fraction: float = 0.0,
    earlier: NDArray[np.void] | None = None,
    **options: object,
) -> Plan:
    return make_plan(
        rows_of(rows),
        facts,
        sets,
        DuplicateOptions.model_validate({"max_distance": 16, **options}),
        val_fraction,
        earlier,
    )


# ---------------------------------------------------------------------------------------------- copies


def test_one_image_with_several_captions_is_no_duplicate_and_a_repeated_pair_is() -> None:
    facts = facts_of([far(0), far(1), far(0)], pixels=[0, 1, 0])  # image 2 is a copy of image 0 under another name
    rows: list[Row] = [(0, 7, 0, 0, 0), (0, 8, 0, 0, 0), (1, 7, 0, 0, 0), (2, 7, 0, 0, 0), (2, 9, 0, 0, 0)]
    made = plan(rows, facts)
    assert made.fate.tolist() == [TRAIN, TRAIN, TRAIN, REJECTED, TRAIN]
    assert (Why(made.why[3]), made.detail[3]) == (Why.SAME_PAIR, 0)
    assert made.counts["images with the pixels of an earlier one"] == 1


@pytest.mark.parametrize(("distance", "is_copy"), [(16, True), (17, False)])
def test_near_copies_go_where_configured(distance: int, is_copy: bool) -> None:
    facts = facts_of([far(0), near(far(0), distance), far(1)])
    rows: list[Row] = [(0, 1, 0, 0, 0), (1, 2, 0, 0, 0), (0, 3, 0, 0, 0), (1, 4, 0, 0, 0), (2, 5, 0, 0, 0)]
    assert plan(rows, facts).fate.tolist() == [TRAIN] * 5
    dropped = plan(rows, facts, within="drop")
    assert dropped.fate.tolist() == ([TRAIN, REJECTED, TRAIN, REJECTED, TRAIN] if is_copy else [TRAIN] * 5)
    if is_copy:  # all captions of the image that came first stay
        assert [Why(why) for why in dropped.why[[1, 3]]] == [Why.COPY] * 2 and dropped.detail[[1, 3]].tolist() == [0, 0]


def test_dropping_copies_leaves_published_val_alone() -> None:
    facts = facts_of([far(0), near(far(0), 4), near(far(0), 8)])
    rows: list[Row] = [(0, 1, 0, 0, TRAIN), (1, 2, 0, 0, VAL), (2, 3, 0, 0, VAL)]
    assert plan(rows, facts, within="drop", leakage="keep").fate.tolist() == [TRAIN, VAL, REJECTED]
    assert plan(rows, facts, within="drop").fate.tolist() == [REJECTED, VAL, REJECTED]


def test_a_rejected_image_takes_its_rows_and_is_no_copy_of_others() -> None:
    facts = facts_of([0, 0, far(1)], pixels=[0, 0, 1])
    facts["rejected"][0] = True
    made = plan([(0, 1, 0, 0, 0), (1, 1, 0, 0, 0), (2, 2, 0, 0, 0)], facts)
    assert made.fate.tolist() == [REJECTED, TRAIN, TRAIN]
    assert (Why(made.why[0]), made.detail[0]) == (Why.IMAGE, 0)


# ---------------------------------------------------------------------------------------------- leakage


def leaking() -> tuple[list[Row], NDArray[np.void]]:
    """Rows 0-2 are published as val; 3 shares a group, 4 the pixels, 5 a near copy; 6 has nothing to do with them."""
    facts = facts_of([far(0), far(1), far(2), far(3), far(1), near(far(2), 9), far(6)], pixels=[0, 1, 2, 3, 1, 5, 6])
    groups = [50, 0, 0, 50, 0, 0, 60]
    splits = [VAL] * 3 + [TRAIN] * 4
    return [(i, i, groups[i], 0, splits[i]) for i in range(7)], facts


def test_training_rows_that_are_in_published_val_are_dropped_kept_or_refused() -> None:
    rows, facts = leaking()
    made = plan(rows, facts)
    assert made.fate.tolist() == [VAL] * 3 + [REJECTED] * 3 + [TRAIN]
    assert [Why(why) for why in made.why[3:6]] == [Why.VAL_GROUP, Why.VAL_IMAGE, Why.VAL_IMAGE]
    kept = plan(rows, facts, leakage="keep")
    assert kept.fate.tolist() == [VAL] * 3 + [TRAIN] * 4
    (warning,) = kept.warnings
    assert "2 share an image with val, 1 share a group with val" in warning
    refusal = plan(rows, facts, leakage="fail").refusal
    assert refusal is not None and refusal.startswith(
        "leakage: 3 training rows are also in what they would be judged on"
    )
    assert plan(rows, facts).refusal is None


def test_many_images_of_one_hash_all_leak() -> None:
    """Pairs of equal hashes are given as a star; a leak must be found between any two of its points."""
    facts = facts_of([far(0)] * 5 + [far(1)])
    rows: list[Row] = [(i, i, 0, 0, VAL if i == 3 else TRAIN) for i in range(6)]
    assert plan(rows, facts).fate.tolist() == [REJECTED] * 3 + [VAL, REJECTED, TRAIN]


def test_evaluation_sets_take_images_near_copies_and_the_whole_group() -> None:
    rows: list[Row] = [(0, 0, 9, 0, 0), (1, 1, 9, 0, 0), (2, 2, 0, 0, 0), (3, 3, 0, 0, 0), (4, 4, 0, 0, VAL)]
    facts = facts_of([far(i) for i in range(5)])
    first = EvaluationImages("ham", facts["pixels"][:1] + 0, facts["perceptual"][:1] + np.uint64(0))
    close = facts_of([near(far(2), 12), near(far(4), 3), far(77)])
    second = EvaluationImages("pad", close["pixels"], close["perceptual"])
    made = plan(rows, facts, first, second)
    assert made.fate.tolist() == [REJECTED, REJECTED, REJECTED, TRAIN, VAL]  # a published val row may be in it
    assert [(Why(w), d) for w, d in zip(made.why[:3], made.detail[:3], strict=True)] == [
        (Why.EVALUATION_IMAGE, 0),
        (Why.EVALUATION_GROUP, 0),
        (Why.EVALUATION_IMAGE, 1),
    ]
    assert sorted(map(tuple, made.evaluation_pairs.tolist())) == [(0, 0, 0, 0), (1, 0, 2, 12), (1, 1, 4, 3)]


# ---------------------------------------------------------------------------------------------- splits


def random_set(
    seed: int, num: int = 400, published: float = 0.0, num_captions: int = 10**6
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """`published`: share of the rows with a split of their own, some of them val."""
    random = np.random.default_rng(seed)
    num_images = num * 3 // 4
    hashes = [far(1000 * seed + int(i)) for i in random.integers(0, num_images, num_images)]
    hashes = [near(value, int(random.integers(0, 17))) if random.random() < 0.3 else value for value in hashes]
    facts = facts_of(hashes, pixels=[(value ^ value >> 100) % 2**31 for value in hashes])

    def split_of(random: np.random.Generator) -> int:
        return 0 if random.random() >= published else int(random.choice([TRAIN, VAL], p=[0.8, 0.2]))

    group = random.integers(0, num, num) * random.integers(0, 2, num)
    rows = [
        (int(random.integers(num_images)), i % num_captions, int(g), int(d), split_of(random))
        for i, (g, d) in enumerate(zip(group, random.integers(-1, 6, num), strict=True))
    ]
    return rows_of(rows), facts


def leaks(rows: NDArray[np.void], facts: NDArray[np.void], fate: NDArray[np.uint8], max_distance: int) -> int:
    """Pairs of a training and a validation row that share a group or (nearly) an image: every pair looked at."""
    bits = np.unpackbits(facts["perceptual"].view(np.uint8).reshape(len(facts), -1), axis=1)[rows["image"]].astype(int)
    distance = bits @ (1 - bits.T) + (1 - bits) @ bits.T
    same_group = (rows["group"][:, None] == rows["group"][None]) & (rows["group"] != 0)[:, None]
    close = same_group | (distance <= max_distance)
    return int(close[np.ix_(fate == TRAIN, fate == VAL)].sum())


@pytest.mark.parametrize("seed", range(8))
def test_no_pair_of_rows_leaks_from_train_to_val(seed: int) -> None:
    rows, facts = random_set(seed)
    made = make_plan(rows, facts, (), DuplicateOptions(max_distance=16), 0.25)
    assert leaks(rows, facts, made.fate, 16) == 0
    assert made.counts["pairs of near copies"] > 10
    assert 0.1 < (made.fate == VAL).sum() / (made.fate != REJECTED).sum() < 0.4
    shuffled = made.fate.copy()  # the check can fail
    np.random.default_rng(0).shuffle(shuffled)
    assert leaks(rows, facts, shuffled, 16) > 0


@pytest.mark.parametrize("within", ["keep", "drop"])
@pytest.mark.parametrize("seed", range(6))
def test_no_pair_leaks_where_some_rows_have_a_published_split_and_pairs_repeat(seed: int, within: str) -> None:
    rows, facts = random_set(seed, published=0.3, num_captions=7)
    options = DuplicateOptions(max_distance=16, within=within)
    made = make_plan(rows, facts, (), options, 0.25)
    assert leaks(rows, facts, made.fate, 16) == 0
    assert ((made.fate == VAL) & (rows["split"] == 0)).sum() > 10
    assert (made.why == Why.SAME_PAIR).sum() > 3 and (made.fate[rows["split"] == VAL] != TRAIN).all()
    kept = remember_splits(names_of(rows, facts)[made.fate > 0], (made.fate[made.fate > 0] - TRAIN).astype(np.uint8))
    free_train = (made.fate == TRAIN) & (rows["split"] == 0)
    published_more = rows.copy()  # the source now says val of some rows: what was train beside them must not follow
    published_more["split"][(made.fate == VAL) & (rows["split"] == 0)] = VAL
    after = make_plan(published_more, facts, (), options, 0.25, kept)
    assert leaks(rows, facts, after.fate, 16) == 0
    assert (after.fate[free_train] != VAL).all()


def test_the_group_of_a_rejected_row_is_known_to_be_in_val() -> None:
    facts = facts_of([far(0), far(0), far(2), far(3)], pixels=[0, 0, 2, 3])
    # row 1 repeats row 0's pair and shows that patient 22 is in val
    rows: list[Row] = [(0, 5, 21, 0, VAL), (1, 5, 22, 0, VAL), (2, 6, 22, 0, TRAIN), (3, 7, 23, 0, TRAIN)]
    made = plan(rows, facts)
    assert made.fate.tolist() == [VAL, REJECTED, REJECTED, TRAIN]
    assert [Why(why) for why in made.why[1:3]] == [Why.SAME_PAIR, Why.VAL_GROUP]
    # a copy of val's picture in train shows that patient 31 is in val
    rows = [(0, 5, 0, 0, VAL), (1, 6, 31, 0, TRAIN), (2, 7, 31, 0, TRAIN), (3, 8, 32, 0, TRAIN)]
    assert plan(rows, facts).fate.tolist() == [VAL, REJECTED, REJECTED, TRAIN]


def test_a_free_row_repeats_the_published_pair_beside_it() -> None:
    facts = facts_of([far(0), far(0), far(2)], pixels=[0, 0, 2])
    rows: list[Row] = [(0, 5, 0, 0, TRAIN), (1, 5, 0, 0, 0), (2, 6, 0, 0, TRAIN)]
    made = plan(rows, facts)
    assert made.fate.tolist() == [TRAIN, REJECTED, TRAIN] and Why(made.why[1]) == Why.SAME_PAIR


def test_a_rejected_row_links_its_patient_to_the_others() -> None:
    """Row 1 repeats row 0's pair for another patient, whose other picture is row 2: all belong together."""
    for number in range(30):
        facts = facts_of([far(3 * number), far(3 * number), far(3 * number + 1)], pixels=[number, number, number + 500])
        rows: list[Row] = [(0, 7, 101 + number, 0, 0), (1, 7, 301 + number, 0, 0), (2, 8, 301 + number, 0, 0)]
        others: list[Row] = [(3 + i, i, 0, 0, 0) for i in range(6)]
        more = facts_of(
            [far(10_000 + 10 * number + i) for i in range(6)], pixels=[9000 + 10 * number + i for i in range(6)]
        )
        made = plan([*rows, *others], np.concatenate([facts, more]), val_fraction=0.5)
        assert made.fate[1] == REJECTED and made.fate[0] == made.fate[2]


@pytest.mark.parametrize("seed", range(4))
def test_added_rows_leave_the_others_where_they_were(seed: int) -> None:
    rows, facts = random_set(seed, 600)
    first_images = np.unique(rows["image"][:400])
    first = rows[:400][np.isin(rows["image"][:400], first_images)]
    before = make_plan(first, facts, (), DuplicateOptions(max_distance=16), 0.25)
    alive = before.fate != REJECTED
    kept = remember_splits(names_of(first[alive], facts), (before.fate[alive] - TRAIN).astype(np.uint8))
    after = make_plan(rows, facts, (), DuplicateOptions(max_distance=16), 0.25, kept)
    assert leaks(rows, facts, after.fate, 16) == 0
    was_train = before.fate == TRAIN
    assert (after.fate[:400][was_train] != VAL).all()  # nothing moves from train to val
    was_val = before.fate == VAL
    assert was_val.sum() > 20 and (after.fate[:400][was_val] == VAL).sum() > 0


def test_rows_without_a_split_follow_published_ones_that_they_hang_together_with() -> None:
    facts = facts_of([far(i) for i in range(5)])
    rows: list[Row] = [(0, 0, 5, 0, VAL), (1, 1, 5, 0, 0), (2, 2, 6, 0, TRAIN), (3, 3, 6, 0, 0), (4, 4, 0, 0, 0)]
    assert plan(rows, facts).fate.tolist() == [VAL, VAL, TRAIN, TRAIN, TRAIN]
