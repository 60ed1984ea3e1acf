"""`dermvlp embed`: features of a folder, a table or shards into one file; goes on where it was interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_prep.errors import InputError
from data_prep.files import disk_errors, lock, remove_stale_partials
from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.datasets.data import undecodable, write_rejected
from pretrain.evaluation.encoding.export_table import SUFFIXES, TableInfo, read_info, write_features
from pretrain.evaluation.encoding.feature_chunks import read_rows, shape_of
from pretrain.evaluation.encoding.features import encode_missing_chunks
from pretrain.evaluation.encoding.tower_layers import check_layers
from pretrain.evaluation.interfaces import JOINT, Encoder, EvalData


def embed(
    encoder: Encoder, data: EvalData, out: Path, layer: str = JOINT, settings: EvaluationSettings | None = None
) -> TableInfo:
    """Features of all images of `data` into `out` (.parquet or .npy); a table that is there already is kept.

    Beside it `OUT.rejected.jsonl`, a line for each row of the data set and each image that could not be used, with the
    reason; until it is done `OUT.parts/`, from which the same command goes on. Raises InputError for another ending, a
    layer that the encoder has not, a table of another model, data set or layer, and where no image could be decoded.
    """
    settings = settings or EvaluationSettings()
    if out.suffix not in SUFFIXES:
        raise InputError(f"{out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    wanted = TableInfo(
        model=encoder.info.name,
        model_digest=encoder.info.digest,
        layer=layer,
        data=data.name,
        data_digest=data.digest,
        num_images=0,
        num_rejected=0,
        width=0,
    )
    parts_dir = out.with_name(f"{out.name}.parts")
    if out.exists():
        found = _finished(out, wanted)
        shutil.rmtree(parts_dir, ignore_errors=True)  # left where it was killed after the table had its name
        return found
    check_layers(encoder, [layer])
    with lock(parts_dir / ".lock", "another `dermvlp embed` of this file"), disk_errors(out.parent):
        remove_stale_partials(parts_dir)
        chunks_dir = parts_dir / f"{wanted.model_digest}-{wanted.data_digest}-{layer}"
        chunks = encode_missing_chunks(encoder, data, {layer: chunks_dir}, settings)[layer]
        outcome = [read_rows(chunk) for chunk in chunks]
        num_images, width = shape_of(outcome)
        reason_of = {row: reason for chunk in outcome for row, reason in chunk.rejected.items()}
        rejected = [*data.rejected, *undecodable(data, reason_of)]
        info = wanted.model_copy(update={"num_images": num_images, "num_rejected": len(rejected), "width": width})
        write_rejected(rejected_path(out), rejected)
        write_features(out, chunks, [row.key for row in data.rows], info)
    shutil.rmtree(parts_dir)
    return info


def settings_of(batch_size: int, num_workers: int) -> EvaluationSettings:
    """Of the command's options. Raises InputError for one out of range."""
    if batch_size < 1 or num_workers < 0:
        raise InputError(
            f"--batch-size {batch_size} --num-workers {num_workers}: at least 1 image, at least 0 processes"
        )
    return EvaluationSettings(batch_size=batch_size, num_workers=num_workers)


def rejected_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.rejected.jsonl")


def _finished(out: Path, wanted: TableInfo) -> TableInfo:
    found = read_info(out)
    if not found.is_of(wanted):
        raise InputError(
            f"{out}: holds layer {found.layer!r} of {found.model} ({found.model_digest}) for {found.data} "
            f"({found.data_digest}); asked for is layer {wanted.layer!r} of {wanted.model} ({wanted.model_digest}) for "
            f"{wanted.data} ({wanted.data_digest}): remove it, or choose another --out"
        )
    return found
