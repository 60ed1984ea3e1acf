"""An environment of its own for img2dataset, made once under `.cache/`: its pins (opencv, albumentations, webdataset)
are not ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_PINS = ("img2dataset==1.47.0", "albumentations==1.4.24", "opencv-python-headless==4.14.0.94", "numpy==2.4.6")
_DIRECTORY = Path(__file__).resolve().parents[1] / ".cache" / "img2dataset"

#: albumentations asks the network for its newest version when it is imported
ENVIRONMENT = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}


def python_path() -> Path:
    """The environment's Python. Raises SystemExit with pip's last lines where it cannot be made."""
    marker = _DIRECTORY / "installed.txt"
    path = _DIRECTORY / "bin" / "python"
    if marker.is_file() and marker.read_text(encoding="utf-8") == "\n".join(_PINS):
        return path
    shutil.rmtree(_DIRECTORY, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(_DIRECTORY)],
        [str(path), "-m", "pip", "install", "--quiet", "--only-binary=:all:", *_PINS],
        [str(path), "-c", "import img2dataset"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        if done.returncode != 0:
            last_lines = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
            raise SystemExit(f"img2dataset cannot be installed (it needs the network once):\n{last_lines}")
    marker.write_text("\n".join(_PINS), encoding="utf-8")
    return path
