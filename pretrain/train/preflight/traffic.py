"""What a training step sends between ranks: the formulas of docs/communication.md, for any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_prep.schema import MAX_CAPTIONS
from pretrain.config import (
    ClipObjective,
    EmaTeacher,
    LocalAlignmentObjective,
    MultiAspectObjective,
    TrainConfig,
)
from pretrain.objectives.build import build_objectives, find_masked_latent
from pretrain.train.preflight.memory import BYTES
from pretrain.train.preflight.towers import Count

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind for one purpose, in one step."""

    what: str
    kind: Kind
    num_elements: int  # that a rank puts in, over the step: of an all_gather its own part, else the whole
    element_bytes: int

    def sent_bytes(self, num_ranks: int) -> int:
        """Bytes that a rank sends (and receives) in a ring, the least there is for any rank."""
        put_in, others = self.num_elements * self.element_bytes, num_ranks - 1
        if self.kind == "all_gather":
            return put_in * others
        return (2 if self.kind == "all_reduce" else 1) * put_in * others // num_ranks


def step_traffic(
    config: TrainConfig,
    counts: dict[str, Count],
    embed_dim: int,
    max_texts_of_a_rank: int,
    num_ranks: int,
    num_parts: int,
) -> list[Transfer]:
    """Of a step that is not logged; a single rank sends nothing.

    Args:
        counts: of `Towers.counts`.
        max_texts_of_a_rank: the distinct texts of the rank that encodes most.
    """
    if num_ranks == 1:
        return []
    return [
        *_features(config, embed_dim, max_texts_of_a_rank, num_ranks),
        *_weights(config, counts, num_ranks, num_parts),
        *_teacher(config, counts, num_ranks),
        Transfer("agreement (CPU)", "all_reduce", 3, 8),
    ]


def _features(config: TrainConfig, embed_dim: int, max_texts: int, num_ranks: int) -> list[Transfer]:
    contrastive = build_objectives(config.objectives)
    if not contrastive:
        return []
    e, images = BYTES[config.engine.precision], config.global_batch_size // num_ranks
    terms = config.objectives
    softmax = [term for term in terms if isinstance(term, ClipObjective | MultiAspectObjective)]
    found = [
        Transfer("texts", "all_gather", max_texts * embed_dim, e),
        Transfer("texts' gradients", "reduce_scatter", num_ranks * max_texts * embed_dim, e),
        Transfer("images", "all_gather", images * embed_dim, e),
    ]
    if softmax:
        found.append(Transfer("images' gradients", "reduce_scatter", num_ranks * images * embed_dim, e))
        found.append(Transfer("caption weights", "all_gather", len(softmax) * 2 * images * MAX_CAPTIONS, 4))
    for term in terms:
        if isinstance(term, LocalAlignmentObjective):
            found.append(Transfer("images with a region", "all_reduce", 1, 8))
            if term.text_to_region:
                size = images * MAX_CAPTIONS
                found.append(Transfer("regions", "all_gather", size * embed_dim, 4))
                found.append(Transfer("regions' gradients", "reduce_scatter", num_ranks * size * embed_dim, 4))
                found.append(Transfer("regions' weights", "all_gather", size, 4))
    return found


def _weights(config: TrainConfig, counts: dict[str, Count], num_ranks: int, num_parts: int) -> list[Transfer]:
    """What the engine sends: gradients, and the updated or gathered weights."""
    engine = config.engine
    e = 4 if engine.kind == "torch" else BYTES[engine.precision]
    module = [count for part, count in counts.items() if part != "teacher"]
    trained, whole = sum(count.trained for count in module), sum(count.total for count in module)
    if engine.kind == "torch" or engine.zero_stage == 0:
        return [Transfer("gradients", "all_reduce", trained, e)]
    if engine.zero_stage == 1:
        gradients = Transfer("gradients", "all_reduce", trained, e)
    else:  # partitioned after every backward
        text, in_parts = counts.get("text", Count()), num_parts > 1
        again = (num_parts - 1) * (trained - text.trained) + num_parts * text.trained if in_parts else 0
        kind: Kind = "all_reduce" if engine.zero_stage == 2 else "reduce_scatter"
        gradients = Transfer("gradients", kind, trained + again, e)
    if engine.zero_stage < 3:
        return [gradients, Transfer("updated weights", "all_gather", -(-trained // num_ranks), e)]
    # gathered by a forward and again by its backward; in parts, by the first pass and by both of the second
    times = 3 * num_parts if num_parts > 1 else 2
    touched = 2 * counts.get("text", Count()).total if num_parts > 1 else 0
    return [gradients, Transfer("gathered weights", "all_gather", -(-(times * whole + touched) // num_ranks), e)]


def _teacher(config: TrainConfig, counts: dict[str, Count], num_ranks: int) -> list[Transfer]:
    """An EMA teacher follows fp32 masters, of which ranks hold parts."""
    masked, engine = find_masked_latent(config.objectives), config.engine
    if masked is None or not isinstance(masked.teacher, EmaTeacher) or engine.kind == "torch":
        return []
    if engine.zero_stage == 3:
        return [Transfer("teacher", "all_gather", -(-counts["image"].total // num_ranks), 4)]
    if engine.precision != "fp32":
        return [Transfer("teacher", "all_reduce", counts["image"].trained, 4)]
    return []
