"""The folders of a run's checkpoints: which are whole, which are kept, how one is removed.

step-00000500           published by a rename when every rank had written; may still be torn by a failing disk
step-00000500.partial   being written, or left by a kill
step-00000500.removed   being removed, or left by a kill
step-00000500.aside     torn, or holding a bad step: found by a resume; never read, removed by hand
passed_over.json        steps whose batch is never taken again (see BadStepConfig)
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.files import write_atomically
from pretrain.config import CheckpointConfig

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_META_KEYS = ("step", "record", "config", "data_digest", "num_ranks", "files")


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Those with their final name, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


# ------------------------------------------------------------------------------------------- whole or torn


def list_files(folder: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint but meta.json, by name."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.stat().st_size for name, path in files.items() if name != "meta.json"}


def list_checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of the files of JSON and of the headers of the safetensors: what a reader needs before any tensor."""
    paths = [*folder.glob("*.json"), *folder.glob("*.safetensors")]
    return {path.name: zlib.crc32(_head(path)) for path in sorted(paths) if path.name != "meta.json"}


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            return file.read()
        raw = file.read(8)
        size = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
        return raw + file.read(min(size, _MAX_HEADER_BYTES))


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """What meta.json says. Raises InputError where it, or a file that it lists, is missing or torn."""
    path = checkpoint / "meta.json"
    try:
        meta: dict[str, Any] = json.loads(path.read_bytes())
        lacking = [key for key in _META_KEYS if key not in meta]
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {checkpoint} is no checkpoint of dermvlp") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: torn ({error}); remove {checkpoint} to resume before it") from None
    if lacking:
        raise InputError(f"{path}: without {', '.join(lacking)}; remove {checkpoint} to resume before it")
    for name, size in meta["files"].items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise InputError(
                f"{file}: missing or not of the size it was written with; remove {checkpoint} to resume before it"
            )
    for name, checksum in meta.get("crc32", {}).items():
        if zlib.crc32(_head(checkpoint / name)) != checksum:
            raise InputError(
                f"{checkpoint / name}: not the bytes it was written with; remove {checkpoint} to resume before it"
            )
    return meta


def whole_checkpoints(run_dir: Path) -> tuple[list[tuple[Path, dict[str, Any]]], dict[Path, str]]:
    """(the whole ones with their meta.json, oldest first; the others, with why each is skipped).

    One that holds a step that was to be passed over is skipped too: a kill left it while the run was going back.
    """
    bad_steps = read_passed_over(run_dir)
    whole, skipped = [], {}
    for checkpoint in list_checkpoints(run_dir):
        try:
            meta = read_meta(checkpoint)
        except (InputError, OSError) as error:
            skipped[checkpoint] = str(error)
            continue
        held = [step for step in bad_steps if step < meta["step"] and step not in meta["record"]["passed_over"]]
        if held:
            skipped[checkpoint] = f"{checkpoint}: holds step {held[0] + 1}, whose batch is passed over"
        else:
            whole.append((checkpoint, meta))
    return whole, skipped


# ------------------------------------------------------------------------------------------- kept and removed


def superfluous(steps: Sequence[int], config: CheckpointConfig, best_step: int | None) -> list[int]:
    """Of the steps of the checkpoints, those that are not kept: ascending."""
    ascending = sorted(steps)
    kept = set(ascending[-config.keep_last :])
    if config.keep_every is not None:
        kept |= {step for step in ascending if step % config.keep_every == 0}
    if config.keep_best and best_step is not None:
        kept.add(best_step)
    return [step for step in ascending if step not in kept]


def prune(run_dir: Path, config: CheckpointConfig, best_step: int | None) -> None:
    for step in superfluous([step_of(path) for path in list_checkpoints(run_dir)], config, best_step):
        remove_checkpoint(checkpoint_folder(run_dir, step))


def remove_checkpoint(checkpoint: Path) -> None:
    """Safe against a kill: the folder first loses the name by which a resume would take it."""
    removed = checkpoint.with_name(f"{checkpoint.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)  # what stays is removed at the next start


def set_aside(checkpoint: Path) -> Path:
    """Not removed: a file system that is ill for a while can make a whole one look torn."""
    aside = checkpoint.with_name(f"{checkpoint.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def remove_leftovers(run_dir: Path) -> list[str]:
    """Removes what killed attempts left; returns what there was."""
    folder = run_dir / "checkpoints"
    left = sorted(path for kind in ("partial", "removed", "universal") for path in folder.glob(f"step-*.{kind}"))
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [f"{path}: left by an attempt that was killed; removed" for path in left]


# ------------------------------------------------------------------------------------------- passed over


def read_passed_over(run_dir: Path) -> list[int]:
    """Steps, counted from 0, whose batch is never taken again, ascending."""
    path = run_dir / "checkpoints" / "passed_over.json"
    if not path.is_file():
        return []
    try:
        return sorted(int(step) for step in json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a list of steps ({error}); correct it, or remove it to forget them") from None


def note_passed_over(run_dir: Path, step: int) -> None:
    """Durable when it returns."""
    steps = sorted({*read_passed_over(run_dir), step})
    write_atomically(run_dir / "checkpoints" / "passed_over.json", json.dumps(steps).encode())
