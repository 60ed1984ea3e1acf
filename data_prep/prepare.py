"""From a source to shards: `dermvlp prepare CONFIG`.

    rows of the source -> split -> slices of `samples_per_shard` rows -> one shard a slice, in worker processes

A shard is a pure function of its slice of rows and the configuration. So shards are made in parallel, a killed
preparation goes on where it was, and nothing has to be remembered but the shards themselves.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from data_prep.captions.decompose import Decomposer, make_decomposer
from data_prep.config import PrepareConfig, SyntheticSource
from data_prep.errors import InputError
from data_prep.images import EncodedImage, ImageRejected, encode_image, load_image
from data_prep.ontology import Ontology, concepts_caption, diagnosis_caption
from data_prep.progress import Progress
from data_prep.schema import SCHEMA_VERSION, Aspect, Caption, Sample, ShardManifest, text_hash
from data_prep.shards import ShardRecord, read_record, write_ledger, write_manifest, write_shard
from data_prep.sources import open_source
from data_prep.sources.base import Rejection, SourceRow
from data_prep.sources.synthetic import draw

SPLITS = ("train", "val")
log = logging.getLogger(__name__)


@dataclass
class _Slice:
    """The rows of one shard."""

    split: str
    number: int
    rows: list[SourceRow] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


def prepare(config: PrepareConfig) -> dict[str, ShardManifest]:
    """Writes `OUT_DIR/{train,val}/` with shards, index, ledger and manifest; returns the manifests by split.

    Raises InputError where the source cannot be read or gives no sample at all.
    """
    source = open_source(config.source)
    config.out_dir.mkdir(parents=True, exist_ok=True)
    salt = _salt(config.out_dir)
    _ontology(config.ontology_path)  # refused here, before a model is asked and paid
    decomposer = _decomposer(config.model_dump_json())
    if config.decomposer.kind == "llm":
        decomposer.prepare(row.caption for row in source.rows() if isinstance(row, SourceRow) and row.caption)
    records: dict[str, dict[int, ShardRecord]] = {split: {} for split in SPLITS}
    with Progress("preparing shards", unit="rows") as progress:
        for piece, record in _run(config, _slices(config, source.rows()), salt):
            records[piece.split][piece.number] = record
            progress.advance(len(piece.rows) + len(piece.rejected))
    manifests = {}
    for split in SPLITS:
        ordered = [records[split][number] for number in sorted(records[split])]
        if (manifest := _finish_split(config, split, ordered, decomposer.name)) is not None:
            manifests[split] = manifest
    if "train" not in manifests:
        reasons = Counter(rejected.reason for part in records["train"].values() for rejected in part.rejected)
        raise InputError(
            f"{config.name}: no row became a training sample; commonest reasons: {dict(reasons.most_common(3))}; "
            f"all of them are in {config.out_dir / 'train' / 'rejected.csv'}"
        )
    return manifests


def _finish_split(
    config: PrepareConfig, split: str, records: list[ShardRecord], decomposer: str
) -> ShardManifest | None:
    """Ledger, then index and manifest (None where no row became a sample); earlier preparations' files go."""
    directory = config.out_dir / split
    write_ledger(directory, records)
    manifest = None
    if any(record.info.num_samples for record in records):
        manifest = write_manifest(
            directory,
            records,
            dataset=config.name,
            split=split,
            image_short_side=config.images.short_side_px,
            decomposer=decomposer,
            config_digest=config_digest(config),
        )
    else:
        (directory / "manifest.json").unlink(missing_ok=True)
        (directory / "index.npy").unlink(missing_ok=True)
    written = {record.info.name for record in records}
    for path in directory.glob("shard-*"):
        if path.suffix == ".partial" or path.with_suffix(".tar").name not in written:
            path.unlink()
    return manifest


