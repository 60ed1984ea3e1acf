"""What the tests of the job scripts share: a checkout as they see it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import run_config  # noqa: F401 (a fixture)

REPOSITORY = Path(__file__).resolve().parents[2]
SALT = "a secret of these tests"


@pytest.fixture
def submit_dir(tmp_path: Path) -> Path:
    """What the scripts see of a checkout, with the environment that a user would write."""
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("env.sh"))
    environment = {
        "PATH": f"{Path(sys.executable).parent}:$PATH",
        "PYTHONPATH": str(REPOSITORY),
        "DERMVLP_SALT": SALT,
        "DERMVLP_DATA": os.environ.get("DERMVLP_DATA", ""),
    }
    lines = [f'export {name}="{value}"' for name, value in environment.items()]
    # as modules and conda do, which the script must bear
    lines.append('if [ "$NOT_SET_ANYWHERE" = 1 ]; then false; fi')
    add_to_environment(tmp_path, *lines)
    return tmp_path


def add_to_environment(submit_dir: Path, *lines: str) -> None:
    with (submit_dir / "slurm" / "env.sh").open("a", encoding="utf-8") as file:
        file.write("\n".join([*lines, ""]))


def logs(submit_dir: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text(encoding='utf-8')}" for path in sorted(submit_dir.glob("*.out")))
