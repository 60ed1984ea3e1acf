"""Starts the ranks of a run on this machine: `dermvlp train CONFIG`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from pretrain.data.manifest import ShardedDataset
from pretrain.data.reader import check_batch_size
from pretrain.train.__main__ import load_training_config
from pretrain.train.__main__ import main as train_here
from pretrain.train.checkpoint import find_resumable
from pretrain.train.state import with_num_steps


def launch(config_path: str, overrides: Sequence[str]) -> int:
    """The exit status. With one rank, or under a launcher already, this process is the rank.

    What can be refused without towers is refused here first, so that a mistake is one message and not one a rank.
    """
    config = load_training_config(config_path, overrides)
    if config.launch.num_ranks == 1 or "RANK" in os.environ:
        return train_here([config_path, *overrides])
    data = ShardedDataset(config.data.train_dir)
    check_batch_size(data, config.global_batch_size, config.launch.num_ranks)
    # the edges of the text buckets depend on the tokenizer: the ranks compare them
    open_edges = config.model_copy(update={"data": config.data.model_copy(update={"text_bucket_edges": None})})
    find_resumable(with_num_steps(open_edges), data.digest, config.launch.num_ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={config.launch.num_ranks}", "-m", "pretrain.train", config_path, *overrides]
    environment = dict(os.environ)
    if config.launch.threads_per_rank is not None:
        environment["OMP_NUM_THREADS"] = str(config.launch.threads_per_rank)
    return subprocess.run(command, env=environment, check=False).returncode
