"""One rank's part of a global batch, as the reader's processes prepare it.

Shapes: B images on this rank, N = W * B in the global batch, K caption slots, U distinct texts of the global
batch, U_r those that this rank encodes, P patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pretrain.data.buffers import Slot, delivered

_Self = TypeVar("_Self", bound="_OnDevice")


class _OnDevice:
    """Moves every tensor field, however nested in lists, dictionaries and dataclasses."""

    def to(self: _Self, device: torch.device) -> _Self:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: _Self) -> _Self:
        return self._map(torch.Tensor.pin_memory)

    def _map(self: _Self, function: Callable[[Tensor], object]) -> _Self:
        copy: _Self = _walk(self, Tensor, function)
        return copy


def _walk(value: Any, kind: type, function: Callable[[Any], object]) -> Any:
    """A copy in which `function` has replaced every value of that kind."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, _OnDevice):
        fields = {f.name: _walk(getattr(value, f.name), kind, function) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        return type(value)(**fields)
    if isinstance(value, list):
        return [_walk(item, kind, function) for item in value]
    if isinstance(value, dict):
        return {key: _walk(item, kind, function) for key, item in value.items()}
    return value


@dataclass
class PackedTexts(_OnDevice):
    """The distinct texts that this rank encodes, in length buckets, each trimmed to its own longest."""

    bucket_tokens: list[Tensor]  # each (U_b, L_b) int64; a bucket without a text holds one dummy, never used
    order_R: Tensor  # (U_r,) int64: text u stands in row order_R[u] of the concatenated buckets


@dataclass
class TermColumns(_OnDevice):
    """The distinct texts of the global batch that a contrastive term uses, and where each text stands among them."""

    text_C: Tensor  # (C,) int64 into the U texts
    column_of_text: Tensor  # (U + 1,) int64 into the C columns; C for a text that is none, and for the empty slot U
    #: (M,) int64 into the flattened (N, K), ascending: the slots that hold the term's texts, a text once an image
    slot_M: Tensor
    num_slots_by_rank: list[int]  # W numbers that add up to M


@dataclass
class DiagnosisDistances(_OnDevice):
    """How far the diagnoses of this rank's images lie from the global batch's in the hierarchy (soft targets)."""

    text_G: Tensor  # (G,) int64 into the U texts: the distinct diagnosis texts
    distance_BG: Tensor  # float32, edges between the image's node and the text's; inf where either has none


@dataclass
class Batch(_OnDevice):
    image_BCHW: Tensor  # uint8
    sample_B: Tensor  # int64 positions in the manifest's index
    text_BK: Tensor  # int64 into the U texts; U in a slot that is empty or that no term reads
    aspect_BK: Tensor  # int64 codes of `schema.ASPECTS`; NO_ASPECT_CODE in an empty slot
    text_NK: Tensor  # text_BK of all ranks, rank-major: who owns what is known without asking them
    #: one part a micro-batch, so that texts, too, are encoded a part at a time; empty without contrastive terms
    packed: list[PackedTexts]
    #: (U,) int64: text u stands in this row of the texts gathered from all ranks, each padded to `num_padded_texts`
    gathered_row_U: Tensor
    num_padded_texts: int  # the largest U_r over ranks
    columns: dict[str, TermColumns]  # by the objective's label
    diagnoses: DiagnosisDistances | None
    visible_BV: Tensor | None  # int64 patch positions that the masked student sees, ascending
    masked_BM: Tensor | None  # int64 the others
    num_truncated: int  # texts of this rank cut at the tokenizer's context length
    #: (position in the index, reason) of this rank's images that could not be decoded; their pixels are zeros
    damaged: tuple[tuple[int, str], ...] = ()
    slot: Slot | None = None  # in a reader process: where image_BCHW lies

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        """From a reader process: torch would open a file and a connection for each of the small tensors."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        image_BCHW, slot = fields.pop("image_BCHW"), fields.pop("slot")
        return _received, (slot or image_BCHW, _walk(fields, Tensor, Tensor.numpy))

    @property
    def num_texts(self) -> int:
        """U."""
        return int(self.gathered_row_U.shape[0])


def _received(images: Slot | Tensor, fields: dict[str, Any]) -> Batch:
    image_BCHW = delivered(images) if isinstance(images, Slot) else images
    return Batch(image_BCHW=image_BCHW, **_walk(fields, np.ndarray, torch.from_numpy))
