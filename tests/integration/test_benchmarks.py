"""The benchmark of a million rows runs, at a thousandth of its size; what it measures is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_million_rows_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.million_rows", "--rows", "1000", "--images", "100", "--whole"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rows"] == 1000 and result["peak_gb"] > 0.01 and result["whole_minutes"] >= 0
    counts = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("    "))
    assert int(counts["    images with the pixels of an earlier one"]) == int(counts["    pairs of near copies"]) == 20
