"""`dermvlp publish-data SPLIT_DIR... --repo ORG/NAME`: prepared splits as a data set repository.

    README.md               what is here, under which licences, and what was left out and why
    SPLIT/captions.parquet  a row a caption that may be passed on
    SPLIT/manifest.json, index.npy, image_hashes.npy, shard-NNNNNN.tar   where images may be passed on

Images were made smaller and compressed anew: a licence without derivatives keeps them here, and with them every
caption that is not the source's own words. A licence that is not known keeps all of a sample here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.files import atomic, write_atomically
from data_prep.progress import Progress
from data_prep.schema import Aspect, Caption, Sample, ShardManifest
from data_prep.shards.manifest import read_hashes, write_manifest
from data_prep.shards.shard import ShardRecord, write_shard
from pretrain.data.manifest import ShardedDataset
from pretrain.publish.data_card import SplitFacts, data_card
from pretrain.publish.hub import (
    CARD_NAME,
    Destination,
    check_repo_name,
    describe_folder,
    list_files,
    token_from_environment,
    upload,
)
from pretrain.publish.licences import find_licence
from pretrain.publish.private import check_private

_SPLIT_FILES = re.compile(r"shard-\d{6,}\.tar|index\.npy|image_hashes\.npy|manifest\.json|captions\.parquet")
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")

CAPTION_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("aspect", pa.string()),
        ("text", pa.string()),
        ("origin", pa.string()),  # where the text came from: data_prep.schema.Caption
        ("licence", pa.string()),
        ("source", pa.string()),
        ("diagnosis", pa.string()),
        ("diagnosis_path", pa.list_(pa.string())),
        ("has_image", pa.bool_()),  # in the shards beside this file
    ]
)


#: what a publication of any splits writes: those not named this time go
_OURS_THERE = ("*/shard-*.tar", "*/*.npy", "*/manifest.json", "*/captions.parquet")


@dataclass(frozen=True)
class Allowed:
    """What of one sample may be passed on, and why not the rest."""

    image: bool
    captions: Literal["all", "verbatim", "none"]
    reason: str = ""


@dataclass(frozen=True)
class DataPublication:
    folder: Path
    files: dict[str, int]  # bytes by name
    splits: tuple[SplitFacts, ...]
    url: str | None = None  # of the commit; None: not sent


def allowed(licence: str | None) -> Allowed:
    """By the licence of a sample, as its source wrote it."""
    found = None if licence is None else find_licence(licence)
    if found is None:
        return Allowed(False, "none", "licence not known")
    if not found.redistribution:
        return Allowed(False, "none", f"{licence}: may not be passed on")
    if not found.derivatives:
        return Allowed(
            False, "verbatim", f"{licence}: no derivatives, so neither the reduced image nor derived captions"
        )
    return Allowed(True, "all")


def publish_data(
    split_dirs: Sequence[Path],
    repo: str,
    out_dir: Path,
    *,
    with_images: bool = True,
    dry_run: bool = False,
    is_public: bool = False,
    is_gated: bool = False,
) -> DataPublication:
    """Writes the folder of a data set, then sends it to the Hub unless `dry_run`.

    Args:
        split_dirs: prepared splits, each with its manifest.json; their names are the splits' names.
        with_images: False publishes captions alone.

    Raises InputError for splits of the same name, a split from which nothing may be passed on, and as `hub.upload`.
    """
    check_repo_name(repo)
    if not dry_run:
        token_from_environment()
    sources = {data.manifest.split: data for data in map(ShardedDataset, split_dirs)}
    if len(sources) != len(split_dirs):
        raise InputError(f"{split_dirs[0]}: several of the folders are of one split; give each split once")
    for name, data in sources.items():
        if not _SPLIT_NAME.fullmatch(name):
            raise InputError(
                f"{data.directory / 'manifest.json'}: split {name!r} cannot be a folder's name; prepare again"
            )
    _clear(out_dir, sources)
    splits = tuple(_write_split(data, out_dir / name, with_images) for name, data in sources.items())
    if not any(split.num_samples for split in splits):
        raise InputError(f"{split_dirs[0]}: no licence of a sample allows passing anything on; see its manifest.json")
    write_atomically(out_dir / CARD_NAME, data_card(repo, splits, is_gated).encode())
    files = list_files(out_dir)
    check_private([out_dir / name for name in files], [out_dir, *split_dirs])
    url = None
    if not dry_run:
        to = Destination(repo, "dataset", is_public, is_gated)
        url = upload(out_dir, tuple(files), to, f"{len(splits)} split(s)", _OURS_THERE)
    return DataPublication(out_dir, files, splits, url)


def _clear(folder: Path, sources: Mapping[str, ShardedDataset]) -> None:
    """Removes what an earlier publication left. Raises InputError for a folder that holds anything else, or a split."""
    for data in sources.values():
        if folder.resolve() in (data.directory.resolve(), *data.directory.resolve().parents):
            raise InputError(f"{folder}: holds the prepared split {data.directory}; choose another folder with --out")
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in found:
        name = path.relative_to(folder)
        is_ours = len(name.parts) == 2 and _SPLIT_FILES.fullmatch(name.name) is not None
        if not is_ours and str(name) != CARD_NAME:
            raise InputError(f"{folder}: holds {name}, which no publication wrote; choose another folder with --out")
    if found and not (folder / CARD_NAME).is_file():
        raise InputError(f"{folder}: not empty and no earlier publication; choose another folder with --out")
    for path in found:
        path.unlink()
    for split in sources:
        (folder / split).mkdir(parents=True, exist_ok=True)


def _write_split(data: ShardedDataset, folder: Path, with_images: bool) -> SplitFacts:
    hashes = read_hashes(data.directory)
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("licence", "source", "diagnosis", "left out")}
    num_captions = 0
    records: list[ShardRecord] = []
    with (
        atomic(folder / "captions.parquet") as file,
        pq.ParquetWriter(file, CAPTION_SCHEMA) as captions,
        Progress(f"writing {data.manifest.split}", unit="samples", total=len(data)) as progress,
    ):
        for number, shard in enumerate(data.manifest.shards):
            first = data.first_of_shard(number)
            rows, kept = _chosen(data, range(first, first + shard.num_samples), with_images, counts)
            num_captions += len(rows)
            captions.write_table(pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA))
            if kept:
                records.append(_write_shard(data, hashes, kept, folder / shard.name))
            progress.advance(shard.num_samples)
    manifest = _manifest(data, folder, records) if records else None
    return SplitFacts(
        name=data.manifest.split,
        manifest=data.manifest,
        num_samples=counts["licence"].total(),
        num_captions=num_captions,
        num_images=0 if manifest is None else manifest.num_samples,
        licences=dict(counts["licence"]),
        sources=dict(counts["source"]),
        diagnoses=dict(counts["diagnosis"]),
        left_out=dict(counts["left out"]),
        with_images=with_images,
    )


def _chosen(
    data: ShardedDataset, positions: range, with_images: bool, counts: dict[str, Counter[str]]
) -> tuple[list[dict[str, object]], list[int]]:
    """The rows of captions, and the positions of images, that may be passed on; the rest is counted with its reason."""
    rows: list[dict[str, object]] = []
    kept: list[int] = []
    for position in positions:
        sample = data.read_sample(position)
        may = allowed(sample.licence)
        if may.reason:
            counts["left out"][may.reason] += 1
        texts = _captions(sample, may)
        has_image = may.image and with_images
        kept += [position] if has_image else []
        rows += [_row(sample, caption, has_image) for caption in texts]
        if texts or has_image:
            counts["licence"][sample.licence or "unknown"] += 1
            counts["source"][sample.source or sample.dataset] += 1
            counts["diagnosis"][sample.diagnosis or "unknown"] += 1
    return rows, kept


def _captions(sample: Sample, may: Allowed) -> list[Caption]:
    if may.captions == "none":
        return []
    if may.captions == "all":
        return list(sample.captions)
    # sub-captions that a table brings are somebody's derivation of the caption
    return [c for c in sample.captions if c.aspect is Aspect.CAPTION and c.origin.startswith("column:")]


def _row(sample: Sample, caption: Caption, has_image: bool) -> dict[str, object]:
    return {
        "key": sample.key,
        "aspect": caption.aspect.value,
        "text": caption.text,
        "origin": caption.origin,
        "licence": sample.licence,
        "source": sample.source,
        "diagnosis": sample.diagnosis,
        "diagnosis_path": list(sample.diagnosis_path),
        "has_image": has_image,
    }


def _write_shard(data: ShardedDataset, hashes: NDArray[np.void], kept: Sequence[int], path: Path) -> ShardRecord:
    """A shard of the samples kept: the same bytes where all of them are. Without its sidecar, which only a preparation
    needs."""

    def samples() -> Iterator[tuple[Sample, bytes, np.void]]:
        for position in kept:
            yield data.read_sample(position), data.read_image(position), hashes[position]

    record = write_shard(path, samples(), inputs_digest="published")
    path.with_suffix(".json").unlink()
    return record


def _manifest(data: ShardedDataset, folder: Path, records: Sequence[ShardRecord]) -> ShardManifest:
    source = data.manifest
    return write_manifest(
        folder,
        records,
        dataset=source.dataset,
        split=source.split,
        image_short_side=source.image_short_side,
        decomposer=source.decomposer,
        config_digest=source.config_digest,
        num_rejected=source.num_rejected,
    )


def describe(publication: DataPublication, to: Destination) -> str:
    """What was sent, or would be: for a reader."""
    facts = []
    for split in publication.splits:
        facts.append(
            f"{split.name}: of {split.manifest.num_samples:,} samples {split.num_images:,} images and "
            f"{split.num_captions:,} captions"
        )
        facts += [f"{split.name}: left out: {reason}: {count:,} samples" for reason, count in split.left_out.items()]
    return describe_folder(publication.folder, publication.files, to, publication.url, facts)
