"""One shard, read from its first byte to its last through webdataset: over HTTP, from a command's pipe, or a file.

A tar that breaks off and a connection that drops are read again from the shard's start, past the samples that were
given already; every sample is measured against index.npy, so that a cut one is never taken for a whole one.
"""

from __future__ import annotations

import re
import select
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_prep.errors import InputError
from pretrain.data.manifest import ShardedDataset

_NUM_ATTEMPTS = 5  # in a row that bring no further sample
_FIRST_PAUSE_S = 0.5  # before the second attempt; doubled before each further one
_SILENCE_S = 120.0  # without a byte from a server or command: the connection counts as dropped

_HTTP_REFUSED = 22  # curl's exit status for a status of 400 or more, which it has retried itself where that can help
_CURL = {6: "no such host", 7: "no connection", 18: "the connection dropped", 56: "the connection dropped"}
_NO_SUCH_COMMAND = (126, 127)  # a shell's

# what a shell and a url take as nothing but a name (a manifest's names are held to the same, but for the first letter)
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")


@dataclass(frozen=True)
class RawSample:
    position: int  # in the index
    jpeg: bytes
    json: bytes


def shard_url(url: str, name: str) -> str:
    """What webdataset opens for a shard. Raises InputError for a name that a shell could take for more than a name."""
    if not _SHARD_NAME.fullmatch(name):
        raise InputError(
            f"manifest.json: the shard name {name!r} is not one of letters, digits, '.', '_' and '-' that ends in "
            ".tar; it is put into no url and no command. Prepare the shards again"
        )
    if url.startswith("pipe:"):
        return url.replace("{}", name)
    if url.startswith(("http://", "https://")):
        return url + name
    return (Path(url) / name).resolve().as_uri()


def check_opener(url: str) -> None:
    """Raises InputError where the program that webdataset reads HTTP with is missing, or the folder."""
    if url.startswith("http") and shutil.which("curl") is None:
        raise InputError("data.stream.url: webdataset reads http through the program curl, which is not installed")
    if not url.startswith(("http://", "https://", "pipe:")) and not Path(url).is_dir():
        raise InputError(f"data.stream.url: {url}: no such folder")


def read_shard(data: ShardedDataset, shard: int, url: str) -> Iterator[RawSample]:
    """The samples of a shard in the order of its tar, each once, whatever it takes within a few attempts.

    Raises InputError with the shard's url when it cannot be opened, or brings no further sample in five attempts.
    """
    name, num_samples = data.manifest.shards[shard].name, data.manifest.shards[shard].num_samples
    opened, first = shard_url(url, name), data.first_of_shard(shard)
    done = failures = 0
    while done < num_samples:
        source: _Source | None = None
        try:
            source = _Source(opened)
            for number, (jpeg, json) in enumerate(_samples(source, opened)):
                if number < done:
                    continue
                _check_whole(data, first + number, jpeg, json)
                yield RawSample(first + number, jpeg, json)
                done, failures = done + 1, 0
                if done == num_samples:
                    return
            raise _BrokenOffError(f"ends after {done} of {num_samples} samples")
        except (_BrokenOffError, OSError, tarfile.TarError, ValueError) as error:
            reason, is_final = _explain(error, source, opened)
            failures += 1
            if is_final or failures == _NUM_ATTEMPTS:
                times = "" if is_final else f", {failures} times in a row"
                raise InputError(
                    f"{opened}: {reason}{times}; does data.stream.url lead to the shards that manifest.json in "
                    f"{data.directory} names?"
                ) from None
            print(f"{opened}: {reason}, after {done} samples; reading it again", file=sys.stderr, flush=True)
            time.sleep(_FIRST_PAUSE_S * 2 ** (failures - 1))
        finally:
            if source is not None:
                source.close()


class _BrokenOffError(Exception):
    """The bytes end, or are others, before the shard is whole."""


class _Source:
    """What webdataset opened. Raises where it would wait for ever, or take a failed program's end for a tar's."""

    def __init__(self, url: str) -> None:
        self._opened = gopen(url, "rb")
        self.exit_status: int | None = None  # of curl or the command, when it failed
        self.problem = ""

    def read(self, size: int) -> bytes:
        if not isinstance(self._opened, Pipe):
            content: bytes = self._opened.read(size)
            return content
        poll = select.poll()
        poll.register(self._opened.stream, select.POLLIN)
        if not poll.poll(1000 * _SILENCE_S):
            self._fail(f"no byte came for {_SILENCE_S:.0f} s")
        content = self._opened.stream.read1(size)
        if not content:
            self._check_exit(self._opened.proc)
        return content

    def _check_exit(self, process: subprocess.Popen[bytes]) -> None:
        try:
            status = process.wait(_SILENCE_S)
        except subprocess.TimeoutExpired:
            self._fail(f"its output is closed, and it did not end in {_SILENCE_S:.0f} s")
        if status:
            self.exit_status = status
            self._fail(f"exit status {status}")

    def _fail(self, problem: str) -> None:
        self.problem = problem  # webdataset rewrites an exception's arguments on its way
        raise OSError(problem)

    def close(self) -> None:
        if isinstance(self._opened, Pipe):
            # webdataset's own close waits for a program that may never write again, and so never end
            self._opened.proc.kill()
            self._opened.stream.close()
            self._opened.proc.wait()
        else:
            self._opened.close()


def _samples(source: _Source, url: str) -> Iterator[tuple[bytes, bytes]]:
    """(jpg, json) of each sample of a tar; an empty member where the tar broke off within a sample."""
    files = tar_file_expander(iter([{"url": url, "stream": source}]), eof_value=None)
    sample: dict[str, Any]
    for sample in group_by_keys(files):
        yield sample.get("jpg", b""), sample.get("json", b"")


def _check_whole(data: ShardedDataset, position: int, jpeg: bytes, json: bytes) -> None:
    """tarfile gives the beginning of a member where its stream ends, and no error."""
    row = data.index[position]
    if (len(jpeg), len(json)) != (int(row["image_num_bytes"]), int(row["json_num_bytes"])):
        raise _BrokenOffError(f"breaks off in sample {position}, or is not the tar that index.npy describes")


def _explain(error: Exception, source: _Source | None, opened: str) -> tuple[str, bool]:
    """(what went wrong, whether another attempt cannot help)."""
    status = None if source is None else source.exit_status
    if status is not None and opened.startswith("http"):
        if status == _HTTP_REFUSED:
            return http_problem(opened)
        return f"{_CURL.get(status, 'curl failed')} (curl's exit status {status})", False
    if source is not None and source.problem:
        return source.problem, status in _NO_SUCH_COMMAND
    if isinstance(error, OSError) and error.strerror:
        return error.strerror, isinstance(error, FileNotFoundError | PermissionError)
    return str(error.args[0]).split(" @ ")[0] if error.args else type(error).__name__, False


def http_problem(url: str) -> tuple[str, bool]:
    """What the server answers now (curl, as webdataset calls it, does not tell), and whether it will stay so."""
    try:
        with urllib.request.urlopen(url, timeout=30):
            return "the server refused it, and has it now", False
    except urllib.error.HTTPError as error:
        is_final = 400 <= error.code < 500 and error.code not in (408, 429)  # timeout, too many requests
        return f"HTTP status {error.code} ({error.reason})", is_final
    except OSError as error:
        return f"the server refused it ({error})", False
