"""A few samples as the model sees them: the image, its texts with their weights, the most probable classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data_prep.schema import SUBCAPTION_ASPECTS, Aspect
from pretrain.config import DiagnosisWeights, MultiAspectObjective, TrainConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.data.transforms import decode
from pretrain.evaluation.encoding.features import embed_images
from pretrain.evaluation.interfaces import Encoder
from pretrain.evaluation.methods import zero_shot
from pretrain.evaluation.metrics.classification import top_predictions
from pretrain.evaluation.reports.run import GalleryCaption, GalleryItem
from pretrain.losses.weights import diagnosis_guided
from pretrain.prompts import TEMPLATES_PATH, load_templates


def gallery(
    encoder: Encoder, data: ShardedDataset, classnames: Sequence[str], config: TrainConfig, num_items: int = 8
) -> tuple[GalleryItem, ...]:
    """Samples of different classes, spread over the split."""
    templates = load_templates(TEMPLATES_PATH)
    classifier_CD = zero_shot.build_classifier(encoder.encode_texts, classnames, templates)
    multi_aspect = next((o for o in config.objectives if isinstance(o, MultiAspectObjective)), None)
    guided = DiagnosisWeights() if multi_aspect is None else multi_aspect.diagnosis_weights
    positions = _positions(data, num_items)
    image_ND = embed_images(encoder, [decode(data.read_image(position)) for position in positions])
    shares_NC = zero_shot.probabilities(image_ND, classifier_CD, encoder.logit_scale)
    predictions = top_predictions(shares_NC, classnames)
    return tuple(
        _item(encoder, data, position, predicted, guided)
        for position, predicted in zip(positions, predictions, strict=True)
    )


def _positions(data: ShardedDataset, num_items: int) -> list[int]:
    """The first sample of each diagnosis, in the order of the split; more of them where there are few diagnoses."""
    seen: dict[str | None, list[int]] = {}
    for position in range(len(data)):
        seen.setdefault(data.read_sample(position).diagnosis, []).append(position)
    rounds = max(len(positions) for positions in seen.values())
    in_turn = [positions[turn] for turn in range(rounds) for positions in seen.values() if turn < len(positions)]
    return in_turn[:num_items]


def _item(
    encoder: Encoder,
    data: ShardedDataset,
    position: int,
    predictions: Sequence[tuple[str, float]],
    guided: DiagnosisWeights | None,
) -> GalleryItem:
    sample = data.read_sample(position)
    aspects = [caption.aspect for caption in sample.captions]
    weights: list[float | None] = [None] * len(aspects)
    if guided is not None and Aspect.DIAGNOSIS in aspects:
        text_1KD = torch.from_numpy(encoder.encode_texts([caption.text for caption in sample.captions])).unsqueeze(0)
        is_subcaption = torch.tensor([[aspect in SUBCAPTION_ASPECTS for aspect in aspects]])
        diagnosis_1D = text_1KD[:, aspects.index(Aspect.DIAGNOSIS)]
        values = diagnosis_guided(text_1KD, diagnosis_1D, torch.tensor([True]), is_subcaption, guided.temperature)
        weights = [float(value) for value in values[0]]
    captions = tuple(
        GalleryCaption(str(caption.aspect), caption.text, weight)
        for caption, weight in zip(sample.captions, weights, strict=True)
    )
    return GalleryItem(data.read_image(position), sample.diagnosis, captions, tuple(predictions))
