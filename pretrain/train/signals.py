"""What SLURM, or a person, sends to a run: SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and Ctrl-C ask it to save and end.

A signal is never lost: from the start of the command until the towers are being built it is held back (`hold`), then
`StopSignals` notes it. Any number of further ones changes nothing, but for a second Ctrl-C, which ends the run at once.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

#: exit status of a run that was asked to stop, saved, and is not finished: start it again (EX_TEMPFAIL)
REQUEUE_STATUS = 75

ASK_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def hold() -> None:
    """From here on they wait until there is a `StopSignals`; after it they are ignored, as the process is at its end.

    For commands, before the imports that take seconds. Threads and processes started meanwhile hold them back too.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ASK_TO_STOP)


class StopSignals:
    """While entered, the signals set `received` and do nothing else: ranks agree at a step's boundary."""

    def __init__(self) -> None:
        self.received = False
        self._interrupted = False

    def __enter__(self) -> Self:
        signals = (*ASK_TO_STOP, signal.SIGINT)
        # one that is ignored stays so: nohup
        heeded = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
        self._earlier = {number: signal.signal(number, self._handle) for number in heeded}
        for number in heeded:
            signal.siginterrupt(number, False)  # library code may not expect that its writes are interrupted
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # held back before: the run is over, but threads that were started meanwhile do not hold them back
        is_at_end = signal.SIGTERM in self._mask
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_IGN if is_at_end else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
