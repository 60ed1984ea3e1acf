"""A stand-in for `wandb` and `trackio`, which are extras: the calls of their documented interfaces, written to a file.

Copied as wandb.py or trackio.py to a folder on the path, with the file in the environment.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def _record(call: str, **values: Any) -> None:
    with Path(os.environ["STAND_IN_CALLS"]).open("a") as file:
        file.write(json.dumps({"call": call, **values}) + "\n")


class Settings:
    def __init__(self, console: str) -> None:
        self.console = console


class Run:
    def __init__(self, name: str) -> None:
        self.name = name

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step == int(os.environ.get("STAND_IN_FAILS_AT", "-1")):
            raise ConnectionError(f"no route to the server, with {os.environ['WANDB_API_KEY']}")
        _record("log", step=step, values=metrics)

    def finish(self) -> None:
        _record("finish")


def init(project: str, name: str, config: dict[str, Any], resume: str, **others: Any) -> Run:
    if "STAND_IN_CANNOT_START" in os.environ:
        raise RuntimeError("the server does not answer")
    settings = others.pop("settings", None)
    _record("init", project=project, name=name, resume=resume, lr=config["optimizer"]["lr"], **others)
    assert settings is None or settings.console == "off"
    return Run(f"{name}-1" if resume == "never" else name)  # as trackio does where a name is taken
