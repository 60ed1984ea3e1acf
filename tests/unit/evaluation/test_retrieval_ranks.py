"""Ranks against all similarities in float64, with ties, duplicates, near ties, and pairs of many to many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from pretrain.evaluation.methods import retrieval_ranks as search
from pretrain.evaluation.methods.retrieval_ranks import retrieval_ranks


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def brute_force(images: np.ndarray, texts: np.ndarray, pairs: np.ndarray) -> tuple[list[int], list[int]]:
    """The definition, query by query, on the whole matrix in float64."""
    similarity = images.astype(np.float64) @ texts.astype(np.float64).T

    def ranks(queries: np.ndarray, own: list[set[int]]) -> list[int]:
        found = []
        for values, right in zip(queries, own, strict=True):
            best = max((values[item] for item in right), default=None)
            wrong = [value for item, value in enumerate(values) if item not in right]
            found.append(-1 if best is None else sum(value >= best - 1e-9 for value in wrong))
        return found

    texts_of = [{int(u) for n, u in pairs if n == image} for image in range(len(images))]
    images_of = [{int(n) for n, u in pairs if u == text} for text in range(len(texts))]
    return ranks(similarity, texts_of), ranks(similarity.T, images_of)


def some_pairs(num_images: int, num_texts: int, seed: int) -> np.ndarray:
    """0 to 3 texts an image, so 0 to several images a text; some pairs twice."""
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(num_images), rng.integers(0, 4, size=num_images))
    return np.stack([image, rng.integers(num_texts, size=len(image))], axis=1)


def features(kind: str, num_images: int, num_texts: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    images, texts = unit(rng.normal(size=(num_images, width))), unit(rng.normal(size=(num_texts, width)))
    if kind == "duplicates":
        images, texts = images[rng.integers(9, size=num_images)], texts[rng.integers(7, size=num_texts)]
    elif kind == "collapsed":
        images[:], texts[:] = images[0], images[0]
    elif kind == "nearly collapsed":  # differences that float32 cannot see, on both sides of the tolerance
        images = unit(images[:1] + 2e-8 * images)
        texts = unit(texts[:1] + 2e-8 * texts)
    elif kind == "bfloat16":  # 8 bits: many exact ties, and norms that are not quite 1
        images, texts = (np.round(part * 128) / 128 for part in (images, texts))
        images, texts = (part / np.linalg.norm(part, axis=1).mean() for part in (images, texts))
    return images, texts


@pytest.mark.parametrize("kind", ["random", "duplicates", "collapsed", "nearly collapsed", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_ranks_equal_brute_force(kind: str, dtype: type) -> None:
    images, texts = (part.astype(dtype) for part in features(kind, 130, 90, 64))
    pairs = some_pairs(130, 90, seed=2)
    expected_image, expected_text = brute_force(images, texts, pairs)
    for chunk_size in (17, 64, 1000):
        image_rank, text_rank = retrieval_ranks(images, texts, pairs, chunk_size=chunk_size)
        assert image_rank.tolist() == expected_image
        assert text_rank.tolist() == expected_text
    assert -1 in expected_image and len(set(expected_image)) > 2  # queries, no queries, and different ranks


def test_one_text_an_image_is_the_same_in_either_form() -> None:
    images, texts = features("random", 50, 20, 16)
    owner = np.random.default_rng(3).integers(20, size=50)
    as_pairs = np.stack([np.arange(50), owner], axis=1)[::-1]
    for one, other in zip(retrieval_ranks(images, texts, owner), retrieval_ranks(images, texts, as_pairs), strict=True):
        assert one.tolist() == other.tolist()


def test_the_best_of_several_texts_counts_and_the_others_are_not_wrong() -> None:
    images = np.eye(3)
    texts = unit(np.array([[1, 0.2, 0], [1, 0, 0.5], [1, 0.8, 0], [1, 0, 0.9]]))
    # texts of image 0 in the order of similarity: 0, 1, 2, 3
    image_rank, text_rank = retrieval_ranks(images, texts, np.array([[0, 1], [0, 3], [1, 2], [2, 3]]))
    assert image_rank[0] == 1  # text 0 alone stands before text 1; text 3 is its own
    assert text_rank.tolist() == [-1, 0, 1, 0]  # text 3 has two images, and finds image 0 first


def test_float32_errs_and_the_ranks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second look in float64 the ranks are wrong here, so the cases above do test it."""
    images, texts = features("nearly collapsed", 60, 60, 64)
    pairs = np.stack([np.arange(60)] * 2, axis=1)
    expected = brute_force(images, texts, pairs)
    assert tuple(ranks.tolist() for ranks in retrieval_ranks(images, texts, pairs)) == expected
    monkeypatch.setattr(search, "_error_bound", lambda width: 0.0)
    assert tuple(ranks.tolist() for ranks in retrieval_ranks(images, texts, pairs)) != expected


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_doubtful_pairs_one_by_one_or_the_whole_tile_again(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_MAX_DOUBTFUL", share)
    for kind in ("random", "duplicates"):
        images, texts = features(kind, 80, 70, 32)
        pairs = some_pairs(80, 70, seed=4)
        ranks = retrieval_ranks(images, texts, pairs, chunk_size=32)
        assert tuple(part.tolist() for part in ranks) == brute_force(images, texts, pairs)


@pytest.mark.parametrize("width", [64, 512, 6144])
def test_float32_products_keep_to_the_bound(width: int) -> None:
    """Also where all terms have one sign, which is the worst case of a sum."""
    rng = np.random.default_rng(0)
    images, texts = np.abs(unit(rng.normal(size=(200, width)))), np.abs(unit(rng.normal(size=(200, width))))
    error = images.astype(np.float32) @ texts.astype(np.float32).T - images @ texts.T
    assert 0 < np.abs(error).max() < search._error_bound(width) < 1e-3


def test_memory_is_that_of_a_tile() -> None:
    """4,000 x 4,000 in float64 would be 128 MB; in a process of its own, since a peak is never taken back."""
    code = (
        "import re, numpy as np\n"
        "from pathlib import Path\n"
        "from pretrain.evaluation.methods.retrieval_ranks import retrieval_ranks\n"
        "def kb(field): return int(re.search(field + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "f = np.random.default_rng(0).standard_normal((4000, 32), dtype=np.float32)\n"
        "f /= np.linalg.norm(f, axis=1, keepdims=True)\n"
        "retrieval_ranks(f[:500], f[:500], np.arange(500), chunk_size=500)\n"
        "before = kb('VmRSS')\n"
        "retrieval_ranks(f, f, np.arange(4000), chunk_size=500)\n"
        "print(kb('VmHWM') - before)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000


def test_pairs_that_cannot_be_are_refused() -> None:
    images, texts = features("random", 10, 8, 16)
    for pairs, message in (
        ([[0, 1], [10, 2]], r"image of the pairs: row 1 has 10, outside 0 \.\.\. 9"),
        ([[0, 1], [3, -1]], r"text of the pairs: row 1 has -1, outside 0 \.\.\. 7"),
        (np.zeros((0, 2), dtype=int), "pairs: none"),
        (np.zeros((4, 3), dtype=int), "owner_text: expected 10 integers"),
        ([[0.0, 1.0]], "image of the pairs: expected 1 integers"),
    ):
        with pytest.raises(InputError, match=message):
            retrieval_ranks(images, texts, np.array(pairs))
