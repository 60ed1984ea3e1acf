"""The stage `merge` shows what it made: OUT/report.html, from manifests, sidecars and the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_prep.captions.tokens import TokenCounter
from data_prep.job import Job
from data_prep.pages.preparation import (
    MAX_MEASURED_TEXTS,
    BySplit,
    ReportFacts,
    TokenLengths,
    token_lengths,
    write_report,
)
from data_prep.planning.stage import Planned
from data_prep.schema import Aspect, ShardManifest
from data_prep.shards.manifest import read_sample, total
from data_prep.shards.shard import ShardRecord
from data_prep.summary import rejected_by_reason

_KINDS = {Aspect.CAPTION: "whole captions", Aspect.DIAGNOSIS: "diagnosis", Aspect.VISUAL_CONCEPTS: "visual concepts"}
_SUBCAPTIONS = "sub-captions"


def write_preparation_report(
    job: Job,
    planned: Planned,
    manifests: Mapping[str, ShardManifest],
    records: Mapping[str, Sequence[ShardRecord]],
) -> Path:
    def by_split(name: str) -> BySplit:
        return {split: total(record.counts[name] for record in records[split]) for split in manifests}

    config = job.config
    facts = ReportFacts(
        title=config.name,
        overview={
            "rows of the source": planned.summary["num_rows"],
            "rows rejected": next(iter(manifests.values())).num_rejected,
            "sub-captions by": job.tools.name,
            "short side of images": f"{config.images.short_side_px} px at most",
            "configuration": job.config_digest,
        },
        samples_by_split={split: manifest.num_samples for split, manifest in manifests.items()},
        samples_by_source=by_split("source"),
        samples_by_licence=by_split("licence"),
        samples_by_level=by_split("level"),
        samples_by_diagnosis=by_split("diagnosis"),
        captions_by_aspect={
            split: {str(aspect): num for aspect, num in manifest.captions_by_aspect.items()}
            for split, manifest in manifests.items()
        },
        captions_by_origin=by_split("origin"),
        token_lengths=_token_lengths(job, manifests),
        tokenizer=config.tokenizer.name,
        context_length=config.tokenizer.context_length,
        rejected_by_reason=rejected_by_reason(job.out_dir),
        duplicates=planned.summary["counts"],
        duplicates_page="duplicates.html" if (job.out_dir / "duplicates.html").is_file() else None,
        diagnoses=planned.summary["diagnoses"],
        concepts=planned.summary["concepts"],
        notes=total(manifest.notes for manifest in manifests.values()),
        warnings=planned.summary["warnings"],
    )
    return write_report(job.out_dir, facts)


def _token_lengths(job: Job, manifests: Mapping[str, ShardManifest]) -> dict[str, TokenLengths]:
    num: Counter[str] = Counter()
    for manifest in manifests.values():
        for aspect, count in manifest.captions_by_aspect.items():
            num[_KINDS.get(aspect, _SUBCAPTIONS)] += count
    lengths = token_lengths(_texts(job.out_dir, manifests), TokenCounter(job.config.tokenizer).count)
    return {kind: TokenLengths(num[kind], found.num_by_length) for kind, found in lengths.items()}


def _texts(out_dir: Path, manifests: Mapping[str, ShardManifest]) -> Iterator[tuple[str, str]]:
    """(kind, text) of samples evenly spaced over the splits: reading a million to draw a histogram would take long."""
    num_samples = sum(manifest.num_samples for manifest in manifests.values())
    num_texts = sum(sum(manifest.captions_by_aspect.values()) for manifest in manifests.values())
    step = max(1, num_texts // MAX_MEASURED_TEXTS) if num_samples else 1
    for split, manifest in manifests.items():
        index = np.load(out_dir / split / "index.npy", mmap_mode="r", allow_pickle=False)
        for row in index[::step]:
            for caption in read_sample(out_dir / split, manifest, row).captions:
                yield _KINDS.get(caption.aspect, _SUBCAPTIONS), caption.text
