"""Linear probe and few-shot: logistic regression on frozen features, and the patients it is trained on.

The published convention (UNI, PanDerm, DermLIP and MAKE share the code): features as the tower gives them, neither
standardised nor normalised; L-BFGS, at most 1,000 iterations; no validation search, but an l2 coefficient of
100 / (D C), D the width of the features and C the number of classes in training. Scikit-learn minimises

    1/2 |W|^2 + C_sklearn * sum over the rows of the cross-entropy,        the intercept unpenalised,

so that C_sklearn = D C / 100 is that coefficient, and is what their code hands to scikit-learn. By default that code
uses a fit of its own instead: *mean* cross-entropy + 1/2 (100 / (D C)) |W|, the norm not squared, which is a stronger
penalty the more rows there are. Two classes: scikit-learn fits one weight vector, not two.

Shapes: N rows, G patients, D feature width, C classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from pretrain.evaluation.metrics.statistics import Floats, Groups, Ints, group_codes


@dataclass(frozen=True)
class ProbeScores:
    """probability_NC: (N, C) float64, 0 for classes not trained on. has_converged: within the iterations allowed."""

    probability_NC: NDArray[np.float64]
    has_converged: bool

    @property
    def predicted_N(self) -> NDArray[np.int64]:
        return self.probability_NC.argmax(axis=1)


def probe_cost(width: int, num_classes: int) -> float:
    """Scikit-learn's C: the inverse of the published l2 coefficient."""
    return width * num_classes / 100


def probe(
    train_ND: Floats, train_label_N: Ints, test_ND: Floats, num_classes: int, max_iterations: int = 1000
) -> ProbeScores:
    """Train on some features and score others.

    train_ND, test_ND: (N, D), any scale. train_label_N: (N,) integers in [0, C), of at least two classes.
    """
    present = np.unique(train_label_N)
    model = LogisticRegression(C=probe_cost(train_ND.shape[1], len(present)), max_iter=max_iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(train_ND.astype(np.float64), train_label_N)
    has_converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    probability_NC = np.zeros((len(test_ND), num_classes))
    probability_NC[:, present] = model.predict_proba(test_ND.astype(np.float64))
    return ProbeScores(probability_NC, has_converged)


# ---------------------------------------------------------------------------------------------- who is trained on


def held_out_patients(label_N: Ints, patients: Groups, fraction: float, seed: int) -> NDArray[np.bool_]:
    """(N,) True for rows to test on: about `fraction` of the patients of each class, whole patients.

    Some patients that hold all classes between them stay in training. Of the others each class has one to test on, so
    a class is missing there only if it has a single patient, or if patients of several classes leave no other way.
    Scikit-learn's grouped splits promise neither.
    """
    drawing = _Drawing(label_N, patients, seed)
    in_training = drawing.cover(np.ones(drawing.num_patients, dtype=bool))
    return drawing.rows(fraction, must=drawing.cover(~in_training), may=~in_training)


def share_of_patients(label_N: Ints, patients: Groups, share: float, seed: int) -> NDArray[np.bool_]:
    """(N,) True for the rows of about `share` of the patients of each class; every class has at least one.

    With one seed the patients of a smaller share are among those of a larger one.
    """
    drawing = _Drawing(label_N, patients, seed)
    everyone = np.ones(drawing.num_patients, dtype=bool)
    return drawing.rows(share, must=drawing.cover(everyone), may=everyone)


def few_shots(label_N: Ints, patients: Groups, num_shots: int, seed: int) -> NDArray[np.bool_]:
    """(N,) True for `num_shots` rows of each class, or all where it has fewer; of as many patients as possible.

    With one seed the rows of fewer shots are among those of more.
    """
    order = np.random.default_rng(seed).permutation(len(label_N))
    codes = group_codes(patients)[order]
    # the first row of each patient and class, then the second of each, ...
    turn = _count_before(codes * (int(label_N.max()) + 1) + label_N[order])
    order = order[np.argsort(turn, kind="stable")]
    is_drawn = np.zeros(len(label_N), dtype=bool)
    is_drawn[order] = _count_before(label_N[order]) < num_shots
    return is_drawn


class _Drawing:
    """Patients in a random order that the seed fixes, each in the stratum of its rarest class."""

    def __init__(self, label_N: Ints, patients: Groups, seed: int) -> None:
        self._code_N = group_codes(patients)
        self.num_patients = int(self._code_N.max()) + 1
        self._holds_GC = np.zeros((self.num_patients, int(label_N.max()) + 1), dtype=bool)
        self._holds_GC[self._code_N, label_N] = True
        self._size_C = self._holds_GC.sum(axis=0)
        self._stratum_G = np.where(self._holds_GC, self._size_C, self.num_patients + 1).argmin(axis=1)
        self._order_G = np.random.default_rng(seed).permutation(self.num_patients)

    def cover(self, may_G: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(G,) a few of the patients allowed that hold, between them, every class that those allowed hold."""
        chosen_G = np.zeros(self.num_patients, dtype=bool)
        for label in np.argsort(self._size_C, kind="stable"):
            holders = self._order_G[(self._holds_GC[:, label] & may_G)[self._order_G]]
            if len(holders) and not chosen_G[holders].any():
                chosen_G[holders[0]] = True
        return chosen_G

    def rows(self, share: float, must: NDArray[np.bool_], may: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(N,) of `share` of each stratum's patients, in their order: those that must be, then those that may."""
        drawn_G = must.copy()
        for label in np.unique(self._stratum_G):
            stratum = self._order_G[self._stratum_G[self._order_G] == label]
            others = stratum[(may & ~must)[stratum]]
            num_more = round(share * len(stratum)) - int(must[stratum].sum())
            drawn_G[others[: max(num_more, 0)]] = True
        is_drawn_N: NDArray[np.bool_] = drawn_G[self._code_N]
        return is_drawn_N


def _count_before(codes: Ints) -> NDArray[np.int64]:
    """(N,) how many earlier entries are equal."""
    order = np.argsort(codes, kind="stable")
    is_first = np.concatenate([[True], np.diff(codes[order]) != 0])
    position = np.arange(len(codes))
    before = np.empty(len(codes), dtype=np.int64)
    before[order] = position - np.maximum.accumulate(np.where(is_first, position, 0))
    return before
