"""Runs publishing in a process of its own: huggingface_hub reads its environment when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.hub.server import TOKEN, Hub

REPOSITORY = Path(__file__).resolve().parents[2]


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """That of a machine that knows no other Hub and has no token of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
    own = {
        "HF_ENDPOINT": hub.state.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home),
        "PYTHONPATH": str(REPOSITORY),
    }
    return kept | own | ({} if token is None else {"HF_TOKEN": token})


def start(hub: Hub, home: Path, code: str, *arguments: object, token: str | None = TOKEN) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(hub, home, token), stdout=pipe, stderr=pipe, text=True)


def run(hub: Hub, home: Path, code: str, *arguments: object, token: str | None = TOKEN) -> str:
    """What it printed. Raises AssertionError with its error output where it ends with another status than 0."""
    process = start(hub, home, code, *arguments, token=token)
    try:
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, error
    return out + error
