"""Work in several processes, a bounded number of pieces at a time, so that a million rows stream through."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def run(function: Callable[[Piece], Result], pieces: Iterable[Piece], num_workers: int) -> Iterator[Result]:
    """`function` of each piece, in worker processes, in the order in which they are done.

    At most twice as many pieces as workers are in memory. A worker's exception is raised here and ends the rest.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["data_prep.images.scan", "data_prep.samples"]
    )  # workers start with the imports done
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent) as pool:
        running: set[Future[Result]] = set()
        try:
            for piece in pieces:
                running.add(pool.submit(function, piece))
                while len(running) >= 2 * num_workers:
                    yield from _finished(running)
            while running:
                yield from _finished(running)
        except BaseException as error:
            # pieces in hand are finished, so that nobody writes after the message
            pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            raise


def _finished(running: set[Future[Result]]) -> Iterator[Result]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        running.remove(future)
        yield future.result()


def _end_with_parent() -> None:
    """In a worker process: a killed parent cannot end its workers, which would wait for work for ever, and first
    finish the piece that the next preparation is making."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
