"""Ends this rank when its launcher is gone, so that it does not compute for nobody (ranks watch each other, too:
distributed/watch.py)."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Self

from pretrain.train.launched import LAUNCHER_VARIABLE


class LauncherWatch:
    """While entered, a thread looks whether the parent is still the launcher; nothing where there is none."""

    def __enter__(self) -> Self:
        self._over = threading.Event()
        if "RANK" in os.environ and ("TORCHELASTIC_RUN_ID" in os.environ or LAUNCHER_VARIABLE in os.environ):
            threading.Thread(target=self._watch, name="launcher watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        launcher = int(os.environ.get(LAUNCHER_VARIABLE, os.getppid()))
        while not self._over.wait(1.0):
            if os.getppid() != launcher:
                print(f"error: rank {os.environ['RANK']}: its launcher is gone", file=sys.stderr, flush=True)
                os._exit(1)
