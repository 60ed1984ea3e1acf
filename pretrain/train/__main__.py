"""One rank of a run: `torchrun --nproc_per_node=N -m pretrain.train CONFIG [key.path=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_prep.config import load_config
from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.distributed import comm
from pretrain.evaluation.in_training import make_validator
from pretrain.train.loop import train
from pretrain.train.signals import REQUEUE_STATUS
from pretrain.trial import as_trial


def load_training_config(path: str, overrides: Sequence[str]) -> TrainConfig:
    config = load_config(path, list(overrides), TrainConfig)
    return as_trial(config) if config.trial else config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.train", description=__doc__)
    parser.add_argument("config", help="YAML file, see configs/pretrain/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args(argv)
    try:
        outcome = train(load_training_config(arguments.config, arguments.overrides), make_validator)
    except (InputError, OSError) as error:
        # an error can be one rank's alone (a damaged file that only it reads), so each says its own
        who = f"rank {comm.rank()}: " if comm.world_size() > 1 else ""
        print(f"error: {who}{error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 1
    finally:
        comm.shut_down()
    return 0 if outcome.finished else REQUEUE_STATUS


if __name__ == "__main__":
    sys.exit(main())
