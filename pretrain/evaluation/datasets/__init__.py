"""Evaluation sets of any kind. `open_data(path)` gives rows and their images; see docs/evaluation_data.md."""

from pretrain.evaluation.datasets.data import EvalSet
from pretrain.evaluation.datasets.opening import open_data

__all__ = ["EvalSet", "open_data"]
