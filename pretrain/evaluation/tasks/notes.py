"""What a reader of metrics over classes must know: few patients in a class, few classes in a group.

Shapes: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.evaluation.interfaces import Row
from pretrain.evaluation.metrics.groups import values_of
from pretrain.evaluation.metrics.statistics import Ints, group_codes

_FEW_PATIENTS = 5
_MOST_NAMED = 10


def notes_on_classes(rows: Sequence[Row], label_N: Ints, classnames: Sequence[str]) -> list[str]:
    """label_N: (N,) integers in [0, C)."""
    notes = []
    patient_N = group_codes([row.patient for row in rows])
    num_patients = [len(np.unique(patient_N[label_N == code])) for code in range(len(classnames))]
    if few := [name for name, num in zip(classnames, num_patients, strict=True) if 0 < num < _FEW_PATIENTS]:
        more = f" and {len(few) - _MOST_NAMED} more" if len(few) > _MOST_NAMED else ""
        listed = ", ".join(few[:_MOST_NAMED]) + more
        notes.append(
            f"Classes of fewer than {_FEW_PATIENTS} patients: {listed}. What they add to the intervals is too little."
        )
    num_classes, held = len(np.unique(label_N)), []
    for attribute, value_N in values_of(rows).items():
        nums = [len(np.unique(label_N[value_N == value])) for value in np.unique(value_N[value_N != ""])]
        if min(nums) < num_classes:
            held.append(
                f"{attribute} {min(nums)} to {max(nums)}" if min(nums) < max(nums) else f"{attribute} {nums[0]}"
            )
    if held:
        notes.append(
            f"By group, balanced accuracy is over the classes that a group holds, of {num_classes}: {', '.join(held)}. "
            "Groups that hold other classes cannot be compared by it."
        )
    return notes
