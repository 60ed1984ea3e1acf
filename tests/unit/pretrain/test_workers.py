"""Reader processes outlive signals that ask a run to stop, also where SLURM sends them to all processes of a step."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import multiprocessing, os, signal, sys, time
from contextlib import nullcontext
from multiprocessing import forkserver, resource_tracker
from pretrain.data.workers import starting_workers
from pretrain.train.signals import ASK_TO_STOP

if __name__ == "__main__":
    with starting_workers() if sys.argv[1] == "held" else nullcontext():
        reader = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(20,), daemon=True)
        reader.start()
        time.sleep(0.5)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # as it was before
    for number in ASK_TO_STOP:
        for pid in (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid, reader.pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
    reader.join(0.5)
    print("alive" if reader.is_alive() else "gone", flush=True)
    for pid in (reader.pid, forkserver._forkserver._forkserver_pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    os._exit(0)
"""


@pytest.mark.parametrize(("how", "state"), [("held", "alive"), ("not held", "gone")])
def test_a_reader_lives_only_if_it_was_started_while_signals_were_held(how: str, state: str) -> None:
    command = [sys.executable, "-c", _PROGRAM, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == state, done.stderr
