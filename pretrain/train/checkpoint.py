"""Checkpoints that cannot be torn, and resume.

    RUN_DIR/checkpoints/step-00000500/
        meta.json          step, resolved config, data, ranks, size of every file; written last
        model.safetensors  fp32 weights of the whole module: for evaluation and export
        model.json         the towers, as a model config: the checkpoint can be read after configs/models/ changed
        teacher.safetensors  where there is an EMA teacher
        engine/, or torch_engine.pt: what DeepSpeed, or the plain engine, needs to go on

Every rank writes into `step-N.partial`; when all agree, rank 0 lists the files in meta.json and renames the folder.
A folder with the final name is whole, whatever was killed, so resume takes the newest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.distributed import comm
from pretrain.distributed.engine import full_tensors
from pretrain.models.open_clip_config import resolved_spec
from pretrain.train.record import RunRecord
from pretrain.train.trainer import Trainer

#: what may differ between the run that wrote a checkpoint and the one that goes on: it does not change the result
#: (what the paths lead to is compared by content: the data by its digest, the towers by their config)
_FREE_KEYS = {
    *("run_dir", "log_every", "trackers", "checkpoint", "validation", "bad_steps", "launch"),
    *("data.num_workers", "data.prefetch_batches", "data.stage_dir", "data.max_damaged_fraction", "data.train_dir"),
    *("model.name", "engine.collective_timeout_minutes"),
}


def save_checkpoint(trainer: Trainer, record: RunRecord, data_digest: str) -> Path:
    """All ranks call it. Raises OSError on every rank when one could not write."""
    final = _folder(trainer.config.run_dir, record.step)
    partial = final.with_suffix(".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write_own() -> None:
        trainer.engine.save(partial)
        for path in partial.rglob("*"):  # each rank: another node's cache is not flushed from here
            _fsync(path)

    def publish() -> None:
        for path in partial.rglob("*"):
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _fsync(final.parent)
        for old in list_checkpoints(trainer.config.run_dir)[: -trainer.config.checkpoint.keep_last]:
            shutil.rmtree(old)

    _on_rank_0(partial, begin)
    _on_all_ranks(partial, write_own)
    model_state = _full_state(trainer)
    _on_rank_0(partial, lambda: _write_shared(trainer, partial, model_state, record, data_digest))
    _on_rank_0(partial, publish)
    return final


def _on_rank_0(folder: Path, write: Callable[[], None]) -> None:
    _on_all_ranks(folder, write if comm.rank() == 0 else None)


def _on_all_ranks(folder: Path, write: Callable[[], None] | None) -> None:
    """Runs `write` where there is one and waits for all; every rank raises when one could not write."""
    problem: OSError | None = None
    try:
        if write is not None:
            write()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save tells of a full disk by RuntimeError
        problem = OSError(str(error))
    if not comm.all_agree(problem is None):
        raise OSError(f"{folder}: the checkpoint could not be written ({problem or 'on another rank'}); disk full?")


def _write_shared(
    trainer: Trainer, folder: Path, model_state: dict[str, torch.Tensor], record: RunRecord, data_digest: str
) -> None:
    save_file(model_state, folder / "model.safetensors")
    towers = asdict(trainer.model.spec)
    towers["preprocess_cfg"] = trainer.model.visual.preprocess_cfg  # of the pretrained weights, where there were some
    (folder / "model.json").write_text(json.dumps(towers, indent=1), encoding="utf-8")
    if trainer.teacher is not None and trainer.ema is not None:
        save_file(_contiguous(trainer.teacher.state_dict()), folder / "teacher.safetensors")
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    meta = {
        "step": record.step,
        "record": record.to_json(),
        "samples_seen": record.step * trainer.config.global_batch_size,
        "config": trainer.config.model_dump(mode="json"),
        "data_digest": data_digest,
        "num_ranks": comm.world_size(),
        "files": files,
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


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Whole ones, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name))


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Raises InputError when a file is missing or not of the size it was written with."""
    path = checkpoint / "meta.json"
    if not path.is_file():
        raise InputError(f"{path}: missing; {checkpoint} is no checkpoint of dermvlp")
    meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, size in meta["files"].items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise InputError(
                f"{file}: missing or not of the size it was written with; remove {checkpoint} to resume before it"
            )
    return meta


