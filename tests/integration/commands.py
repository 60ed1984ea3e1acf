"""`dermvlp train` as a process of its own that tests send signals to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.integration.test_train import ENVIRONMENT


def start_train(config: Path, *overrides: str, **popen: Any) -> subprocess.Popen[str]:
    """With the ranks that `launch.num_ranks` says; stderr is a pipe."""
    command = [sys.executable, "-m", "pretrain.cli", "train", str(config), *overrides]
    # tests that run in a shell's background inherit a Ctrl-C that is ignored, and a run heeds that
    popen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)} | popen
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, **popen)


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str]:
    """(exit status, stderr)."""
    _, stderr = process.communicate(timeout=timeout_s)
    return process.returncode, stderr


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.005)
    raise TimeoutError(what)


def is_holding(pid: int, number: signal.Signals = signal.SIGTERM) -> bool:
    """Whether the process's main thread has the signal blocked."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigBlk:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> dict[int, list[str]]:
    """Command lines by process number, without those that only track resources."""
    import psutil

    lines = {}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            lines[process.pid] = process.cmdline()
        except psutil.NoSuchProcess:
            continue
    return {number: line for number, line in lines.items() if "resource_tracker" not in " ".join(line)}


def rank_pids(pid: int) -> list[int]:
    """Of the ranks that this launcher has started."""
    found = []
    for number, line in descendants(pid).items():
        if "pretrain.train" in line:
            environment = dict(
                entry.split("=", 1) for entry in Path(f"/proc/{number}/environ").read_text().split("\0") if "=" in entry
            )
            found.append((int(environment["RANK"]), number))
    return [number for _, number in sorted(found)]


def send(pid: int, number: signal.Signals) -> None:
    os.kill(pid, number)
