"""What a preparation gave, for people: counts by split, by aspect, and what was rejected and why."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from data_prep.schema import SUBCAPTION_ASPECTS, ShardManifest


def print_summary(out_dir: Path, manifests: Mapping[str, ShardManifest], seconds: float) -> None:
    for split, manifest in manifests.items():
        num_subcaptions = sum(manifest.captions_by_aspect.get(aspect, 0) for aspect in SUBCAPTION_ASPECTS)
        print(
            f"{split}: {manifest.num_samples} samples in {len(manifest.shards)} shards, "
            f"{len(manifest.samples_by_diagnosis)} diagnoses, "
            f"{num_subcaptions / max(1, manifest.num_samples):.1f} sub-captions a sample ({manifest.decomposer}), "
            f"{manifest.num_rejected} rows rejected"
        )
        print("  captions by aspect: " + ", ".join(f"{a} {n}" for a, n in manifest.captions_by_aspect.items()))
        for note, count in manifest.notes.items():
            print(f"  {note}: {count}")
        for reason, count in rejected_by_reason(out_dir / split).most_common():
            print(f"  rejected {count}: {reason}")
        if manifest.num_rejected:
            print(f"  every rejected row, to repair or to leave out: {out_dir / split / 'rejected.csv'}")
    print(f"{seconds:.1f} s, in {out_dir}")


def rejected_by_reason(directory: Path) -> Counter[str]:
    with (directory / "rejected.csv").open(encoding="utf-8", newline="") as file:
        return Counter(row["reason"].split(":")[0] for row in csv.DictReader(file))
