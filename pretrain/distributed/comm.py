"""All collectives. Each is the identity in a single process, so the same code runs with and without a launcher."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.errors import InputError


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


def start_cpu_gather(local: Tensor) -> Callable[[], Tensor]:
    """Begins to gather a CPU tensor (B, ...) of all ranks, equal shapes; what is returned waits for (W * B, ...).

    All ranks call it in the same order, among the calls of `start_cpu_sum_` too.
    """
    if world_size() == 1:
        return lambda: local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    work: Work = dist.all_gather(parts, local.contiguous(), group=_cpu_group(), async_op=True)  # type: ignore[assignment]

    def wait() -> Tensor:
        work.wait()
        return torch.cat(parts)

    return wait


@cache
def _cpu_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=_timeout)  # type: ignore[return-value]


_timeout: timedelta | None = None  # None: torch's default


def initialise(backend: str, timeout: timedelta) -> None:
    """The process group of a launcher's environment; a collective that waits longer than `timeout` ends the run."""
    global _timeout
    _timeout = timeout
    dist.init_process_group(backend, timeout=timeout)


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Of a group that somebody else made."""
    set_it = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)  # its name before torch 2.13
    set_it(timeout, group)


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


def decided_by_rank_0(decide: Callable[[], Any]) -> Any:
    """What rank 0 finds, on every rank; its InputError too."""
    value, problem = None, None
    if rank() == 0:
        try:
            value = decide()
        except InputError as error:
            problem = error
    value, problem = from_rank_0((value, problem))
    if problem is not None:
        raise problem
    return value


def gather_objects(value: Any) -> list[Any]:
    """The picklable values of all ranks, in their order, on every rank. They go over the CPU's own process group."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_cpu_group())
    return values


LOST_PEER = (
    "another rank is gone: it was killed (out of memory, by a person, by the scheduler), its node failed, or it ended "
    "with an error that its own output tells; the same command goes on from the newest checkpoint"
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because a rank it needs is there no more, or did not come in time."""
    if isinstance(error, dist.DistError):
        return True
    # gloo's have no type of their own
    signs = ("gloo", "closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Connection refused")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def shut_down() -> None:
    if is_initialised():
        _cpu_group.cache_clear()
        dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """Ends this process, after what is registered for its exit, without the interpreter's finalisation.

    While the interpreter is finalised, a thread of gloo that lets go of a collective's tensors (a moment after the
    collective, or later on a busy machine) ends the whole process by SIGABRT: torch issue 190489.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
