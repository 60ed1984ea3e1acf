"""What a reader of metrics by group must know: which classes the groups hold.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.evaluation.interfaces import Row
from pretrain.evaluation.metrics.groups import values_of
from pretrain.evaluation.metrics.statistics import Ints


def notes_on_groups(rows: Sequence[Row], label_N: Ints, metric: str) -> list[str]:
    """label_N: (N,) classes. metric: what is given by group, "balanced_accuracy" or "auroc"."""
    num_classes, held = len(np.unique(label_N)), []
    for attribute, value_N in values_of(rows).items():
        nums = [len(np.unique(label_N[value_N == value])) for value in np.unique(value_N[value_N != ""])]
        if min(nums) < num_classes:
            held.append(
                f"{attribute} {min(nums)} to {max(nums)}" if min(nums) < max(nums) else f"{attribute} {nums[0]}"
            )
    if not held:
        return []
    of_metric = "AUROC is undefined in a group of one class. Classes that a group holds"
    if metric == "balanced_accuracy":
        of_metric = "balanced accuracy is over the classes that a group holds, so groups of other classes cannot be "
        of_metric += "compared by it. They hold"
    return [f"By group, {of_metric}, of {num_classes}: {', '.join(held)}."]
