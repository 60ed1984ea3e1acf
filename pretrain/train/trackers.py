"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

Keys come from the trackers' own environment variables (WANDB_API_KEY, HF_TOKEN), and no network is needed with
WANDB_MODE=offline, nor ever for the other two. A resumed run goes on in the same run of each, by what
RUN_DIR/trackers.json keeps. The steps that a resume does again replace the earlier ones in TensorBoard; wandb
ignores them, and Trackio has them twice: they are equal, unless the run went back before a bad step.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from data_prep.config_file import dump_yaml
from data_prep.errors import InputError
from data_prep.files import write_atomically
from pretrain.config import TrainConfig
from pretrain.distributed import comm
from pretrain.train.agreement import SharedInputError

PROJECT = "dermvlp"
_SECRETS = ("WANDB_API_KEY", "HF_TOKEN")


class Tracker(Protocol):
    name: str

    def write(self, step: int, values: dict[str, float]) -> None:
        """`step` steps are done."""

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises InputError, with the remedy, for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            package = "tensorboard" if name == "tensorboard" else f'"dermvlp[{name}]"'
            raise InputError(f"trackers: {name} is not installed; pip install {package}, or leave it out")


def open_trackers(config: TrainConfig, first_step: int, say: Callable[[str], None]) -> list[Tracker]:
    """The trackers of the config on rank 0, none elsewhere; all ranks call it.

    Raises SharedInputError for one that cannot start. On resume (`first_step` > 0) it is left out instead,
    with a warning: a run that comes back by itself at night must not wait for somebody else's server.
    """
    trackers, problem = [], None
    for name in config.trackers if comm.rank() == 0 else ():
        try:
            trackers.append(_OPEN[name](config, first_step))
        except Exception as error:  # of somebody else's library, or the server behind it
            problem = f"trackers: {name} cannot start ({describe(error)})"
            if first_step > 0:
                say(f"warning: {problem}; left out")
    problem = comm.from_rank_0(problem)
    if problem is not None and first_step == 0:
        raise SharedInputError(f"{problem}; leave it out, or see its manual (offline: WANDB_MODE=offline)")
    return trackers


def describe(error: Exception) -> str:
    """What went wrong, without the keys in the environment."""
    text = f"{type(error).__name__}: {error}"
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        text = text.replace(secret, "***")
    return text


class _TensorBoard:
    name = "tensorboard"

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        folder = config.run_dir / "tensorboard"
        is_new = not any(folder.glob("events.*"))
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        if is_new:
            self._writer.add_text("config", f"```yaml\n{dump_yaml(config)}```", 0)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a kill would lose two minutes of what is written only once

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    name = "wandb"

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        import wandb

        kept = _kept(config, self.name)
        self._run = wandb.init(
            project=PROJECT,
            name=_run_name(config),
            id=kept or _keep(config, self.name, uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(config.run_dir),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),  # it would catch the live view
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """It knows a run by its name, and gives another one where the name is taken."""

    name = "trackio"

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        import trackio

        kept = _kept(config, self.name)
        self._run: Any = trackio.init(
            project=PROJECT,
            name=kept or _run_name(config),
            resume="allow" if kept else "never",
            config=config.model_dump(mode="json"),
        )
        _keep(config, self.name, self._run.name)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


_OPEN: dict[str, Callable[[TrainConfig, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def _run_name(config: TrainConfig) -> str:
    return config.run_dir.resolve().name


def _read_kept(config: TrainConfig) -> dict[str, str]:
    path = config.run_dir / "trackers.json"
    kept: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return kept


def _kept(config: TrainConfig, tracker: str) -> str | None:
    """By what the tracker knows this run."""
    return _read_kept(config).get(tracker)


def _keep(config: TrainConfig, tracker: str, identity: str) -> str:
    kept = _read_kept(config) | {tracker: identity}
    write_atomically(config.run_dir / "trackers.json", json.dumps(kept).encode())
    return identity
