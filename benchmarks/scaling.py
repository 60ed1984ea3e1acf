"""A recipe on up to 1,024 ranks, computed and not run: `python -m benchmarks.scaling [--recipe PATH]`.

Memory of a rank by ZeRO stage, bytes that a rank sends in a step, and the matrices of similarities: the tables of
docs/scaling.md, from the code of `dermvlp train --plan` (towers on the meta device). How many texts an image has is
assumed, not read: see the options. The last figure is measured: what planning the texts of one such batch takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.config_file import load_config
from data_prep.schema import ASPECTS, MAX_CAPTIONS, NO_ASPECT_CODE
from pretrain.config import ClipObjective, LocalAlignmentObjective, MultiAspectObjective, TrainConfig
from pretrain.data.texts import plan_columns, plan_texts
from pretrain.train.preflight.captions import TermSize
from pretrain.train.preflight.memory import STAGES, activations, feature_bytes, logit_bytes, state_bytes
from pretrain.train.preflight.towers import Count, Towers, build_towers
from pretrain.train.preflight.traffic import step_traffic

RANKS = (8, 64, 256, 1024)
_OF_WEIGHTS = ("gradients", "updated weights", "gathered weights", "teacher")
_MAX_IMAGES = 128  # of one forward
_GB, _MB = 1e9, 1e6


def towers_of(config: TrainConfig) -> Towers:
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        towers = build_towers(config, 1, Path(folder), problems.append)
    if towers is None or problems:
        raise SystemExit("; ".join(problems))
    return towers


def module_count(towers: Towers) -> Count:
    counts = [count for part, count in towers.counts().items() if part != "teacher"]
    return Count(sum(count.trained for count in counts), sum(count.frozen for count in counts))


def memory_table(config: TrainConfig, towers: Towers) -> Iterator[str]:
    module, teacher = module_count(towers), towers.counts().get("teacher", Count()).total
    yield "| GB of a rank, " + config.engine.precision + " | ranks | " + " | ".join(f"ZeRO {s}" for s in STAGES) + " |"
    yield "|---|---|" + "---|" * len(STAGES)
    for num_ranks in RANKS:
        states = [state_bytes(module, teacher, config.engine, num_ranks, stage) for stage in STAGES]
        if num_ranks == RANKS[0]:
            for part in states[0]:
                if any(state[part] for state in states):
                    cells = " | ".join(f"{state[part] / _GB:.2f}" for state in states)
                    yield f"| {part} | {num_ranks} | {cells} |"
        yield f"| all of these | {num_ranks} | " + " | ".join(f"{sum(s.values()) / _GB:.2f}" for s in states) + " |"


def traffic_table(config: TrainConfig, towers: Towers, texts_per_image: float) -> Iterator[str]:
    yield "| ranks | images a rank | forwards | features | " + " | ".join(f"ZeRO {s}" for s in STAGES) + " |"
    yield "|---|---|---|---|" + "---|" * len(STAGES)
    for num_ranks in RANKS:
        images = config.global_batch_size // num_ranks
        num_parts = max(1, images // _MAX_IMAGES)
        cells, features = [], 0.0
        for stage in STAGES:
            engine = config.engine.model_copy(update={"zero_stage": stage})
            transfers = step_traffic(
                config.model_copy(update={"engine": engine}),
                towers.counts(),
                towers.embed_dim,
                round(images * texts_per_image),
                num_ranks,
                num_parts,
            )
            weights = [t for t in transfers if t.what in _OF_WEIGHTS]
            of_weights = sum(t.sent_bytes(num_ranks) for t in weights)
            features = sum(t.sent_bytes(num_ranks) for t in transfers) - of_weights
            cells.append(f"{of_weights / _MB:,.0f}")
        yield f"| {num_ranks:,} | {images:,} | {num_parts} | {features / _MB:,.0f} | " + " | ".join(cells) + " |"


def similarity_table(num_images: int, embed_dim: int, captions: float, texts: float) -> Iterator[str]:
    """GB of one rank, by term."""
    one, all_ = TermSize(num_images, num_images), TermSize(captions * num_images, texts * num_images)
    terms = {
        "`clip`, one caption an image": (ClipObjective(), one),
        "`multi_aspect`": (MultiAspectObjective(), all_),
        "`local_alignment`": (LocalAlignmentObjective(), all_),
    }
    yield (
        "| term | columns | whole matrix | "
        + " | ".join(f"{n:,} ranks" for n in RANKS)
        + " | texts, fp32, every rank |"
    )
    yield "|---|---|---|" + "---|" * len(RANKS) + "---|"
    for name, (term, size) in terms.items():
        rows = size.captions if isinstance(term, LocalAlignmentObjective) else num_images
        cut = " | ".join(f"{logit_bytes(term, num_images, size, ranks) / _GB:.2f}" for ranks in RANKS)
        features = feature_bytes(0, size.columns, [size.columns], embed_dim) / _GB
        yield f"| {name} | {size.columns:,.0f} | {4 * rows * size.columns / _GB:.1f} | {cut} | {features:.2f} |"


def seconds_to_plan_texts(num_images: int, captions: int, num_ranks: int) -> float:
    """What a reader process of every rank does for every batch, of random texts: who encodes what, and the columns."""
    random = np.random.default_rng(0)
    hash_NK = random.integers(2**63, size=(num_images, MAX_CAPTIONS), dtype=np.uint64)
    aspect_NK = np.full((num_images, MAX_CAPTIONS), NO_ASPECT_CODE, dtype=np.uint8)
    aspect_NK[:, :captions] = np.arange(captions)
    started = time.process_time()
    plan = plan_texts(hash_NK, aspect_NK, num_ranks)
    plan_columns(plan, aspect_NK, {"multi_aspect": ASPECTS})
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--recipe", default="configs/pretrain/dermfm_zero_stage2_contrastive.yaml")
    parser.add_argument("--batch", type=int, default=32768, help="images a step, over all ranks")
    parser.add_argument("--captions", type=float, default=5.0, help="valid captions an image (all aspects)")
    parser.add_argument("--texts", type=float, default=4.3, help="distinct ones an image, in one batch")
    arguments = parser.parse_args()
    config = load_config(arguments.recipe, [f"global_batch_size={arguments.batch}"], TrainConfig)
    towers = towers_of(config)
    counts = {part: f"{count.total / 1e6:.1f} M" for part, count in towers.counts().items()}
    print(f"{arguments.recipe}: {counts}\n\nWeights and optimizer of a rank\n")
    print("\n".join(memory_table(config, towers)))
    context = int(towers.model.spec.model_cfg["text_cfg"].get("context_length", 77))
    kept = activations(towers.model, config, towers.image_px, context)
    print(
        f"\nActivations: {kept.per_image / _MB:.1f} MB an image, {kept.per_token / 1e3:.1f} kB a token of packed text"
    )
    print(f"\nMB that a rank sends in a step of {arguments.batch:,} images, weights by ZeRO stage\n")
    print("\n".join(traffic_table(config, towers, 1.0)))
    print(f"\nGB of similarities kept by a rank, {arguments.batch:,} images\n")
    print("\n".join(similarity_table(arguments.batch, towers.embed_dim, arguments.captions, arguments.texts)))
    seconds = seconds_to_plan_texts(arguments.batch, round(arguments.captions), RANKS[-1])
    print(f"\nTo plan the texts of one batch for {RANKS[-1]:,} ranks: {seconds:.2f} s of one core, on every rank")


if __name__ == "__main__":
    main()
