"""Which of the training data's sources has which licence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from data_prep.errors import InputError
from data_prep.progress import Progress
from data_prep.schema import ShardManifest
from pretrain.data.manifest import ShardedDataset


def samples_by_source_and_licence(split_dir: Path, manifest: ShardManifest) -> dict[tuple[str, str], int] | None:
    """(source, licence) -> samples of a prepared split, "unknown" where a sample does not say.

    The manifest counts the two apart. Where one of them has a single value that says all; else every sample is read,
    and None is given where the shards are not there, or are no longer those of the manifest.
    """
    sources, licences = manifest.samples_by_source, manifest.samples_by_licence
    if sources and len(licences) == 1:
        return {(source, licence): count for licence in licences for source, count in sources.items()}
    if len(sources) == 1:
        return {(source, licence): count for source in sources for licence, count in licences.items()}
    counts: Counter[tuple[str, str]] = Counter()
    try:
        data = ShardedDataset(split_dir)
        with Progress("licences of the training data's sources", unit="samples", total=len(data)) as progress:
            for position in range(len(data)):
                sample = data.read_sample(position)
                counts[sample.source or "unknown", sample.licence or "unknown"] += 1
                progress.advance()
    except InputError:
        return None
    by_licence: Counter[str] = Counter()
    for (_, licence), count in counts.items():
        by_licence[licence] += count
    return dict(counts) if by_licence == Counter(licences) else None
