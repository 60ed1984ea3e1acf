"""The retrieval benchmark runs, small, and checks that its sides agree; what it measures is not judged here."""

from __future__ import annotations

import pytest

from benchmarks import evaluate_retrieval


def test_rounds_of_both_sides() -> None:
    seconds, sizes = evaluate_retrieval.retrieval_ratios(1, num_pairs=2000)
    ((ours_s, dense_s),) = seconds
    ((ours_bytes, dense_bytes),) = sizes
    assert 0 < ours_s < 60 and 0 < dense_s < 60
    assert 0 < ours_bytes < 500e6
    assert dense_bytes > 2000 * 2000 * (4 + 8) * 0.9  # the similarities and their order


def test_sides_that_disagree_end_it() -> None:
    with pytest.raises(SystemExit, match="recalls differ"):
        evaluate_retrieval._check_equal([0.5, 0.6], [0.5, 0.7])