def checkpoint_config(checkpoint: Path) -> TrainConfig:
    """The config that a checkpoint was written with, its towers read from the checkpoint itself, weights untouched."""
    config = TrainConfig.model_validate(read_meta(checkpoint)["config"])
    built: dict[str, Any] = {"name": str(checkpoint / "model.json"), "pretrained": None, "image_size": None}
    for tower in ("image", "text"):
        built[tower] = getattr(config.model, tower).model_copy(update={"weights": None})
    return config.model_copy(update={"model": config.model.model_copy(update=built)})


def find_resumable(config: TrainConfig, data_digest: str, num_ranks: int) -> tuple[Path, int] | None:
    """The newest checkpoint of the run and its step, if it has one.

    Raises InputError for one that another configuration, other data or another number of ranks wrote.
    """
    checkpoints = list_checkpoints(config.run_dir)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    meta = read_meta(newest)
    config = _with_edges(config, meta)
    ours, theirs = _flatten(config.model_dump(mode="json")), _flatten(meta["config"])
    ours |= _flatten(resolved_spec(config.model).model_cfg, "towers")
    theirs |= _flatten(json.loads((newest / "model.json").read_text(encoding="utf-8"))["model_cfg"], "towers")
    differences = [
        f"  {key}: {theirs.get(key)!r} in the checkpoint, {ours.get(key)!r} now"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not _is_free(key)
    ]
    if differences:
        raise InputError(
            f"{newest}: written by a run of another configuration; choose another run_dir, or set it back:\n"
            + "\n".join(differences)
        )
    if meta["data_digest"] != data_digest:
        raise InputError(
            f"{newest}: {config.data.train_dir} holds other samples than the run began with; choose another run_dir"
        )
    if meta["num_ranks"] != num_ranks:
        raise InputError(f"{newest}: written by {meta['num_ranks']} rank(s), now {num_ranks}; start as many")
    return newest, int(meta["step"])


def _with_edges(config: TrainConfig, meta: dict[str, Any]) -> TrainConfig:
    """Where the config leaves the text buckets' edges open, those of the run: a resume must not choose anew."""
    if config.data.text_bucket_edges is not None:
        return config
    edges = meta["config"]["data"]["text_bucket_edges"]
    return config.model_copy(update={"data": config.data.model_copy(update={"text_bucket_edges": tuple(edges)})})


def with_edges_of_checkpoint(config: TrainConfig) -> TrainConfig:
    checkpoints = comm.from_rank_0(list_checkpoints(config.run_dir))
    return _with_edges(config, read_meta(checkpoints[-1])) if checkpoints else config


def resume(trainer: Trainer, data_digest: str, pass_over: int | None = None) -> RunRecord:
    """Load the newest checkpoint of the run, if it has one. `pass_over`: go back before this step, whose batch is bad.

    Rank 0 chooses for all: a shared file system can show other ranks an older state.
    """
    problem: InputError | None = None
    found: tuple[Path, int] | None = None
    if comm.rank() == 0:
        try:
            found = find_resumable(trainer.config, data_digest, comm.world_size())
        except InputError as error:
            problem = error
    found, problem = comm.from_rank_0((found, problem))
    if problem is not None:
        raise problem
    if found is None:
        return RunRecord()
    newest, _ = found
    trainer.engine.load(newest)
    if trainer.teacher is not None and trainer.ema is not None:
        trainer.teacher.load_state_dict(load_file(newest / "teacher.safetensors"))
    return RunRecord.from_json(read_meta(newest)["record"])


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
