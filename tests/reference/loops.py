"""Float64 references of the losses, written as loops over the specification's sentences. Slow and plain on purpose.

An image is a list of (aspect, string, weight) captions; texts are features by string. Nothing here is shared with
`pretrain.losses`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logaddexp(values: list[Tensor]) -> Tensor:
    """log of the sum of exponentials of scalars; minus infinity for none."""
    if not values:
        return torch.tensor(-math.inf, dtype=torch.float64)
    largest = max(float(value.detach()) for value in values)
    return largest + torch.stack([(value - largest).exp() for value in values]).sum().log()


def own_texts(captions: list[tuple[str, str]], weights: list[float], aspects: set[str]) -> dict[str, float]:
    """The image's texts in the term with their weights; a string under several aspects takes the largest."""
    result: dict[str, float] = {}
    for (aspect, text), weight in zip(captions, weights, strict=True):
        if aspect in aspects and weight > 0:
            result[text] = max(result.get(text, 0.0), weight)
    return result


def contrastive(
    images: Tensor,
    text_features: dict[str, Tensor],
    captions: list[list[tuple[str, str]]],
    weights: list[list[float]],
    aspects: set[str],
    scale: Tensor,
    own_as_negatives: bool = False,
) -> Tensor:
    """(I2T + T2I) / 2 over distinct texts with ownership."""
    owned = [{text for _, text in image} for image in captions]
    mine = [own_texts(c, w, aspects) for c, w in zip(captions, weights, strict=True)]
    columns = sorted({text for image in captions for aspect, text in image if aspect in aspects})

    def logit(i: int, text: str) -> Tensor:
        return scale * (images[i] * text_features[text]).sum()

    image_losses = []
    for i in range(len(captions)):
        if not mine[i]:
            continue
        total = torch.zeros((), dtype=torch.float64)
        for text, weight in mine[i].items():
            if own_as_negatives:
                others = [logit(i, c) for c in columns if c != text]
            else:
                others = [logit(i, c) for c in columns if c not in owned[i]]
            total = total + weight * (logaddexp([logit(i, text), *others]) - logit(i, text))
        image_losses.append(total / sum(mine[i].values()))
    image_to_text = torch.stack(image_losses).mean()

    total, total_weight = torch.zeros((), dtype=torch.float64), 0.0
    for i in range(len(captions)):
        for text, weight in mine[i].items():
            others = [logit(j, text) for j in range(len(captions)) if text not in owned[j]]
            total = total + weight * (logaddexp([logit(i, text), *others]) - logit(i, text))
            total_weight += weight
    return (image_to_text + total / total_weight) / 2


def diagnosis_weights(
    captions: list[tuple[str, str]], text_features: dict[str, Tensor], subcaption_aspects: set[str], temperature: float
) -> list[float]:
    """softmax over the sub-captions of cos(diagnosis, sub-caption) / temperature, divided by the largest."""
    diagnoses = [text for aspect, text in captions if aspect == "diagnosis"]
    if not diagnoses:
        return [1.0] * len(captions)
    closeness = {
        k: float((text_features[diagnoses[0]] * text_features[text]).sum())
        for k, (aspect, text) in enumerate(captions)
        if aspect in subcaption_aspects
    }
    if not closeness:
        return [1.0] * len(captions)
    total = sum(math.exp(c / temperature) for c in closeness.values())
    soft = {k: math.exp(c / temperature) / total for k, c in closeness.items()}
    return [soft[k] / max(soft.values()) if k in soft else 1.0 for k in range(len(captions))]


def local_alignment(
    patches: Tensor,
    text_features: dict[str, Tensor],
    captions: list[list[tuple[str, str]]],
    weights: list[list[float]],
    aspects: set[str],
    scale: Tensor,
    sigma: float,
    text_to_region: bool = False,
) -> Tensor:
    """Each sub-caption's region of its own image, contrasted with the term's texts."""
    owned = [{text for _, text in image} for image in captions]
    columns = sorted({text for image in captions for aspect, text in image if aspect in aspects})
    regions: list[dict[str, Tensor]] = []
    for i, image in enumerate(captions):
        regions.append({})
        for text in own_texts(image, weights[i], aspects):
            region = torch.zeros_like(patches[i, 0])
            selected = False
            for p in range(patches.shape[1]):
                cosine = (patches[i, p] * text_features[text]).sum()
                if float(cosine) >= sigma:
                    region, selected = region + cosine * patches[i, p], True
            if selected:
                regions[i][text] = region / region.norm()
    image_losses = []
    for i, image in enumerate(captions):
        mine = {t: w for t, w in own_texts(image, weights[i], aspects).items() if t in regions[i]}
        if not mine:
            continue
        total = torch.zeros((), dtype=torch.float64)
        for text, weight in mine.items():
            positive = scale * (regions[i][text] * text_features[text]).sum()
            others = [scale * (regions[i][text] * text_features[c]).sum() for c in columns if c not in owned[i]]
            total = total + weight * (logaddexp([positive, *others]) - positive)
        image_losses.append(total / sum(mine.values()))
    loss = torch.stack(image_losses).mean()
    if not text_to_region:
        return loss
    total, total_weight = torch.zeros((), dtype=torch.float64), 0.0
    for i, image in enumerate(captions):
        for text, weight in own_texts(image, weights[i], aspects).items():
            if text not in regions[i]:
                continue
            positive = scale * (regions[i][text] * text_features[text]).sum()
            others = [
                scale * (region * text_features[text]).sum()
                for j in range(len(captions))
                if text not in owned[j]
                for region in regions[j].values()
            ]
            total = total + weight * (logaddexp([positive, *others]) - positive)
            total_weight += weight
    return (loss + total / total_weight) / 2
