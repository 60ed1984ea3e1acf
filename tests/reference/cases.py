"""Ragged global batches for the objectives' tests: features, captions, and the Batch and Encoded a rank would get."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.schema import ASPECT_CODE, ASPECTS, MAX_CAPTIONS, NO_ASPECT_CODE, Aspect, text_hash
from pretrain.data.batch import Batch, PackedTexts
from pretrain.data.texts import plan_columns, plan_texts
from pretrain.models.dual_encoder import Encoded

#: ragged: no diagnosis, no sub-caption, one string for two images, one string under two aspects of one image
CAPTIONS: list[list[tuple[str, str]]] = [
    [
        ("caption", "w0"),
        ("diagnosis", "melanoma"),
        ("visual_concepts", "black"),
        ("morphology", "m0"),
        ("history", "h0"),
    ],
    [("caption", "w1"), ("diagnosis", "melanoma"), ("morphology", "m0"), ("body_site", "b1"), ("symptoms", "s1")],
    [("caption", "w2"), ("visual_concepts", "black"), ("morphology", "m2"), ("other", "w2")],
    [("caption", "w0"), ("diagnosis", "nevus")],
    [
        ("caption", "w4"),
        ("diagnosis", "nevus"),
        ("body_site", "b1"),
        ("management", "t4"),
        ("history", "h4"),
        ("other", "o4"),
    ],
    [("caption", "w5"), ("diagnosis", "eczema"), ("symptoms", "s1"), ("impression", "eczema")],
    [("caption", "w6"), ("management", "t6")],
    [("caption", "w7"), ("diagnosis", "melanoma"), ("history", "h0"), ("history", "h7")],
]


@dataclass
class Case:
    images: Tensor  # (N, D) unit, requires grad
    patches: Tensor  # (N, P, D) unit
    texts: dict[str, Tensor]  # (D,) unit by string
    scale: Tensor


def make_case(captions: list[list[tuple[str, str]]] = CAPTIONS, seed: int = 0, dim: int = 6, patches: int = 5) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    strings = sorted({text for image in captions for _, text in image})
    return Case(
        images=unit(len(captions), dim).requires_grad_(),
        patches=unit(len(captions), patches, dim).requires_grad_(),
        texts={string: unit(dim).requires_grad_() for string in strings},
        scale=torch.tensor([7.0], dtype=torch.float64, requires_grad=True),
    )


def rank_inputs(
    case: Case,
    captions: list[list[tuple[str, str]]],
    aspects_by_term: dict[str, tuple[Aspect, ...]],
    rank: int,
    world_size: int,
) -> tuple[Encoded, Batch, list[str]]:
    """What the reader and the towers give one rank. Also the strings this rank encodes, in order."""
    hashes = np.zeros((len(captions), MAX_CAPTIONS), dtype=np.uint64)
    codes = np.full((len(captions), MAX_CAPTIONS), NO_ASPECT_CODE, dtype=np.uint8)
    for i, image in enumerate(captions):
        for k, (aspect, text) in enumerate(image):
            hashes[i, k], codes[i, k] = text_hash(text), ASPECT_CODE[Aspect(aspect)]
    plan = plan_texts(hashes, codes, world_size)
    flat = {i * MAX_CAPTIONS + k: text for i, image in enumerate(captions) for k, (_, text) in enumerate(image)}
    strings = [flat[int(slot)] for slot in plan.first_slot_U[plan.supplied_by(rank)]]
    per_rank = len(captions) // world_size
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    text_NK = torch.from_numpy(plan.text_NK)
    batch = Batch(
        image_BCHW=torch.zeros(per_rank, 3, 1, 1, dtype=torch.uint8),
        sample_B=torch.arange(per_rank),
        text_BK=text_NK[mine],
        aspect_BK=torch.from_numpy(codes[mine].astype(np.int64)),
        text_NK=text_NK,
        packed=PackedTexts([], torch.arange(len(strings))),
        gathered_row_U=torch.from_numpy(plan.gathered_rows()),
        num_padded_texts=int(plan.num_texts_by_rank.max()),
        columns=plan_columns(plan, codes, aspects_by_term),
        visible_BV=None,
        masked_BM=None,
        num_truncated=0,
    )
    dim = case.images.shape[1]
    texts = torch.stack([case.texts[s] for s in strings]) if strings else torch.zeros(0, dim, dtype=torch.float64)
    encoded = Encoded(case.images[mine], case.patches[mine], texts, case.scale, None, None)
    return encoded, batch, strings


ALL_ASPECTS = ASPECTS
