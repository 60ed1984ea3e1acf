"""What a training step costs, beside other ways of computing the same: `python -m benchmarks.step`.

    text    encoding of the captions, forward and backward, beside the padded form: all 11 slots at the full context
    77      the whole step (forward, backward, optimizer) beside the padded form: ViT-B/16 and its text tower
    256     the same with a text tower of PubMedBERT's size at 256 tokens
    losses  multi-aspect and local alignment alone, beside the padded form: time, and memory beyond the inputs
    clip    the plain step, packing off, beside open_clip's own model and ClipLoss in a bare loop
    masked  the step with masked latent (frozen teacher of the same size, half the patches), beside the plain one

Captions: step_workload.py; the padded form: padded_form.py; the parts: step_padded.py, step_plain.py. Both sides run in
one process on the same batches, take turns, and must compute the same loss to 1e-5. Figures are medians over the
rounds, with a 95 % bootstrap interval. On two idle cores it takes about half an hour. The padded form needs memory:
`77` 21 GB in all (0.6 GB an image, see --num-images), `256` and `text` 13 GB.

The last line is one JSON object. Speed-ups are the rival's time by ours, loss_memory_ratio its memory by ours,
vs_open_clip our time by open_clip's; masked_latent_cost is what masked latent adds, in plain steps; joint_view_cost the
whole step with the contrastive term on the masked view, in plain steps. `dense`: the same where 8 of the 11 slots hold
a caption.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch

from benchmarks import step_padded, step_plain
from benchmarks.step_common import Row, Sizes, say
from benchmarks.step_workload import Workload, make_workload
from data_prep.schema import MAX_CAPTIONS, NO_ASPECT_CODE
from pretrain.data.manifest import ShardedDataset

PARTS: dict[str, Callable[[Path, Workload, Sizes], list[Row]]] = {
    "text": step_padded.text,
    "77": step_padded.step_77,
    "256": step_padded.step_256,
    "losses": step_padded.losses,
    "clip": step_plain.vs_open_clip,
    "masked": step_plain.masked_latent,
}
#: the least of a speed-up or a ratio of memories, the most of a cost
AT_LEAST = {
    "text_speedup": 6.0,
    "step_speedup_77": 2.0,
    "step_speedup_256": 5.0,
    "loss_speedup": 5.0,
    "loss_memory_ratio": 4.0,
}
AT_MOST = {"vs_open_clip": 1.02, "masked_latent_cost": 1.0, "joint_view_cost": 1.15}

#: PubMedBERT's; without dropout, so that both sides' losses can be compared
_BERT_BASE = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_TINY_VISION = {"image_size": 96, "patch_size": 12, "width": 64, "layers": 2, "head_width": 32}
_TINY_BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


def full_sizes() -> Sizes:
    vision_cfg = open_clip.get_model_config("ViT-B-16")["vision_cfg"]
    return Sizes(tower_256={"embed_dim": 512, "vision_cfg": vision_cfg}, bert=_BERT_BASE)


def quick_sizes(folder: Path) -> Sizes:
    """Tiny towers, few images: shows that everything runs, and nothing about time."""
    text_cfg = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    path = folder / "tiny.json"
    model_cfg = {"embed_dim": 64, "vision_cfg": _TINY_VISION, "text_cfg": text_cfg}
    path.write_text(json.dumps({"model_cfg": model_cfg}), encoding="utf-8")
    return Sizes(
        tower_77=str(path),
        tower_256={"embed_dim": 64, "vision_cfg": _TINY_VISION},
        bert={**_BERT_BASE, **_TINY_BERT},
        num_images=4,
        num_images_256=2,
        num_images_plain=2,
        num_images_losses=32,
        num_patches_losses=4,
        width_losses=32,
        min_block=4,
        num_rounds=1,
        num_rounds_text=1,
        num_rounds_near=2,
    )


# ---------------------------------------------------------------------------------------------- tables


def valid_captions(directory: Path) -> tuple[float, float]:
    """(valid captions an image, share of distinct strings among those of 32 images)."""
    index = ShardedDataset(directory).index
    is_valid = index["text_aspect"] != NO_ASPECT_CODE
    order = np.random.default_rng(0).permutation(len(index))
    groups = [order[first : first + 32] for first in range(0, len(order) - 31, 32)]
    shares = [len(np.unique(index["text_hash"][g][is_valid[g]])) / is_valid[g].sum() for g in groups]
    return float(is_valid.sum(1).mean()), float(np.mean(shares))


def is_met(row: Row) -> bool:
    """A ratio near 1 passes when the better end of its interval does."""
    return row.value >= AT_LEAST[row.key] if row.key in AT_LEAST else row.interval[0] <= AT_MOST[row.key]


def print_table(title: str, rows: Sequence[Row], with_bars: bool) -> None:
    print(f"\n{title}")
    print("figure                   rival        ours     value  interval             bar")
    for row in rows:
        unit = "MB" if row.key == "loss_memory_ratio" else "s "
        bar = f">= {AT_LEAST[row.key]:g}" if row.key in AT_LEAST else f"<= {AT_MOST[row.key]:g}"
        verdict = f"{bar:8} {'met' if is_met(row) else 'missed'}" if with_bars else ""
        low, high = row.interval
        print(
            f"{row.key:20} {row.rival:9.3f} {unit} {row.ours:8.3f} {unit} {row.value:7.3f}"
            f"  [{low:7.3f}, {high:7.3f}]  {verdict}"
        )


def to_json(rows: Sequence[Row], valid: float) -> dict[str, Any]:
    def figures(is_dense: bool) -> dict[str, float]:
        return {row.key: round(row.value, 3) for row in rows if row.is_dense == is_dense}

    intervals = {row.key: [round(end, 3) for end in row.interval] for row in rows if not row.is_dense}
    return {**figures(False), "valid_captions": round(valid, 2), "intervals": intervals, "dense": figures(True)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--only", help=f"parts, separated by commas: {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny towers: whether it runs, not how fast")
    parser.add_argument("--num-images", type=int, help="of text and 77, instead of 32, where memory is short")
    parser.add_argument("--num-rounds", type=int, help="of parts whose ratio is near 1, instead of 20")
    arguments = parser.parse_args()
    names = list(PARTS) if arguments.only is None else arguments.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    rows, minutes = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload = make_workload(folder)
        sizes = quick_sizes(folder) if arguments.quick else full_sizes()
        changes = {"num_images": arguments.num_images, "num_rounds_near": arguments.num_rounds}
        sizes = sizes.with_changes({key: value for key, value in changes.items() if value is not None})
        for part in names:
            start_s = time.perf_counter()
            rows += PARTS[part](folder, workload, sizes)
            gc.collect()  # a part's towers go before the next one's come
            minutes[part] = (time.perf_counter() - start_s) / 60
            say(f"{part}: {minutes[part]:.1f} minutes")
        valid, share = valid_captions(workload.as_prepared)
        dense_valid, dense_share = valid_captions(workload.dense)
    source = "900 Derm1M rows" if workload.is_real else "900 rows from templates (DERMVLP_DATA is not set)"
    print(f"captions: {source}, decomposed by rules; {torch.get_num_threads()} CPU threads")
    if arguments.quick:
        print("--quick: tiny towers, these times mean nothing")
    about = f"{valid:.2f} of {MAX_CAPTIONS} slots valid, {share:.0%} of the strings in 32 images distinct"
    print_table(f"As prepared: {about}", [row for row in rows if not row.is_dense], not arguments.quick)
    about = f"{dense_valid:.2f} of {MAX_CAPTIONS} slots valid, {dense_share:.0%} distinct; added strings are spliced"
    print_table(f"Filled up: {about}", [row for row in rows if row.is_dense], False)
    print("\nminutes: " + ", ".join(f"{part} {value:.1f}" for part, value in minutes.items()))
    print(json.dumps(to_json(rows, valid)))


if __name__ == "__main__":
    main()
