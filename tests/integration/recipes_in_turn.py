"""Several recipes as trials in one process group: `torchrun -m tests.integration.recipes_in_turn DATA RUNS NAME ...`.

Each is loaded and trained as `python -m pretrain.train` does it; only the start of the processes is shared.
"""

from __future__ import annotations

import sys
import traceback


def main(train_dir: str, runs_dir: str, *names: str) -> None:
    # here, so that what a spawned process imports stays small
    from pretrain.distributed import comm
    from pretrain.train.__main__ import load_training_config
    from pretrain.train.loop import train

    for name in names:
        places = [f"data.train_dir={train_dir}", f"run_dir={runs_dir}/{name}"]
        overrides = ["trial=true", "launch.num_ranks=2", "data.num_workers=0", *places]
        try:
            train(load_training_config(f"configs/pretrain/{name}.yaml", overrides))
        except Exception:  # the next recipe is tried all the same; the test of this one finds no checkpoint
            print(f"{name}, rank {comm.rank()}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    comm.shut_down()


if __name__ == "__main__":
    main(*sys.argv[1:])
