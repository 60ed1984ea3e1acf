"""The stages `shards` and `merge`: consecutive rows of a split -> one tar each, then index, manifest and ledgers."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from data_prep import pool
from data_prep.errors import InputError
from data_prep.files import remove_stale_partials
from data_prep.images import scan
from data_prep.job import Job
from data_prep.planning.plan import SPLITS
from data_prep.planning.rows import iter_survivors
from data_prep.planning.stage import Planned
from data_prep.rejected import read_ledger, write_ledger
from data_prep.samples import RowRejectedError, Tools, make_sample, make_tools, whole_caption
from data_prep.schema import Sample, ShardManifest
from data_prep.shards.manifest import write_manifest
from data_prep.shards.shard import ShardRecord, read_record, read_sidecar, write_shard
from data_prep.sources.base import Rejection, SourceRow

log = logging.getLogger(__name__)


@dataclass
class Slice:
    """The rows of one shard, with what is known of their images."""

    split: str
    number: int
    rows_digest: str
    rows: list[SourceRow] = field(default_factory=list)
    facts: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, dtype=scan.FACT_DTYPE))


def shard_stage(
    job: Job, planned: Planned, advance: Callable[[int], None], only: Collection[tuple[str, int]] | None = None
) -> None:
    """Make the part's shards (of these, `only` the (split, number) given). Nothing is done for those that are there and
    were made from the same inputs."""
    for split in SPLITS.values():
        (job.out_dir / split).mkdir(parents=True, exist_ok=True)
    tools = job.tools  # refused here, before worker processes start
    if not len(planned.positions("train")):
        _no_training_sample(job, read_ledger(job.work_dir / "rejected.csv"))
    build = partial(_build_shard, job.config.model_dump_json(), job.scan_dir, job.ledger_path, job.salt)
    for num_rows in pool.run(build, _slices(job, planned, tools.name, only), job.config.num_workers):
        advance(num_rows)


def _slices(job: Job, planned: Planned, tools_name: str, only: Collection[tuple[str, int]] | None) -> Iterator[Slice]:
    """Consecutive rows of a split, `samples_per_shard` at a time, as they stream by; those of the part alone."""
    size = job.config.samples_per_shard
    pending: dict[str, list[SourceRow]] = {name: [] for name in SPLITS.values()}
    numbers = dict.fromkeys(pending, 0)

    def finish(split: str) -> Iterator[Slice]:
        number, rows = numbers[split], pending[split]
        numbers[split], pending[split] = number + 1, []
        if job.part.has(number) and (only is None or (split, number) in only):
            planned_rows, facts = planned.of_shard(split, number, size)
            yield Slice(split, number, _rows_digest(job, tools_name, planned_rows, facts), rows, facts)

    for position, row in iter_survivors(job.source, planned.rows, planned.fate, job.salt):
        split = SPLITS[int(planned.fate[position])]
        pending[split].append(row)
        if len(pending[split]) == size:
            yield from finish(split)
    for split in SPLITS.values():
        if pending[split]:
            yield from finish(split)


def _rows_digest(job: Job, tools_name: str, rows: NDArray[np.void], facts: NDArray[np.void]) -> str:
    digest = hashlib.sha256(f"{job.config_digest} {tools_name} {job.salt} ".encode())
    for field_name in ("digest", "table", "row"):  # a sample's key holds the row's number
        digest.update(np.ascontiguousarray(rows[field_name]).tobytes())
    digest.update(np.ascontiguousarray(facts["sha256"]).tobytes())
    return digest.hexdigest()[:32]


def _build_shard(config_json: str, scan_dir: Path, ledger_path: Path, salt: str, piece: Slice) -> int:
    """In a worker process: one shard, unless it is already there."""
    tools = make_tools(config_json, ledger_path, salt)
    path = tools.config.out_dir / piece.split / f"shard-{piece.number:06d}.tar"
    digest = piece.rows_digest + _answers_digest(tools, piece)
    if read_record(path, digest) is not None:
        return len(piece.rows)
    rejected: list[Rejection] = []
    failures: list[Rejection] = []
    notes: Counter[str] = Counter()

    def samples() -> Iterator[tuple[Sample, bytes, np.void]]:
        with scan.JpegReader(scan_dir) as jpegs:
            for row, fact in zip(piece.rows, piece.facts, strict=True):
                try:
                    sample, failure = make_sample(row, fact["sha256"].tobytes().hex(), tools, notes)
                except RowRejectedError as problem:
                    rejected.append(Rejection(row.table, row.row, *problem.args))
                    continue
                if failure is not None:
                    failures.append(Rejection(row.table, row.row, "caption", failure))
                yield sample, jpegs.read(fact), fact

    write_shard(
        path,
        samples(),
        rejected=rejected,
        failures=failures,
        notes=notes,
        inputs_digest=digest,
        rows_digest=piece.rows_digest,
    )
    return len(piece.rows)


def _answers_digest(tools: Tools, piece: Slice) -> str:
    """Of what the models said: a caption without an answer is asked again in the next run, which may bring one."""
    decomposer = tools.config.decomposer
    if tools.describer is None and decomposer.kind != "llm":
        return ""
    digest = hashlib.sha256(decomposer.on_failure.encode() if decomposer.kind == "llm" else b"")
    for row, fact in zip(piece.rows, piece.facts, strict=True):
        try:
            caption = whole_caption(row, fact["sha256"].tobytes().hex(), tools)
        except RowRejectedError as problem:
            digest.update(repr(problem.args).encode())
            continue
        digest.update(repr(caption).encode())
        if not row.subcaptions:
            digest.update(repr(tools.decomposer.decompose(caption.text)).encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- merge


def merge_stage(job: Job, planned: Planned) -> tuple[dict[str, ShardManifest], dict[str, list[ShardRecord]]]:
    """Index, manifest and ledgers from the shards of all parts; files of earlier preparations go.

    Raises InputError where a shard is missing, was made from other rows, or no row became a training sample.
    """
    records = check_records(job, planned)
    rejected = [
        *read_ledger(job.work_dir / "rejected.csv"),
        *(Rejection(**entry.model_dump()) for record in chain(*records.values()) for entry in record.rejected),
    ]
    if not any(record.info.num_samples for record in records["train"]):  # before anything that stands there goes
        _no_training_sample(job, rejected)
    num_rejected = write_ledger(job.out_dir / "rejected.csv", sorted(rejected, key=lambda r: (r.table, r.row)))
    failures = (Rejection(**entry.model_dump()) for record in chain(*records.values()) for entry in record.failures)
    if not write_ledger(job.out_dir / "caption_failures.csv", failures):
        (job.out_dir / "caption_failures.csv").unlink()
    remove_stale_partials(job.out_dir)
    manifests = {}
    for split in SPLITS.values():
        if (manifest := _finish_split(job, split, records[split], num_rejected)) is not None:
            manifests[split] = manifest
    return manifests, records


def check_records(job: Job, planned: Planned, but: Collection[tuple[str, int]] = ()) -> dict[str, list[ShardRecord]]:
    """The sidecars of all shards of the plan, by split; those in `but` (split, number) may be missing.

    Raises InputError where another one is missing, or was made from other rows or under another configuration.
    """
    size, tools_name = job.config.samples_per_shard, job.tools.name
    records: dict[str, list[ShardRecord]] = {}
    for split in SPLITS.values():
        records[split], missing = [], []
        num_shards = -(-len(planned.positions(split)) // size)
        for number in range(num_shards):
            digest = _rows_digest(job, tools_name, *planned.of_shard(split, number, size))
            record = read_sidecar(job.out_dir / split / f"shard-{number:06d}.tar")
            if record is not None and record.rows_digest == digest and _is_there(job.out_dir / split, record):
                records[split].append(record)
            elif (split, number) not in but:
                missing.append(number)
        if missing:
            raise InputError(
                f"{job.out_dir / split}: {len(missing)} of {num_shards} shards are missing or made from other rows, "
                f"the first is number {missing[0]}; run the stage shards (all its parts) first"
            )
    return records


def _no_training_sample(job: Job, rejected: Iterable[Rejection]) -> NoReturn:
    reasons = Counter(entry.reason for entry in rejected)
    raise InputError(
        f"{job.config.name}: no row became a training sample; commonest reasons: {dict(reasons.most_common(3))}; the "
        f"rows are in {job.work_dir / 'rejected.csv'}; what an earlier run finished stays as it was"
    )


def _is_there(directory: Path, record: ShardRecord) -> bool:
    """By its size; `verify` reads the bytes."""
    path = directory / record.info.name
    return record.info.num_samples == 0 or (path.is_file() and path.stat().st_size == record.info.num_bytes)


def _finish_split(job: Job, split: str, records: list[ShardRecord], num_rejected: int) -> ShardManifest | None:
    """None where no row became a sample of this split."""
    directory = job.out_dir / split
    manifest = None
    if any(record.info.num_samples for record in records):
        manifest = write_manifest(
            directory,
            records,
            dataset=job.config.name,
            split=split,
            image_short_side=job.config.images.short_side_px,
            decomposer=job.tools.name,
            config_digest=job.config_digest,
            num_rejected=num_rejected,
        )
    else:
        for name in ("manifest.json", "index.npy", "image_hashes.npy"):
            (directory / name).unlink(missing_ok=True)
    written = {record.info.name for record in records}
    for path in directory.glob("shard-*"):
        if path.with_suffix(".tar").name not in written:  # of an earlier preparation, or left by a killed process
            path.unlink()
    return manifest
