"""DeepSpeed's dictionary in a real run: offloaded, with further options, printed and kept; misspelt, it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import write_config
from tests.integration.test_train import losses, run

pytestmark = pytest.mark.long


def test_offloaded_with_further_options(run_config: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", run_config | {"num_steps": 4, "checkpoint": {"every": 4}})
    engine = ("engine.kind=deepspeed", "engine.zero_stage=2", "engine.offload_optimizer=cpu")
    options = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 4000}}"
    result = run(config, 1, f"run_dir={tmp_path / 'offloaded'}", *engine, options)
    assert result.returncode == 0, result.stderr[-3000:]
    settings = json.loads((tmp_path / "offloaded" / "deepspeed.json").read_text())
    assert settings["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "reduce_bucket_size": 4000,
    }
    assert f"DeepSpeed {json.dumps(settings)}" in result.stderr.splitlines()

    plain = run(config, 1, f"run_dir={tmp_path / 'plain'}")
    assert plain.returncode == 0, plain.stderr[-3000:]
    for ours, reference in zip(losses(tmp_path / "offloaded"), losses(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(reference, rel=1e-4)


def test_a_misspelt_option_is_refused(run_config: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", run_config)
    result = run(config, 1, "engine.kind=deepspeed", "engine.deepspeed={communication_dtype: fp32}")
    assert result.returncode == 2
    expected = "engine.deepspeed.communication_dtype: DeepSpeed knows no such option"
    assert expected in result.stderr and "Traceback" not in result.stderr
