"""The benchmark of the reader runs; what it measures is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_benchmark_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.reader", "--quick"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    figures = {"vs_webdataset", "of_limit", "vs_our_crop"}
    assert set(result) == {*figures, "intervals"} and set(result["intervals"]) == figures
    assert all(result[key] > 0 for key in figures)