def config_digest(config: PrepareConfig) -> str:
    """Of the settings and the ontology that shape a sample: not where it goes, nor by how many processes.

    The source's rows and what the decomposer made of them are in the digest of each shard's inputs.
    """
    relevant = config.model_dump_json(exclude={"out_dir", "num_workers", "source", "decomposer", "ontology_path"})
    digest = hashlib.sha256(f"{SCHEMA_VERSION} {relevant}".encode())
    if config.ontology_path is not None:
        digest.update(config.ontology_path.read_bytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- rows to slices


def _slices(config: PrepareConfig, rows: Iterable[SourceRow | Rejection]) -> Iterator[_Slice]:
    """Consecutive rows of a split, `samples_per_shard` at a time, as they stream by."""
    groups: dict[str, set[int]] = {split: set() for split in SPLITS}
    open_slices = {split: _Slice(split, 0) for split in SPLITS}
    for row in rows:
        if isinstance(row, Rejection):
            open_slices["train"].rejected.append(row)  # the ledger of train holds the rows that have no split
            continue
        current = open_slices[split := assign_split(config, row)]
        current.rows.append(row)
        if row.group is not None:
            groups[split].add(text_hash(row.group))
        if len(current.rows) == config.samples_per_shard:
            yield current
            open_slices[split] = _Slice(split, current.number + 1)
    for current in open_slices.values():
        if current.rows or current.rejected:
            yield current
    if shared := groups["train"] & groups["val"]:
        log.warning(
            "%s: the source's own split has %d of %d groups (patients, lesions, videos, ...) on both sides, so val "
            "flatters; without a split in the source whole groups are put on one side",
            config.name,
            len(shared),
            len(groups["train"] | groups["val"]),
        )


def assign_split(config: PrepareConfig, row: SourceRow) -> str:
    """The source's own split, else by the hash of the group: stable when rows are added, whole groups on one side."""
    if row.split is not None:
        return row.split
    digest = hashlib.blake2b(_group_for_split(config, row).encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") / 2**64 < config.val_fraction else "train"


def _group_for_split(config: PrepareConfig, row: SourceRow) -> str:
    """The group; without one the image, by its name below the image folder: the same wherever that folder stands."""
    if row.group is not None:
        return row.group
    if row.image.path is None or isinstance(config.source, SyntheticSource):
        return f"{row.table}:{row.row}"
    return row.image.path.relative_to(config.source.image_dir).as_posix()


def _salt(out_dir: Path) -> str:
    """Keeps patient ids from being found by hashing guesses: DERMVLP_SALT, or a secret made once beside the shards."""
    if (salt := os.environ.get("DERMVLP_SALT")) is not None:
        if not salt.strip():
            raise InputError("DERMVLP_SALT: set but empty, so group ids could be guessed; unset it or give a secret")
        return salt
    path = out_dir / ".salt"
    if not path.exists():
        # renamed: a process killed in between must not leave an empty salt for good
        partial = out_dir / ".salt.partial"
        partial.touch(mode=0o600)
        partial.write_text(secrets.token_hex(16), encoding="utf-8")
        partial.replace(path)
    return path.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- slices to shards


def _run(config: PrepareConfig, slices: Iterator[_Slice], salt: str) -> Iterator[tuple[_Slice, ShardRecord]]:
    """Shards as they are done; only a few slices are in memory at a time."""
    for split in SPLITS:
        (config.out_dir / split).mkdir(exist_ok=True)
    config_json = config.model_dump_json()
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(config.num_workers, mp_context=context, initializer=_end_with_parent) as pool:
        running: dict[Future[ShardRecord], _Slice] = {}
        try:
            for piece in slices:
                running[pool.submit(_build_shard, config_json, piece, salt)] = piece
                while len(running) >= 2 * config.num_workers:
                    yield from _finished(running)
            while running:
                yield from _finished(running)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _finished(running: dict[Future[ShardRecord], _Slice]) -> Iterator[tuple[_Slice, ShardRecord]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


def _end_with_parent() -> None:
    """In a worker process: a killed parent cannot end its workers, which would wait for work for ever, and first
    finish the shard that the next preparation is writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(1)
def _decomposer(config_json: str) -> Decomposer:
    config = PrepareConfig.model_validate_json(config_json)
    return make_decomposer(config.decomposer, config.out_dir / "decompositions.sqlite")


@lru_cache(1)
def _ontology(path: Path | None) -> Ontology | None:
    return None if path is None else Ontology.load(path)


def _build_shard(config_json: str, piece: _Slice, salt: str) -> ShardRecord:
    """In a worker process: one shard, or its record if it is already there."""
    config = PrepareConfig.model_validate_json(config_json)
    decomposer, ontology = _decomposer(config_json), _ontology(config.ontology_path)
    path = config.out_dir / piece.split / f"shard-{piece.number:06d}.tar"
    digest = _inputs_digest(config, piece, salt, decomposer)
    if (record := read_record(path, digest)) is not None:
        return record
    rejected, notes = list(piece.rejected), Counter[str]()

    def samples() -> Iterator[tuple[Sample, bytes]]:
        for row in piece.rows:
            try:
                image = read_image(row, config)
                sample = make_sample(config, row, image, ontology, decomposer, salt, notes)
            except ImageRejected as problem:
                rejected.append(Rejection(row.table, row.row, "image", str(problem)))
            except ValidationError as problem:
                rejected.append(Rejection(row.table, row.row, *_first_problem(problem)))
            else:
                yield sample, image.jpeg

    made = list(samples())
    return write_shard(path, made, rejected, digest, dict(+notes))


def _first_problem(error: ValidationError) -> tuple[str, str]:
    """Field and reason, without the value: it is the patient's, and the ledger is shared."""
    problem = error.errors(include_url=False, include_input=False)[0]
    return ".".join([error.title.lower(), *map(str, problem["loc"])]), problem["msg"].removeprefix("Value error, ")


def _inputs_digest(config: PrepareConfig, piece: _Slice, salt: str, decomposer: Decomposer) -> str:
    digest = hashlib.sha256(f"{config_digest(config)} {decomposer.name} {salt}".encode())
    for row in piece.rows:
        digest.update(repr(row).encode())
        if config.decomposer.kind == "llm" and row.caption is not None:
            # a caption without an answer is asked again in the next run, which may bring one
            digest.update(repr(decomposer.decompose(row.caption)).encode())
        if row.image.path is not None and row.image.path.exists():
            status = row.image.path.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    for rejection in piece.rejected:
        digest.update(repr(rejection).encode())
    return digest.hexdigest()


def read_image(row: SourceRow, config: PrepareConfig) -> EncodedImage:
    """Raises ImageRejected."""
    if row.image.path is not None:
        return load_image(row.image.path, config.images)
    assert row.image.synthetic_seed is not None and row.image.synthetic_px is not None
    return encode_image(draw(row.image.synthetic_seed, row.image.synthetic_px), config.images)


def make_sample(
    config: PrepareConfig,
    row: SourceRow,
    image: EncodedImage,
    ontology: Ontology | None,
    decomposer: Decomposer,
    salt: str,
    notes: Counter[str],
) -> Sample:
    """One row and its image to a sample: captions of every aspect, groups hashed, nothing else of the row."""
    assert row.caption is not None  # sources reject rows without words
    captions = [Caption(aspect=Aspect.CAPTION, text=row.caption)]
    diagnosis_path = row.diagnosis_path if ontology is None else ontology.canonical_path(row.diagnosis_path)
    if row.diagnosis is not None:
        node = ontology.match(row.diagnosis) if ontology is not None else None
        if not diagnosis_path and ontology is not None and node is not None:
            diagnosis_path = ontology.path(node)
        notes["diagnosis not in the ontology"] += int(ontology is not None and not diagnosis_path)
        captions.append(Caption(aspect=Aspect.DIAGNOSIS, text=diagnosis_caption(row.diagnosis, diagnosis_path)))
    if (concepts := concepts_caption(row.concepts)) is not None:
        captions.append(Caption(aspect=Aspect.VISUAL_CONCEPTS, text=concepts))
    decomposition = decomposer.decompose(row.caption)
    captions += decomposition.subcaptions
    notes.update(f"sub-caption dropped: {dropped.reason}" for dropped in decomposition.dropped)
    notes["caption the model could not split"] += int(decomposition.failure is not None)
    return Sample(
        key=f"{config.name}-{row.row:09d}" if row.split is None else f"{config.name}-{row.split}-{row.row:09d}",
        captions=tuple(captions),
        diagnosis=row.diagnosis,
        diagnosis_path=diagnosis_path,
        concepts=row.concepts,
        body_site=row.body_site,
        demographics=row.demographics,
        modality=row.modality,
        group=None if row.group is None else _hash_group(config.name, row.group, salt),
        dataset=config.name,
        licence=row.licence,
        image_sha256=image.sha256,
    )


def _hash_group(dataset: str, group: str, salt: str) -> str:
    return hashlib.blake2b(f"{dataset}/{group}".encode(), key=salt.encode()[:64], digest_size=8).hexdigest()
