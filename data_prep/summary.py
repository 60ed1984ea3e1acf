"""What a preparation gave, for people: counts by split, by aspect, and what was rejected and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from data_prep.labels.coverage import print_coverage
from data_prep.rejected import read_ledger
from data_prep.schema import SUBCAPTION_ASPECTS, ShardManifest


def print_summary(out_dir: Path, manifests: Mapping[str, ShardManifest], seconds: float) -> None:
    for split, manifest in manifests.items():
        num_subcaptions = sum(manifest.captions_by_aspect.get(aspect, 0) for aspect in SUBCAPTION_ASPECTS)
        print(
            f"{split}: {manifest.num_samples} samples in {len(manifest.shards)} shards, "
            f"{len(manifest.samples_by_diagnosis)} diagnoses, "
            f"{num_subcaptions / max(1, manifest.num_samples):.1f} sub-captions a sample ({manifest.decomposer})"
        )
        print("  captions by aspect: " + ", ".join(f"{a} {n}" for a, n in manifest.captions_by_aspect.items()))
        for note, count in manifest.notes.items():
            print(f"  {note}: {count}")
    for reason, count in rejected_by_reason(out_dir).most_common():
        print(f"rejected {count}: {reason}")
    if any(manifest.num_rejected for manifest in manifests.values()):
        print(f"every rejected row, to repair or to leave out: {out_dir / 'rejected.csv'}")
    if (out_dir / "caption_failures.csv").is_file():
        print(f"captions that the model could not split: {out_dir / 'caption_failures.csv'}")
    plan = json.loads((out_dir / "work" / "plan.json").read_text(encoding="utf-8"))
    for what in ("diagnoses", "concepts"):
        if plan[what] is not None:
            print_coverage(what, plan[what], num_listed=3)
    print(f"{seconds:.1f} s, in {out_dir}; see {out_dir / 'report.html'}")


def rejected_by_reason(out_dir: Path) -> Counter[str]:
    """Without the particulars of a row, which follow a colon; of leakage, with where it leads."""
    reasons = (entry.reason for entry in read_ledger(out_dir / "rejected.csv"))
    return Counter(reason if reason.startswith("leakage") else reason.split(":")[0] for reason in reasons)
