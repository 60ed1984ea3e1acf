"""Starts the ranks of a run on this machine: `dermvlp train CONFIG`.

torch's own elastic launcher runs in this process: it finds the other nodes, starts the ranks and ends the rest when one
dies. What it lacks is here: the ranks' exit status is handed on, signals are forwarded to the ranks, and they have as
long as they need to save.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.distributed.launchers import adopt_environment
from pretrain.train.__main__ import load_training_config
from pretrain.train.__main__ import main as train_here
from pretrain.train.launched import FOLDER_VARIABLE, LAUNCHER_VARIABLE, pids, statuses
from pretrain.train.preflight.checks import refuse_what_cannot_work
from pretrain.train.signals import ASK_TO_STOP, REQUEUE_STATUS

_INTERRUPTED = 130


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run; each runs the same command."""

    count: int = 1
    rdzv_endpoint: str | None = None  # HOST:PORT of the node where they meet, any free port
    rdzv_id: str = "dermvlp"  # distinct for two runs that meet at one endpoint
    nproc_per_node: int | None = None  # None: launch.num_ranks


def launch(config_path: str, overrides: Sequence[str], nodes: Nodes | None = None) -> int:
    """The exit status. With one rank, or under a launcher already, this process is the rank.

    What can be refused without the towers' memory is refused here first, so that mistakes are one message and not one
    a rank. A launcher's ranks go straight on: `--plan` is for the login node.
    0: finished; 75: all ranks saved because a signal asked one of them to stop; 2: refused; 130: a second Ctrl-C; 1.
    """
    nodes = nodes or Nodes()
    if nodes == Nodes(rdzv_id=nodes.rdzv_id):  # else this task of `srun` is a launcher, and no rank
        adopt_environment()
    config = load_training_config(config_path, overrides)
    if "RANK" in os.environ:
        return train_here([config_path, *overrides])
    num_local = nodes.nproc_per_node or config.launch.num_ranks
    if nodes.count > 1 and nodes.rdzv_endpoint is None:
        raise InputError("--nnodes: several nodes need --rdzv-endpoint HOST:PORT, the first node's name and a port")
    refuse_what_cannot_work(config, nodes.count * num_local)
    if nodes.count * num_local == 1:
        return train_here([config_path, *overrides])
    return _run_ranks(config, nodes, num_local, ["-m", "pretrain.train", config_path, *overrides])


def _run_ranks(config: TrainConfig, nodes: Nodes, num_local: int, arguments: Sequence[str]) -> int:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what happened
    with tempfile.TemporaryDirectory(prefix="dermvlp-launch-") as name, _environment(config, num_local, name):
        folder, problem = Path(name), ""
        elastic = LaunchConfig(
            min_nodes=nodes.count,
            max_nodes=nodes.count,
            nproc_per_node=num_local,
            run_id=nodes.rdzv_id if nodes.count > 1 else f"{nodes.rdzv_id}-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint=nodes.rdzv_endpoint or "localhost:0",
            local_addr=None if nodes.count > 1 else "localhost",
            max_restarts=0,
            signals_to_handle="SIGQUIT",  # its handlers end the ranks within 30 s; ours forward
            logs_specs=DefaultLogsSpecs(log_dir=name),  # it would leave a folder behind
        )
        with _Forwarding(folder) as forwarding:
            try:
                elastic_launch(elastic, sys.executable)(*arguments)
            except ChildFailedError as error:
                problem = _of_failed_rank(error, statuses(folder))
            except (RendezvousError, SignalException) as error:
                problem = f"the nodes lost each other: {error}"
        by_rank = statuses(folder).values()
        if forwarding.interrupted:
            return _INTERRUPTED
        if problem:
            print(f"error: {problem}", file=sys.stderr, flush=True)
            return 2 if 2 in by_rank else 1
        return REQUEUE_STATUS if REQUEUE_STATUS in by_rank else 0


def _of_failed_rank(error: ChildFailedError, by_rank: Mapping[int, int]) -> str:
    """What became of the rank that ended first."""
    rank, failure = error.get_first_failure()
    if rank in by_rank:
        return f"the run has ended: rank {rank} has said why, above"
    if failure.exitcode >= 0:
        return f"rank {rank} has ended with status {failure.exitcode}"
    name = signal.Signals(-failure.exitcode).name
    why = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"rank {rank} was ended by {name}{why}; the same command goes on from the newest whole checkpoint"


@contextlib.contextmanager
def _environment(config: TrainConfig, num_local: int, folder: str) -> Iterator[None]:
    """What the ranks inherit."""
    added = {FOLDER_VARIABLE: folder, LAUNCHER_VARIABLE: str(os.getpid())}
    # else torch's store says a lot whenever a run ends
    added["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    if config.launch.threads_per_rank is not None:
        added["OMP_NUM_THREADS"] = str(config.launch.threads_per_rank)
    elif num_local > 1 and "OMP_NUM_THREADS" not in os.environ:
        added["OMP_NUM_THREADS"] = "1"  # as torchrun does: else every rank takes every core
    earlier = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for variable, value in earlier.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value


class _Forwarding:
    """While entered, signals to this process go to its ranks, also to those that start later.

    They are blocked, here and (as that is inherited) in the ranks until those can heed them, and taken up by a thread.
    """

    _SIGNALS = (*ASK_TO_STOP, signal.SIGINT)
    _GRACE_S = 5.0  # for ranks after a second Ctrl-C
    _REGISTERED_S = 20.0  # by then ranks that are being started have registered

    def __init__(self, folder: Path) -> None:
        self._folder, self._over = folder, threading.Event()
        self._received: list[signal.Signals] = []
        self._num_sent: dict[int, int] = {}  # by rank
        self.interrupted = False

    def __enter__(self) -> _Forwarding:
        heeded = [number for number in self._SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        # a thread of some library may not block them, and its signal would end this process
        self._earlier = {number: signal.signal(number, self._note) for number in heeded}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, heeded)
        self._thread = threading.Thread(target=self._forward, args=(heeded,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        is_at_end = signal.SIGTERM in self._mask  # see `hold`
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_IGN if is_at_end else handler)

    def _note(self, number: int, frame: FrameType | None = None) -> None:
        self._received.append(signal.Signals(number))

    def _forward(self, heeded: Sequence[signal.Signals]) -> None:
        first_at: float | None = None
        while not self._over.is_set():
            taken = signal.sigtimedwait(heeded, 0.2)
            if taken is not None:
                self._note(taken.si_signo)
            if self._received.count(signal.SIGINT) > 1 and not self.interrupted:
                self.interrupted = True
                threading.Timer(self._GRACE_S, self._send_all, [signal.SIGKILL]).start()
            ranks = pids(self._folder)
            received = list(self._received)
            for rank, pid in ranks.items():
                for number in received[self._num_sent.get(rank, 0) :]:
                    _send(pid, number)
                self._num_sent[rank] = len(received)
            if received and not ranks:
                first_at = first_at or time.monotonic()
                if time.monotonic() - first_at > self._REGISTERED_S:
                    print("stopped by a signal while waiting for the other nodes", file=sys.stderr, flush=True)
                    os._exit(_INTERRUPTED if self.interrupted else REQUEUE_STATUS)

    def _send_all(self, number: signal.Signals) -> None:
        if not self._over.is_set():
            for pid in pids(self._folder).values():
                _send(pid, number)


def _send(pid: int, number: signal.Signals) -> None:
    """To a rank of ours, unless it is gone (and its number perhaps another process's)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if parent == os.getpid():
            os.kill(pid, number)
