"""The card of a published data set: counts, licences, what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from data_prep.schema import ShardManifest
from pretrain.publish.licences import find_licence
from pretrain.publish.markdown import bullets, count_table, plain, table

TAGS = ("dermatology", "medical", "image-text", "webdataset", "dermvlp")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))

_GATED_PROMPT = (
    "These are medical images and texts. They are for research. By asking for access you agree to the licence of each "
    "sample, to try to identify nobody, and to pass nothing on that its licence does not allow."
)


@dataclass(frozen=True)
class SplitFacts:
    """What of one split was published."""

    name: str
    manifest: ShardManifest  # of the prepared split, before anything was left out
    num_samples: int  # with a caption or an image
    num_captions: int
    num_images: int
    licences: dict[str, int]  # published samples
    sources: dict[str, int]  # published samples, by whom to attribute them to
    diagnoses: dict[str, int]  # published samples
    left_out: dict[str, int]  # samples by the reason for which something of them was left out
    with_images: bool  # False: the publisher asked for captions alone


def data_card(repo: str, splits: Sequence[SplitFacts], is_gated: bool = False) -> str:
    """The text of README.md; equal facts give equal bytes.

    Raises ValueError where the front matter, read back, is not what was meant.
    """
    data = DatasetCardData(**_front_matter(splits, is_gated))
    name = repo.rpartition("/")[2]
    rows = [
        (plain(s.name), f"{s.manifest.num_samples:,}", f"{s.num_samples:,}", f"{s.num_images:,}", f"{s.num_captions:,}")
        for s in splits
    ]
    parts = [
        f"# {plain(name)}",
        f"{plain(splits[0].manifest.dataset)}: dermatological images and captions, prepared by dermvlp for contrastive "
        "pretraining. For research; nothing here is a medical record, and nobody is to be identified.",
        table(("split", "samples prepared", "published", "images", "captions"), rows),
        "## Licences",
        "Each sample keeps the licence of its source: the column `licence` of the captions, the field of that name in "
        "the shards.",
        count_table("licence", _sum(split.licences for split in splits), "samples"),
        "Attribute them to their sources, as the licences ask:",
        count_table("source", _sum(split.sources for split in splits), "samples"),
        "## What was left out",
        _left_out(splits),
        "## Files",
        _files(splits),
        "## What is in it",
        count_table("diagnosis", _sum(split.diagnoses for split in splits), "samples", most=20),
        f"Sub-captions were made by {plain(splits[0].manifest.decomposer)}; `origin` says of every caption where it "
        "came from. Patients and lesions stand as salted hashes. The originals' file names and metadata are not here.",
    ]
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    read_back = DatasetCard(content).data.to_dict()
    if read_back != data.to_dict():
        raise ValueError(f"{repo}: the card's front matter does not survive being read: {read_back}")
    return content


def _front_matter(splits: Sequence[SplitFacts], is_gated: bool) -> dict[str, Any]:
    num_samples = sum(split.num_samples for split in splits)
    published = [split for split in splits if split.num_captions]
    fields: dict[str, Any] = {
        "language": ["en"],
        "tags": list(TAGS),
        "task_categories": ["zero-shot-image-classification", "image-to-text"],
        "size_categories": [next((name for limit, name in _SIZES if num_samples < limit), "1M<n<10M")],
        "pretty_name": splits[0].manifest.dataset,
        "configs": [
            {
                "config_name": "captions",
                "data_files": [{"split": s.name, "path": f"{s.name}/captions.parquet"} for s in published],
            }
        ],
    }
    fields |= _licence_fields(splits)
    if is_gated:
        fields["extra_gated_prompt"] = _GATED_PROMPT
        fields["extra_gated_fields"] = {"Name": "text", "Affiliation": "text", "Intended use": "text"}
    return fields


def _licence_fields(splits: Sequence[SplitFacts]) -> dict[str, Any]:
    """One licence where all samples have it, else `other`: the licences of the samples."""
    names = {name for split in splits for name in split.licences}
    found = {licence for licence in map(find_licence, names) if licence is not None}
    if len(found) == 1 and (licence := next(iter(found))).hub_id != "other":
        return {"license": licence.hub_id}
    return {"license": "other", "license_name": "licences-of-the-samples"}


def _left_out(splits: Sequence[SplitFacts]) -> str:
    reasons = _sum(split.left_out for split in splits)
    lines = [f"{plain(reason)}: {count:,} samples" for reason, count in reasons.items()]
    if not all(split.with_images for split in splits):
        lines.append("All images: the publisher chose to publish captions alone.")
    return bullets(lines) if lines else "Nothing."


def _files(splits: Sequence[SplitFacts]) -> str:
    lines = ["`SPLIT/captions.parquet`: a row a caption, with its aspect, origin and licence."]
    if any(split.num_images for split in splits):
        lines.append(
            "`SPLIT/shard-*.tar`: WebDataset shards (`jpg`, `json`, `txt`); `manifest.json`, `index.npy` and "
            "`image_hashes.npy` beside them belong to these shards."
        )
    return bullets(lines)


def _sum(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())
