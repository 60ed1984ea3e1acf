"""Work in several processes, a bounded number of pieces at a time; and by several jobs, each with a part of it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

from data_prep.errors import InputError

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Part:
    """`index` of `count` jobs that share the work without speaking to each other."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """ "3/16": the fourth of sixteen; counted from 0, as SLURM_ARRAY_TASK_ID is."""
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise InputError(f"part {text!r}: write it as i/n with 0 <= i < n, for example 3/16")
        return cls(int(index), int(count))

    def has(self, number: int) -> bool:
        return number % self.count == self.index

    def __str__(self) -> str:
        return f"part {self.index}/{self.count}"


ALL = Part()


def run(function: Callable[[Piece], Result], pieces: Iterable[Piece], num_workers: int) -> Iterator[Result]:
    """`function` of each piece, in worker processes, in the order in which they are done.

    At most twice as many pieces as workers are in memory. A worker's exception is raised here and ends the rest.
    Raises InputError where a worker is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["data_prep.images.scan", "data_prep.shards.stage"]
    )  # workers start with the imports done
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent) as pool:
        running: set[Future[Result]] = set()
        try:
            for piece in pieces:
                running.add(pool.submit(function, piece))
                while len(running) >= 2 * num_workers:
                    yield from _finished(running)
            while running:
                yield from _finished(running)
        except BrokenProcessPool:
            # Python's pool ends its workers when one dies, but not one that was being started meanwhile: leaving the
            # pool would wait for that one for ever
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise InputError(
                "a worker process was killed, perhaps for want of memory; lower num_workers and run the same command "
                "again: it goes on where it stopped"
            ) from None
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
