"""A ZeRO checkpoint of another number of ranks: DeepSpeed's converter makes it universal, and each rank takes its part.

    UNIVERSAL/zero/PARAMETER/{fp32,exp_avg,exp_avg_sq}.pt, step.pt at ZeRO 1 and 2
    UNIVERSAL/zero/optimizer_state.pt        what is no tensor of one parameter: loss scale; at ZeRO 3 the step

Read here and not by DeepSpeed (0.19's `load_universal`): at ZeRO 3 that gives every group the weight decay and the
layer-wise rate of the first one, and one `step` tensor, which torch's AdamW then counts up once a group; at ZeRO 1 and
2 it fails on a rank that holds nothing but a group's padding.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.distributed import comm

_MOMENTS = ("exp_avg", "exp_avg_sq")


@contextlib.contextmanager
def convert(folder: Path, into: Path) -> Iterator[Path]:
    """The DeepSpeed checkpoint `folder` in universal form inside `into`, until all ranks leave; rank 0 converts.

    Raises InputError on every rank where that is not possible.
    """
    problem: str | None = None
    universal = into / "universal"  # the converter writes a file beside it, too
    if comm.rank() == 0:
        shutil.rmtree(into, ignore_errors=True)  # of an attempt that was killed
        problem = _convert_here(folder, universal)
    problem = comm.from_rank_0(problem)
    if problem is None:
        yield universal  # a rank that fails here alone goes straight out, and the others miss it
        comm.barrier()
    if comm.rank() == 0:
        shutil.rmtree(into, ignore_errors=True)
    if problem is not None:
        raise InputError(
            f"{folder}: was written by another number of ranks and could not be converted ({problem}); "
            "start as many ranks as wrote it"
        )


def _convert_here(folder: Path, into: Path) -> str | None:
    """Why not, or None."""
    from deepspeed.checkpoint.ds_to_universal import main

    options = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(into),
        num_extract_workers=1,  # more are forks of this process, which holds a device and threads
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            main(options)
    except Exception as error:  # one rank's alone: the others must hear of any
        return f"{type(error).__name__}: {error}"
    return None


def load_universal(optimizer: Any, zero_stage: int, universal: Path) -> None:
    """Fills the masters, AdamW's state and the weights of DeepSpeed's ZeRO optimizer. All ranks call it.

    What does not learn is not touched: frozen weights are what the model was built with.
    """
    if getattr(optimizer, "swap_optimizer", False):
        raise InputError("engine.deepspeed: with states on NVMe the number of ranks cannot change; start as many")
    zero_dir = universal / "zero"
    common = _read_common(zero_dir / "optimizer_state.pt")
    if zero_stage == 3:
        optimizer.checkpoint_event_prologue()
        _load_partitions(optimizer, zero_dir, common["optimizer_state_dict"]["state"][0]["step"])
        optimizer.checkpoint_event_epilogue()
    else:
        _load_flat_groups(optimizer, zero_dir)
        optimizer.update_lp_params()
    if "loss_scaler" in common:
        optimizer.loss_scaler = common["loss_scaler"]


def _load_flat_groups(optimizer: Any, zero_dir: Path) -> None:
    """ZeRO 1 and 2: a rank holds one range of each group's parameters, laid end to end, with padding at the end."""
    names = optimizer.param_names
    if hasattr(optimizer, "bf16_groups"):  # bf16 gradients that are added up in fp32, at ZeRO 1
        groups, masters = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    else:
        groups, masters = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    for group, master in zip(groups, masters, strict=True):
        state = _zero_moments(master, _read(zero_dir / names[group[0]] / "step.pt"))
        for parameter in group:
            if parameter._hp_mapping is None:  # on other ranks altogether
                continue
            here, there = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
            for key, target in _targets(master, state):
                whole = _read(zero_dir / names[parameter] / f"{key}.pt")["param"].flatten()
                target.narrow(0, here.start, here.numel).copy_(whole.narrow(0, there.start, there.numel))
        optimizer.optimizer.state[master] = state


def _load_partitions(optimizer: Any, zero_dir: Path, step: Tensor) -> None:
    """ZeRO 3: a rank holds a W-th of every parameter, the last ones with padding."""
    for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        state, offset = _zero_moments(master, step), 0
        for parameter in optimizer.fp16_groups[number]:
            size = parameter.partition_numel()
            for key, target in _targets(master, state):
                whole = _read(zero_dir / optimizer.param_names[parameter] / f"{key}.pt")
                whole = whole["param"] if isinstance(whole, dict) else whole
                own = whole.flatten()[size * comm.rank() : size * (comm.rank() + 1)]
                target.narrow(0, offset, own.numel()).copy_(own)
            offset += size
        optimizer.optimizer.state[master] = state
        optimizer.fp16_partitioned_groups_flat[number].data.copy_(master.data)
        optimizer._unflatten_partitioned_parameters(number)


def _zero_moments(master: Tensor, step: Tensor) -> dict[str, Tensor]:
    return {"step": step.clone(), **{key: torch.zeros_like(master.data) for key in _MOMENTS}}


def _targets(master: Tensor, state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [("fp32", master.data), *((key, state[key]) for key in _MOMENTS)]


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_common(path: Path) -> dict[str, Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        common: dict[str, Any] = _read(path)
    return common
