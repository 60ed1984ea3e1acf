"""The demo: small, in every test run; the shipped recipes up to what they promise, under `make test-slow`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import write_config

ROOT = Path(__file__).parents[2]


def run_demo(*arguments: object, timeout_s: int) -> tuple[str, dict[str, Any]]:
    """(everything printed, the JSON object of the last line)."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK")}
    command = [sys.executable, "-m", "pretrain.cli", "demo", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_the_whole_way_on_a_few_pairs(run_config: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "source.yaml"
    source.write_text(
        yaml.safe_dump(
            {
                "name": "few",
                "source": {"kind": "synthetic", "num_train": 48, "num_val": 30, "image_px": 48},
                "out_dir": str(tmp_path / "data"),
            }
        )
    )
    recipe = write_config(tmp_path / "recipe.yaml", run_config)
    printed, result = run_demo("--source", source, "--recipe", recipe, "--out", tmp_path / "runs", timeout_s=240)
    assert set(result) == {
        *("zero_shot_before", "zero_shot_after", "retrieval_before", "retrieval_after"),
        *("num_classes", "num_test", "seconds", "report"),
    }
    assert result["num_test"] == 30 and result["num_classes"] >= 10
    for stage in ("prepare", "evaluate before training", "train", "evaluate after training", "export", "report"):
        assert f"== {stage}: " in printed
    assert "balanced_accuracy" in printed and "synthetic" in printed
    page = Path(result["report"]).read_text()
    assert 'src="http' not in page and "href=" not in page and page.count("data:image/jpeg;base64,") >= 8
    run_dir = tmp_path / "runs" / "few"
    assert (run_dir / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "export" / "open_clip_config.json").is_file()


@pytest.mark.slow
def test_synthetic_demo_reaches_five_times_chance(tmp_path: Path) -> None:
    _, result = run_demo("--out", tmp_path, timeout_s=900)
    assert result["zero_shot_after"] >= 5 / result["num_classes"]
    assert result["zero_shot_before"] < 2 / result["num_classes"]


@pytest.mark.slow
@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA names no folder with real images")
def test_real_images_reach_forty_percent(tmp_path: Path) -> None:
    _, result = run_demo("--source", "configs/data/derm_images.yaml", "--out", tmp_path, timeout_s=1800)
    assert result["num_classes"] == 9
    assert result["zero_shot_after"] >= 0.40
