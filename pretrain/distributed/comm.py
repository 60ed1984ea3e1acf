"""All collectives. Each is the identity in a single process, so the same code runs with and without a launcher."""

from __future__ import annotations

import os
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


def is_initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_initialised() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if is_initialised() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


class _Gather(torch.autograd.Function):
    """all_gather whose backward is a reduce_scatter: the sum over ranks of the gradients of our own slice.

    torch.distributed.nn.all_gather computes the same and is deprecated.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        slices = list(gradients[0].contiguous().chunk(world_size()))
        own = torch.empty_like(slices[0])
        dist.reduce_scatter(own, slices)
        return own


def gather_with_grad(local: Tensor) -> Tensor:
    """(B, ...) on every rank, equal shapes, to (W * B, ...), rank-major; gradients of all ranks are summed."""
    return _Gather.apply(local) if world_size() > 1 else local


@torch.no_grad()
def gather(local: Tensor) -> Tensor:
    """As `gather_with_grad`, without gradient."""
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def sum_over_ranks(value: Tensor) -> Tensor:
    """A new tensor with the sum over ranks."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...


def start_cpu_sum_(value: Tensor) -> Work | None:
    """Begins to sum a CPU tensor over ranks, in place; None in a single process. All ranks call it in the same order.

    It has a process group of its own, so that it stands in no order with what the engine sends.
    """
    if world_size() == 1:
        return None
    work: Work | None = dist.all_reduce(value, group=_cpu_group(), async_op=True)
    return work


@cache
def _cpu_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")  # type: ignore[return-value]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_agree(ok: bool) -> bool:
    """True where every rank says so."""
    return bool(sum_over_ranks(torch.tensor([int(not ok)], dtype=torch.int64)).item() == 0)


def from_rank_0(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shut_down() -> None:
    if is_initialised():
        _cpu_group.cache_clear()
        dist.destroy_process_group()
