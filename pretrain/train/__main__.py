"""One rank of a run: `torchrun --nproc_per_node=N -m pretrain.train CONFIG [key.path=value ...]`.

Exit status: 0 finished, 75 saved because a signal asked it to stop, 2 refused, 130 ended by a second Ctrl-C, 1 else.
torchrun makes 1 of all but 0; `dermvlp train` hands the ranks' status on.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.train.launched import register, report
from pretrain.train.signals import REQUEUE_STATUS, hold

if TYPE_CHECKING:
    from pretrain.config import TrainConfig

# What takes seconds to import is imported when signals are held back already.


def load_training_config(path: str, overrides: Sequence[str]) -> TrainConfig:
    from data_prep.config_file import load_config
    from pretrain.config import TrainConfig
    from pretrain.trial import as_trial

    config = load_config(path, list(overrides), TrainConfig)
    return as_trial(config) if config.trial else config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.train", description=__doc__)
    parser.add_argument("config", help="YAML file, see configs/pretrain/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it, beside LOCAL_RANK
    arguments = parser.parse_args(argv)

    from data_prep.errors import InputError
    from pretrain.distributed import comm
    from pretrain.distributed.launchers import adopt_environment
    from pretrain.evaluation.in_training import make_validator
    from pretrain.train.agreement import SharedInputError
    from pretrain.train.loop import train
    from pretrain.train.watch import LauncherWatch

    failed = True
    try:
        adopt_environment()
        with LauncherWatch():
            outcome = train(load_training_config(arguments.config, arguments.overrides), make_validator)
        failed = False
    except SharedInputError as error:
        if comm.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        comm.barrier()  # a launcher ends the ranks with the first that is gone: rank 0 speaks before
        return 2
    except (InputError, OSError) as error:
        return _say(error, 2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except RuntimeError as error:
        if not comm.is_lost_peer(error):
            raise
        return _say(f"{comm.LOST_PEER} ({_first_line(error)})", 1)
    finally:
        if not failed or comm.world_size() == 1:  # what is under way between ranks would end the process by SIGABRT
            comm.shut_down()
    return 0 if outcome.finished else REQUEUE_STATUS


def _say(message: object, status: int) -> int:
    """An error can be one rank's alone (a damaged file that only it reads), so each says its own."""
    from pretrain.distributed import comm

    who = f"rank {comm.rank()}: " if comm.world_size() > 1 else ""
    print(f"error: {who}{message}", file=sys.stderr, flush=True)
    return status


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _run_as_rank() -> None:
    """This process is a rank and nothing else."""
    hold()
    register()
    try:
        status = main()
    except SystemExit as error:  # of the argument parser
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    exit_status = report(status)
    if exit_status != 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)  # without what libraries do at exit: they can wait for ranks that are gone
    from pretrain.distributed import comm

    comm.end_process(0)


if __name__ == "__main__":
    _run_as_rank()
