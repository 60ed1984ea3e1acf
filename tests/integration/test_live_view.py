"""What a person sees of a run: on a real pseudo-terminal of 80 columns, and in a file."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import val_dir, write_config
from tests.integration.test_train import ENVIRONMENT, command, run

_ESCAPE = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])")


def on_terminal(arguments: list[str], columns: int, rows: int = 30) -> tuple[int, str]:
    """The exit status of a command whose output is a terminal, and all that it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {**ENVIRONMENT, "TERM": "xterm"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(arguments, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 4096):
            written += chunk
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    return process.wait(timeout=120), written.decode()


def screen(written: str, columns: int) -> list[str]:
    """The lines that a terminal would show in the end: as much of a terminal as rich's live display needs."""
    lines, row, column = [""], 0, 0
    position = 0
    while position < len(written):
        if match := _ESCAPE.match(written, position):
            position = match.end()
            if match[3] == "A":
                row = max(0, row - int(match[2] or 1))
            elif match[3] == "K":
                lines[row] = ""
            continue
        character = written[position]
        position += 1
        if character == "\n":
            row, lines = row + 1, lines if row + 1 < len(lines) else [*lines, ""]
        elif character == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
            assert column <= columns, f"wider than the terminal: {lines[row]!r}"
    return [line.rstrip() for line in lines]


@pytest.fixture
def config_path(run_config: dict[str, Any], tmp_path: Path) -> Path:
    run_config |= {"log_every": 2, "num_steps": 6, "trackers": ["tensorboard"]}
    run_config["validation"] = {"val_dir": val_dir(run_config), "every": 4}
    return write_config(tmp_path / "run.yaml", run_config)


def test_a_terminal_shows_one_live_block(config_path: Path) -> None:
    status, written = on_terminal(command(config_path, 1), columns=80)
    assert status == 0, written
    lines = screen(written, columns=80)
    shown = "\n".join(lines)
    # drawn many times, there once in the end, below what was said
    assert sum("samples/s" in line for line in lines) == 1 and written.count("samples/s") > 1, shown
    bar = next(i for i, line in enumerate(lines) if line.startswith("step 6/6 ━"))
    assert bar > next(i for i, line in enumerate(lines) if "M parameters" in line), shown
    block = "\n".join(lines[bar:])
    for name in ("losses", "speed", "validation  at step 6:"):
        assert name in block, shown
    losses = block[block.index("losses") : block.index("speed")]
    for objective in ("loss", "clip", "multi_aspect", "local_alignment", "masked_latent"):
        assert re.search(rf"\b{objective}\s+\d+\.\d{{3}}", losses), shown
    assert re.search(r"\d+ samples/s, \d+% waiting for the reader, 0:00:00 left", block), shown
    assert re.search(r"loss \d\.\d{3}\s", block[block.index("validation") :]) and "mean_recall" in block, shown


def test_elsewhere_a_line_every_few_steps(config_path: Path) -> None:
    result = run(config_path, 1)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stderr
    lines = result.stderr.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["2/6", "4/6", "6/6"]
    for line in steps:
        pattern = r"loss \d+\.\d{3}  clip \d.* \d+ samples/s, \d+% waiting for the reader, \d:\d\d:\d\d left$"
        assert re.search(pattern, line), line
    validations = [line for line in lines if line.startswith("validation at step")]
    assert [line.split(":")[0] for line in validations] == ["validation at step 4", "validation at step 6"]
    assert all(re.search(r"loss \d.*retrieval/mean_recall 0\.\d+", line) for line in validations)
