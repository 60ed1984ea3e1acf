"""Every launcher's way to tell a process its rank, turned into the one that torch and DeepSpeed read.

torchrun and DeepSpeed's own launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT themselves.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from data_prep.errors import InputError

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MASTER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
_DEEPSPEED_PORT = "29500"  # what its launchers take


def adopt_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what torch reads from what `srun`, or an OpenMPI that DeepSpeed started, has set.

    Leaves a launcher's own variables alone, and a process without a launcher as it is. MASTER_ADDR and MASTER_PORT
    that are set already stay. Raises InputError for an environment that is set in part, naming the variable.
    """
    is_set = [name for name in _RANK_VARIABLES if name in environment]
    if is_set:
        for name in (*_RANK_VARIABLES, *_MASTER_VARIABLES):
            if name not in environment:
                raise InputError(f"{name}: not set, although {is_set[0]} is; set what torchrun sets, or none of it")
    elif int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:  # before SLURM: mpirun's daemons are tasks of srun
        _adopt(environment, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environment["WORLD_SIZE"]:
            environment.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_ADDR" not in environment:
            raise InputError("MASTER_ADDR: not set; give mpirun the host of rank 0, -x MASTER_ADDR=HOST")
        environment.setdefault("MASTER_PORT", _DEEPSPEED_PORT)
    elif _is_slurm_step(environment):
        _adopt(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        environment.setdefault("MASTER_ADDR", first_host(_get(environment, "SLURM_STEP_NODELIST")))
        job, step = _count(environment, "SLURM_JOB_ID"), _count(environment, "SLURM_STEP_ID")
        # below the ports that a kernel gives away; another one for each job and step that share a node
        environment.setdefault("MASTER_PORT", str(20_000 + (job * 31 + step) % 10_000))
    if "RANK" in environment and not _count(environment, "RANK") < _count(environment, "WORLD_SIZE"):
        raise InputError(f"RANK: {environment['RANK']} is no rank of WORLD_SIZE {environment['WORLD_SIZE']}")


def _is_slurm_step(environment: MutableMapping[str, str]) -> bool:
    """A task of `srun` among several: a batch script itself has no SLURM_STEP_NUM_TASKS."""
    return "SLURM_STEP_NUM_TASKS" in environment and _count(environment, "SLURM_STEP_NUM_TASKS") > 1


def first_host(nodelist: str) -> str:
    """`node[08-11,14],gpu2` -> `node08`: the first host of SLURM's short form."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if first is None:
        raise InputError(f"SLURM_STEP_NODELIST: {nodelist!r} names no host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def _adopt(environment: MutableMapping[str, str], rank: str, world_size: str, local_rank: str) -> None:
    for ours, theirs in zip(_RANK_VARIABLES, (rank, world_size, local_rank), strict=True):
        environment[ours] = str(_count(environment, theirs))


def _get(environment: MutableMapping[str, str], name: str) -> str:
    if name not in environment:
        raise InputError(f"{name}: not set, although this process was started as one of several; start it by srun")
    return environment[name]


def _count(environment: MutableMapping[str, str], name: str) -> int:
    value = _get(environment, name)
    if not value.isdecimal():
        raise InputError(f"{name}: {value!r} is no number")
    return int(value)
