"""What SLURM, or a person, sends to a run: SIGTERM and SIGUSR1 ask it to save and end."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

#: exit status of a run that was asked to stop, saved, and is not finished: start it again (EX_TEMPFAIL)
REQUEUE_STATUS = 75

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While entered, the signals set `received` and do nothing else: ranks agree at a step's boundary."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Self:
        self._earlier = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
