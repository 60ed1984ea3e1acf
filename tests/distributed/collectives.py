"""Counts what a piece of code sends between ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CountCollectives(TorchDispatchMode):
    """The collectives within the `with` block, backward included: how often each was called.

    `calls` counts (kind, number of elements, dtype). Kinds are c10d's: `allgather_`, `reduce_scatter_`, `allreduce_`.
    The elements are those that a rank puts in: of an all_gather its own part, of the others the whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::")
            # (outputs, inputs, group, ...); what works in place: (tensors, group, ...)
            inputs = _tensors(args[1] if isinstance(args[1], Tensor | list) else args[0])
            dtype = str(inputs[0].dtype).removeprefix("torch.")
            self.calls[kind, sum(tensor.numel() for tensor in inputs), dtype] += 1
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]
