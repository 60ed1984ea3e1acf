"""One rank of a run: `torchrun --nproc_per_node=N -m pretrain.train CONFIG [key.path=value ...]`."""

from __future__ import annotations

import argparse
import sys

from data_prep.config import load_config
from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.distributed import comm
from pretrain.train.loop import train


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.train", description=__doc__)
    parser.add_argument("config", help="YAML file, see configs/pretrain/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args(argv)
    try:
        train(load_config(arguments.config, arguments.overrides, TrainConfig))
    except InputError as error:
        if comm.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: rank {comm.rank()}: {error}", file=sys.stderr)
        return 1
    finally:
        comm.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
