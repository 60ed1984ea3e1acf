"""Ragged global batches for the objectives' tests: features, captions, and what a rank's objectives would get."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.schema import (
    ASPECT_CODE,
    INDEX_DTYPE,
    MAX_CAPTIONS,
    NO_ASPECT_CODE,
    SUBCAPTION_ASPECTS,
    Aspect,
    text_hash,
)
from pretrain.config import LocalAlignmentObjective, ObjectiveConfig
from pretrain.data.batch import Batch
from pretrain.data.diagnoses import DiagnosisTable, diagnosis_distances, hierarchy_distances
from pretrain.data.texts import TextPlan, plan_columns, plan_texts
from pretrain.objectives.build import build_objectives
from pretrain.objectives.features import Features, gather_features, gather_texts, select_regions, texts_of_slots

Captions = list[list[tuple[str, str]]]

#: ragged: no diagnosis, no sub-caption, one string for two images, one string under two aspects of one image
CAPTIONS: Captions = [
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
    [("caption", "w6"), ("diagnosis", "something unheard of"), ("management", "t6")],
    [("caption", "w7"), ("diagnosis", "melanoma"), ("history", "h0"), ("history", "h7")],
]

#: diagnosis text -> its path, general to specific; "melanocytic" has two parents, "naevus" is another text of a node
PATHS: dict[str, tuple[str, ...]] = {
    "melanoma": ("neoplastic", "malignant", "melanocytic", "melanoma"),
    "nevus": ("neoplastic", "benign", "melanocytic", "nevus"),
    "naevus": ("neoplastic", "benign", "melanocytic", "nevus"),
    "eczema": ("inflammatory", "eczema"),
    "psoriasis": ("inflammatory", "psoriasis"),
    "something unheard of": (),
}


@dataclass
class Case:
    images: Tensor  # (N, D) unit, requires grad
    patches: Tensor  # (N, P, D) unit
    texts: dict[str, Tensor]  # (D,) unit by string
    scale: Tensor
    bias: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.images, self.patches, self.scale, self.bias, *self.texts.values()]


def make_case(captions: Captions = CAPTIONS, seed: int = 0, dim: int = 6, patches: int = 5) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    strings = sorted({text for image in captions for _, text in image})
    return Case(
        images=unit(len(captions), dim).requires_grad_(),
        patches=unit(len(captions), patches, dim).requires_grad_(),
        texts={string: unit(dim).requires_grad_() for string in strings},
        scale=torch.tensor([7.0], dtype=torch.float64, requires_grad=True),
        bias=torch.tensor([-3.0], dtype=torch.float64, requires_grad=True),
    )


def random_captions(seed: int, num_images: int = 6) -> Captions:
    """Few strings, so that images share them, and the same one stands under several aspects of an image."""
    draw = random.Random(seed)
    captions: Captions = []
    for i in range(num_images):
        image = [("caption", draw.choice([f"w{i}", f"w{i}", "w0", "shared", "nevus"]))]
        if draw.random() < 0.7:
            image.append(("diagnosis", draw.choice(list(PATHS))))
        if draw.random() < 0.5:
            image.append(("visual_concepts", draw.choice(["black", "red", "shared"])))
        for _ in range(draw.randint(0, 4)):
            aspect = str(draw.choice(SUBCAPTION_ASPECTS))
            image.append((aspect, draw.choice([f"{aspect} {draw.randint(0, 2)}", "shared", "nevus", f"only {i}"])))
        draw.shuffle(image)
        captions.append(image)
    return captions


def index_rows(captions: Captions) -> np.ndarray:
    """Rows of the shards' index, as far as texts are concerned."""
    rows = np.zeros(len(captions), dtype=INDEX_DTYPE)
    rows["text_aspect"] = NO_ASPECT_CODE
    for i, image in enumerate(captions):
        for k, (aspect, text) in enumerate(image):
            rows["text_hash"][i, k], rows["text_aspect"][i, k] = text_hash(text), ASPECT_CODE[Aspect(aspect)]
    return rows


def diagnosis_table(paths: dict[str, tuple[str, ...]] = PATHS) -> DiagnosisTable:
    names = list(dict.fromkeys(path[-1] for path in paths.values() if path))
    node = {text_hash(text): names.index(path[-1]) if path else -1 for text, path in paths.items()}
    hashes = np.array(sorted(node), dtype=np.uint64)
    nodes = np.array([node[int(h)] for h in hashes], dtype=np.int64)
    return DiagnosisTable(hashes, nodes, hierarchy_distances(names, paths.values()))


def encoded_by(plan: TextPlan, captions: Captions, rank: int) -> list[str]:
    """The strings that a rank encodes, in order."""
    flat = {i * MAX_CAPTIONS + k: text for i, image in enumerate(captions) for k, (_, text) in enumerate(image)}
    return [flat[int(slot)] for slot in plan.first_slot_U[plan.supplied_by(rank)]]


def rank_features(
    case: Case, captions: Captions, configs: Sequence[ObjectiveConfig], rank: int = 0, world_size: int = 1
) -> Features:
    """What the reader and the towers give one rank's objectives. Over several ranks all have to call it: it gathers."""
    rows = index_rows(captions)
    aspects_read = frozenset[Aspect]().union(*(config.aspects_read for config in configs))
    plan = plan_texts(rows["text_hash"], rows["text_aspect"], world_size, aspects_read)
    per_rank = len(captions) // world_size
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    text_NK = torch.from_numpy(plan.text_NK)
    aspects = {objective.label: objective.aspects for objective in build_objectives(configs)}
    batch = Batch(
        image_BCHW=torch.zeros(per_rank, 3, 1, 1, dtype=torch.uint8),
        sample_B=torch.arange(per_rank),
        text_BK=text_NK[mine],
        aspect_BK=torch.from_numpy(rows["text_aspect"][mine].astype(np.int64)),
        text_NK=text_NK,
        packed=[],
        gathered_row_U=torch.from_numpy(plan.gathered_rows()),
        num_padded_texts=int(plan.num_texts_by_rank.max()),
        columns=plan_columns(plan, rows["text_aspect"], aspects),
        diagnoses=diagnosis_distances(diagnosis_table(), plan, rows, mine),
        visible_BV=None,
        masked_BM=None,
        num_truncated=0,
    )
    # a rank without a text of its own has a tower, too: its empty features are part of the graph
    positions = [list(case.texts).index(string) for string in encoded_by(plan, captions, rank)]
    text_UD = gather_texts(torch.stack(list(case.texts.values()))[positions], batch)
    sigma = next((config.sigma for config in configs if isinstance(config, LocalAlignmentObjective)), None)
    regions = None
    if sigma is not None:
        regions = select_regions(case.patches[mine], texts_of_slots(text_UD, batch.text_BK), sigma)
    return gather_features(batch, case.images[mine], text_UD, regions, case.scale, case.bias)
