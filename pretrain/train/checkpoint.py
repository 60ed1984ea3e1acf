"""Checkpoints that cannot be torn, and resume.

    RUN_DIR/checkpoints/step-00000500/
        meta.json          step, resolved config, data, ranks, size of every file; written last
        model.safetensors  fp32 weights of the whole module: for evaluation and export
        model.json         the towers, as a model config: the checkpoint can be read after configs/models/ changed
        teacher.safetensors  where there is an EMA teacher
        engine/, or torch_engine.pt: what DeepSpeed, or the plain engine, needs to go on

Every rank writes into `step-N.partial`; when all agree, rank 0 lists the files in meta.json, reads that back and
renames the folder. Resume takes the newest whole one, whatever was killed (retention.py: whole, kept, removed).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_prep.errors import InputError
from data_prep.files import write_atomically
from pretrain.config import TrainConfig
from pretrain.distributed import comm
from pretrain.distributed.engine import full_tensors
from pretrain.models.open_clip_config import resolved_spec
from pretrain.train.hardware import hardware_name
from pretrain.train.record import RunRecord
from pretrain.train.retention import (
    checkpoint_folder,
    list_checkpoints,
    list_checksums,
    list_files,
    note_passed_over,
    prune,
    read_meta,
    read_passed_over,
    remove_checkpoint,
    remove_leftovers,
    set_aside,
    whole_checkpoints,
)
from pretrain.train.trainer import Trainer

__all__ = ["list_checkpoints", "read_meta"]  # for those that read checkpoints

#: what may differ between the run that wrote a checkpoint and the one that goes on: it does not change the result
#: (what the paths lead to is compared by content: the data by its digest, the towers by their config)
_FREE_KEYS = {
    *("run_dir", "log_every", "trackers", "checkpoint", "validation", "bad_steps", "launch"),
    *("data.num_workers", "data.prefetch_batches", "data.stage_dir", "data.max_damaged_fraction", "data.train_dir"),
    "data.stream.url",
    *("model.name", "engine.collective_timeout_minutes"),
}


def save_checkpoint(trainer: Trainer, record: RunRecord, data_digest: str) -> Path:
    """All ranks call it. Raises OSError, on the ranks that could not write at least; earlier checkpoints stay whole."""
    run_dir = trainer.config.run_dir
    final = checkpoint_folder(run_dir, record.step)
    partial = final.with_name(f"{final.name}.partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def flush() -> None:
        for path in [*partial.rglob("*"), partial]:
            _fsync(path)

    def publish() -> None:
        read_meta(partial)
        if final.exists():  # a torn one, or one of steps that are done again
            remove_checkpoint(final)
        partial.rename(final)
        _fsync(final.parent)
        prune(run_dir, trainer.config.checkpoint, record.best_step)

    _on_rank_0(partial, begin)
    with _writing(partial):  # DeepSpeed's save waits for all ranks inside: one that could not write must end alone
        trainer.engine.save(partial)
    model_state = _full_state(trainer)
    _on_rank_0(partial, lambda: _write_shared(trainer, partial, model_state, record, data_digest))
    # one process of each node: another node's cache is not flushed from here
    _on_all_ranks(partial, flush if comm.local_rank() == 0 else None)
    _on_rank_0(partial, publish)
    return final


def update_record(run_dir: Path, record: RunRecord) -> None:
    """In the checkpoint of this step, which was saved before it was validated. All ranks call it."""
    folder = checkpoint_folder(run_dir, record.step)

    def write() -> None:
        meta = read_meta(folder) | {"record": record.to_json()}
        write_atomically(folder / "meta.json", json.dumps(meta, indent=1).encode())

    _on_rank_0(folder, write)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What a failing write says, in whatever way its library says it, as an OSError with the remedy."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, InputError) as error:  # torch.save: RuntimeError for a full disk
        if comm.is_lost_peer(error):
            raise
        raise OSError(f"{folder}: the checkpoint could not be written ({_first_line(error)}); {_REMEDY}") from None


_REMEDY = "make room and start again: the run goes on from its newest whole checkpoint"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _on_rank_0(folder: Path, write: Callable[[], None]) -> None:
    _on_all_ranks(folder, write if comm.rank() == 0 else None)


def _on_all_ranks(folder: Path, write: Callable[[], None] | None) -> None:
    """Runs `write` where there is one and waits for all; every rank raises when one could not write."""
    problem: OSError | None = None
    try:
        if write is not None:
            with _writing(folder):
                write()
    except OSError as error:
        problem = error
    if not comm.all_agree(problem is None):
        raise problem or OSError(f"{folder}: another rank could not write its part of the checkpoint; {_REMEDY}")


def _write_shared(
    trainer: Trainer, folder: Path, model_state: dict[str, torch.Tensor], record: RunRecord, data_digest: str
) -> None:
    save_file(model_state, folder / "model.safetensors")
    towers = asdict(trainer.model.spec)
    towers["preprocess_cfg"] = trainer.model.visual.preprocess_cfg  # of the pretrained weights, where there were some
    (folder / "model.json").write_text(json.dumps(towers, indent=1), encoding="utf-8")
    if trainer.teacher is not None and trainer.ema is not None:
        save_file(_contiguous(trainer.teacher.state_dict()), folder / "teacher.safetensors")
    meta = {
        "step": record.step,
        "record": record.to_json(),
        "samples_seen": record.step * trainer.config.global_batch_size,
        "config": trainer.config.model_dump(mode="json"),
        "data_digest": data_digest,
        "num_ranks": comm.world_size(),
        "hardware": hardware_name(),
        "files": list_files(folder),
        "crc32": list_checksums(folder),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _full_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """On rank 0 the fp32 parameters and buffers of the module; all ranks call it and hold one parameter at a time."""
    module, state = trainer.engine.module, {}
    persistent = module.state_dict().keys()
    for name, tensor in full_tensors(trainer.engine, module):
        if comm.rank() == 0:
            state[name] = tensor.cpu()
    return _contiguous(state | {name: b for name, b in trainer.engine.full_buffers() if name in persistent})


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_config(checkpoint: Path) -> TrainConfig:
    """The config that a checkpoint was written with, its towers read from the checkpoint itself, weights untouched."""
    config = TrainConfig.model_validate(read_meta(checkpoint)["config"])
    built: dict[str, Any] = {"name": str(checkpoint / "model.json"), "pretrained": None, "image_size": None}
    for tower in ("image", "text"):
        built[tower] = getattr(config.model, tower).model_copy(update={"weights": None})
    return config.model_copy(update={"model": config.model.model_copy(update=built)})


def find_resumable(config: TrainConfig, data_digest: str) -> tuple[Path, int] | None:
    """The newest whole checkpoint of the run and its step, if it has one.

    Raises InputError for one that another configuration or other data wrote, and where none of them is whole.
    """
    found = _newest_whole(config.run_dir)
    if found is None:
        return None
    newest, meta = found
    _check_same_run(newest, meta, config, data_digest)
    return newest, int(meta["step"])


def _newest_whole(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    whole, skipped = whole_checkpoints(run_dir)
    if skipped and not whole:
        raise InputError(
            f"{run_dir}: no checkpoint is whole; remove the folder `checkpoints` to begin anew:\n  "
            + "\n  ".join(skipped.values())
        )
    return whole[-1] if whole else None


def _check_same_run(checkpoint: Path, meta: dict[str, Any], config: TrainConfig, data_digest: str) -> None:
    config = _with_edges(config, meta)
    ours, theirs = _flatten(config.model_dump(mode="json")), _flatten(meta["config"])
    ours |= _flatten(resolved_spec(config.model).model_cfg, "towers")
    theirs |= _flatten(json.loads((checkpoint / "model.json").read_text(encoding="utf-8"))["model_cfg"], "towers")
    differences = [
        f"  {key}: {theirs.get(key)!r} in the checkpoint, {ours.get(key)!r} now"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not _is_free(key)
    ]
    if differences:
        raise InputError(
            f"{checkpoint}: written by a run of another configuration; choose another run_dir, or set it back:\n"
            + "\n".join(differences)
        )
    if meta["data_digest"] != data_digest:
        raise InputError(
            f"{checkpoint}: {config.data.train_dir} holds other samples than the run began with; choose another run_dir"
        )


def _with_edges(config: TrainConfig, meta: dict[str, Any]) -> TrainConfig:
    """Where the config leaves the text buckets' edges open, those of the run: a resume must not choose anew."""
    if config.data.text_bucket_edges is not None:
        return config
    edges = meta["config"]["data"]["text_bucket_edges"]
    return config.model_copy(update={"data": config.data.model_copy(update={"text_bucket_edges": tuple(edges)})})


