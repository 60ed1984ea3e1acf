"""Copies: every pair that comparing all with all finds, and no explosion where many images look alike."""

from __future__ import annotations

import base64
import re
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_prep.images import duplicates
from data_prep.images.duplicates import clusters, exact_copies, near_pairs
from data_prep.pages.copies_page import CopyPair, write_page

Hashes = NDArray[np.uint64]


def flipped(hashes_N4: Hashes, num_bits: int, rng: np.random.Generator) -> Hashes:
    """Each hash with so many of its bits changed."""
    bits = np.unpackbits(hashes_N4.view(np.uint8), axis=1)
    for row in bits:
        row[rng.choice(256, num_bits, replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


def random_hashes(num: int, rng: np.random.Generator) -> Hashes:
    return rng.integers(0, 2**64, (num, 4), dtype=np.uint64)


def family(num: int, most_bits: int, rng: np.random.Generator) -> Hashes:
    """Around a few centres, 0 to most_bits away from them, as distances of real copies are."""
    centres = random_hashes(max(1, num // 8), rng)
    rows = [flipped(centres[rng.integers(len(centres), size=1)], rng.integers(most_bits + 1), rng) for _ in range(num)]
    return np.concatenate(rows)


def brute_force(hashes_N4: Hashes, max_distance: int, others_M4: Hashes | None = None) -> set[tuple[int, int, int]]:
    others = hashes_N4 if others_M4 is None else others_M4
    distance = np.bitwise_count(hashes_N4[:, None] ^ others[None]).sum(axis=-1)
    i, j = np.nonzero(distance <= max_distance)
    return {(int(a), int(b), int(distance[a, b])) for a, b in zip(i, j, strict=True) if others_M4 is not None or a < b}


def as_set(pairs: duplicates.Pairs) -> set[tuple[int, int, int]]:
    triples = list(zip(*(array.tolist() for array in pairs), strict=True))
    assert triples == sorted(triples) and len(set(triples)) == len(triples)
    assert [array.dtype for array in pairs] == [np.int64, np.int64, np.uint8]
    return set(triples)


@pytest.fixture(params=["one bucket", "many buckets", "small blocks"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers, whatever the buckets and blocks."""
    if request.param != "one bucket":
        monkeypatch.setattr(duplicates, "_BUCKET_SIZE", 20)
    if request.param == "small blocks":
        monkeypatch.setattr(duplicates, "_MAX_COMPARISONS", 1000)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("max_distance", [0, 1, 7, 16, 31])
def test_complete_within(max_distance: int) -> None:
    rng = np.random.default_rng(max_distance)
    hashes = np.unique(np.concatenate([family(600, 20, rng), random_hashes(300, rng)]), axis=0)
    hashes = hashes[rng.permutation(len(hashes))]
    expected = brute_force(hashes, max_distance)
    assert len(expected) > 100 or max_distance < 7
    assert as_set(near_pairs(hashes, max_distance)) == expected


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("max_distance", [0, 7, 16, 31])
def test_complete_across(max_distance: int) -> None:
    rng = np.random.default_rng(max_distance)
    rows = np.unique(family(900, 20, rng), axis=0)
    rows = rows[rng.permutation(len(rows))]
    others = np.concatenate([rows[500:], rows[:5], random_hashes(50, rng)])
    expected = brute_force(rows[:500], max_distance, others)
    assert len(expected) >= 5
    assert as_set(near_pairs(rows[:500], max_distance, others)) == expected


def test_the_limit_is_inclusive() -> None:
    rng = np.random.default_rng(0)
    one = random_hashes(1, rng)
    for num_bits in (0, 15, 16, 17):
        first, second, distance = near_pairs(np.concatenate([one, flipped(one, num_bits, rng)]), 16)
        assert distance.tolist() == ([num_bits] if num_bits <= 16 else [])
        assert (first.tolist(), second.tolist()) == (([0], [1]) if num_bits <= 16 else ([], []))


def test_equal_hashes_are_a_star_around_the_first() -> None:
    rng = np.random.default_rng(0)
    a, b = random_hashes(1, rng), random_hashes(1, rng)
    near_a = flipped(a, 3, rng)
    hashes = np.concatenate([b, a, near_a, a, near_a, b, a])
    assert as_set(near_pairs(hashes, 16)) == {(0, 5, 0), (1, 3, 0), (1, 6, 0), (2, 4, 0), (1, 2, 3)}
    others = np.concatenate([flipped(a, 9, rng), a, a, random_hashes(1, rng)])
    pairs = as_set(near_pairs(hashes, 16, others))
    from_first = brute_force(hashes[[1, 2]], 16, others[:2])
    assert {(i, j, d) for i, j, d in pairs if i in (1, 2)} == {(i + 1, j, d) for i, j, d in from_first}
    assert {(i, j, d) for i, j, d in pairs if i not in (1, 2)} == {(3, 1, 0), (4, 1, 3), (6, 1, 0)}


@pytest.mark.parametrize("num", [0, 1])
def test_nothing_to_compare(num: int) -> None:
    hashes = random_hashes(num, np.random.default_rng(0))
    assert as_set(near_pairs(hashes, 16)) == set()
    assert as_set(near_pairs(hashes, 16, hashes)) == {(i, i, 0) for i in range(num)}
    assert as_set(near_pairs(hashes, 16, hashes[:0])) == set()
    assert len(exact_copies(np.zeros((num, 32), np.uint8))) == num
    assert len(clusters(num, np.zeros(0, np.int64), np.zeros(0, np.int64))) == num


@pytest.mark.parametrize("bucket_size", [20, 1000])
def test_beyond_the_limit_clusters_and_leaks_are_the_same(bucket_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BUCKET_SIZE", bucket_size)
    monkeypatch.setattr(duplicates, "_MAX_COMPARISONS", 3000)
    rng = np.random.default_rng(3)
    hashes = np.concatenate([family(300, 6, rng), flipped(np.repeat(random_hashes(2, rng), 200, axis=0), 5, rng)])
    hashes = hashes[rng.permutation(len(hashes))]
    everything = brute_force(hashes, 12)
    whole = near_pairs(hashes, 12)
    others = hashes[rng.choice(len(hashes), 150, replace=False)] ^ np.uint64(1)
    across = near_pairs(hashes, 12, others)
    assert len(whole[0]) > 10_000 and len(across[0]) > 4_000
    for limit in (0, 50, 3000):
        monkeypatch.setattr(duplicates, "_MAX_PAIRS", limit)
        fewer = near_pairs(hashes, 12)
        assert as_set(fewer) <= everything
        assert len(fewer[0]) < len(whole[0]) / 2
        np.testing.assert_array_equal(clusters(len(hashes), *fewer[:2]), clusters(len(hashes), *whole[:2]))
        fewer = near_pairs(hashes, 12, others)
        assert as_set(fewer) <= as_set(across)
        assert set(fewer[0].tolist()) == set(across[0].tolist())


def test_a_hundred_thousand_copies_cost_nothing() -> None:
    rng = np.random.default_rng(0)
    hashes = np.concatenate([np.repeat(random_hashes(1, rng), 100_000, axis=0), random_hashes(1000, rng)])
    start = time.perf_counter()
    first, _, distance = near_pairs(hashes, 16)
    assert time.perf_counter() - start < 5
    assert (len(first), first.max(), distance.max()) == (99_999, 0, 0)
    assert len(near_pairs(hashes, 16, hashes[:50_000])[0]) == 100_000


def test_exact_copies() -> None:
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 256, (50, 32), dtype=np.uint8)
    digests[1] = digests[0]
    digests[1, 31] ^= 1  # differs in the last byte alone
    chosen = np.concatenate([np.arange(50), rng.integers(0, 50, 500)])
    first = exact_copies(digests[chosen])
    assert first.dtype == np.int64
    np.testing.assert_array_equal(first, [chosen.tolist().index(number) for number in chosen])


def test_clusters_are_chains_of_pairs() -> None:
    assert clusters(7, np.array([5, 1, 2]), np.array([1, 3, 6])).tolist() == [0, 1, 2, 1, 3, 1, 2]


def test_the_page_of_pairs(tmp_path: Path) -> None:
    def pair(label: str, distance: int | None) -> CopyPair:
        return CopyPair(b"\xff\xd8first", b"\xff\xd8second", label, "HAM #7", distance, "dropped from train")

    path = tmp_path / "copies.html"
    pairs = [pair("set-000000001", None), pair("<script>alert(1)</script>", 12)]
    write_page(path, pairs, title="Copies & leakage", max_distance=16, counts={"near pairs": 12_345})
    page = path.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["copies.html"]
    for jpeg in (b"\xff\xd8first", b"\xff\xd8second"):
        assert page.count(f'src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"') == 2
    assert "<script" not in page and "&lt;script&gt;" in page and "Copies &amp; leakage" in page
    assert "equal pixels: dropped from train" in page and "12 bits apart: dropped from train" in page
    assert "12,345" in page and "2 pairs are shown" in page and page.count("HAM #7</figcaption>") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere
