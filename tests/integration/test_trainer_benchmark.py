"""The benchmarks of the trainer run, their sides train the same, and a difference is noticed; times are not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.trainer import _MODEL, _TINY_MODEL, Sides, num_parameters, write_run

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_trainer_benchmark_runs() -> None:
    """Quick: each side once; it ends with an error where their losses differ."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.trainer", "--quick", "--no-resume"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() == {"vs_ddp", "vs_deepspeed", "resume_vs_cold"} and result["resume_vs_cold"] is None
    assert result["vs_ddp"] > 0 and result["vs_deepspeed"] > 0
    assert "--quick" in done.stdout and "resume_vs_cold    not measured" in done.stdout


def test_the_real_towers_have_twenty_million_parameters_and_a_difference_is_noticed(tmp_path: Path) -> None:
    path = write_run(tmp_path, _TINY_MODEL, 1, 2)
    sides = Sides(path)
    sides.losses = {"ours": [1.0, 0.5], "ddp": [1.0, 0.5004]}
    sides.check_losses()
    sides.losses["deepspeed"] = [1.0, 0.502]
    with pytest.raises(RuntimeError, match="losses of deepspeed"):
        sides.check_losses()
    (tmp_path / "model.json").write_text(json.dumps({"model_cfg": _MODEL}))
    assert num_parameters(path) >= 20_000_000


def test_the_scaling_tables_are_printed() -> None:
    command = [sys.executable, "-m", "benchmarks.scaling", "--batch", "2048"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    (at_1024,) = (line for line in lines if line.startswith("| all of these | 1024 |"))
    assert at_1024.split(" | ")[2] == "8.28"  # 20 bytes of each of 414.0 M trained parameters, and 2 of frozen ones
    (clip,) = (line for line in lines if line.startswith("| `clip`"))
    assert "| 2,048 | 0.0 |" in clip  # 17 MB
    assert "To plan the texts of one batch for 1,024 ranks" in lines[-1]