def with_edges_of_checkpoint(config: TrainConfig) -> TrainConfig:
    found = comm.decided_by_rank_0(lambda: _newest_whole(config.run_dir))
    return config if found is None else _with_edges(config, found[1])


def resume(trainer: Trainer, data_digest: str, pass_over: int | None = None) -> RunRecord:
    """Loads the newest whole checkpoint of the run, if it has one, and says what it skipped. All ranks call it.

    `pass_over` is a step, counted from 0, whose batch is bad: goes back to the newest checkpoint before it, and removes
    the later ones; neither this attempt nor a later one takes its batch again. Raises InputError where there is none.
    """
    run_dir = trainer.config.run_dir

    def choose() -> tuple[tuple[Path, int] | None, list[int]]:
        if pass_over is not None:
            _go_back(run_dir, pass_over)
        found = find_resumable(trainer.config, data_digest)
        _clean(run_dir)
        return found, read_passed_over(run_dir)

    # a shared file system can show other ranks an older state
    found, passed_over = comm.decided_by_rank_0(choose)
    record = RunRecord()
    if found is not None:
        newest, _ = found
        meta = read_meta(newest)
        trainer.engine.load(newest, meta["num_ranks"])
        if trainer.teacher is not None and trainer.ema is not None:
            trainer.teacher.load_state_dict(load_file(newest / "teacher.safetensors"))
        record = RunRecord.from_json(meta["record"])
    record.passed_over = sorted({*record.passed_over, *passed_over})
    return record


def _go_back(run_dir: Path, bad_step: int) -> None:
    whole, _ = whole_checkpoints(run_dir)
    if not any(meta["step"] <= bad_step for _, meta in whole):
        raise InputError(
            f"{run_dir}: no checkpoint from before step {bad_step + 1} to go back to; lower optimizer.lr and begin "
            "anew, or set checkpoint.every to fewer steps"
        )
    note_passed_over(run_dir, bad_step)  # from here on no resume takes the later ones, should this process be killed
    for checkpoint, meta in whole:
        if meta["step"] > bad_step:
            remove_checkpoint(checkpoint)


def _clean(run_dir: Path) -> None:
    """Says what is left out, and takes it from where the next pruning would count it among the last n."""
    _, skipped = whole_checkpoints(run_dir)
    said = [f"skipped: {reason}" for reason in skipped.values()]
    for checkpoint in skipped:
        said.append(f"{checkpoint}: now {set_aside(checkpoint).name}")
    for line in [*said, *remove_leftovers(run_dir)]:
        print(line, file=sys.stderr, flush=True)


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        items: list[tuple[str, Any]] = [(str(key), value) for key, value in node.items()]
    elif isinstance(node, list):
        items = [(str(position), value) for position, value in enumerate(node)]
    else:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
