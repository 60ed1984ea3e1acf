"""Float64 references of the losses, written as loops over the specification's sentences. Slow and plain on purpose.

An image is a list of (aspect, string) captions; texts are features by string. Nothing here is shared with
`pretrain.losses`, `pretrain.objectives` or `pretrain.data`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Captions = Sequence[tuple[str, str]]


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def logaddexp(values: list[Tensor]) -> Tensor:
    """log of the sum of exponentials of scalars; minus infinity for none."""
    if not values:
        return torch.tensor(-math.inf, dtype=torch.float64)
    largest = max(float(value.detach()) for value in values)
    return largest + torch.stack([(value - largest).exp() for value in values]).sum().log()


def own_texts(captions: Captions, weights: list[float], aspects: set[str]) -> dict[str, float]:
    """The image's texts in the term with their weights; a string under several aspects takes the largest."""
    result: dict[str, float] = {}
    for (aspect, text), weight in zip(captions, weights, strict=True):
        if aspect in aspects and weight > 0:
            result[text] = max(result.get(text, 0.0), weight)
    return result


def columns_of(captions: Sequence[Captions], aspects: set[str]) -> list[str]:
    return sorted({text for image in captions for aspect, text in image if aspect in aspects})


def diagnosis_of(captions: Captions) -> str | None:
    return next((text for aspect, text in captions if aspect == "diagnosis"), None)


# ---------------------------------------------------------------------------------------------- softmax


@dataclass
class SoftTargets:
    """`paths`: diagnosis text -> nodes from general to specific; an absent or empty one is unknown."""

    alpha: float
    temperature: float
    paths: Mapping[str, tuple[str, ...]]

    def distance(self, first: str, second: str) -> int:
        """Edges between the nodes of two texts, walking outwards from the first a step at a time."""
        neighbours: dict[str, set[str]] = {}
        for path in self.paths.values():
            for above, below in zip(("<root>", *path), path, strict=False):
                neighbours.setdefault(above, set()).add(below)
                neighbours.setdefault(below, set()).add(above)
        reached, steps = {self.paths[first][-1]}, 0
        while self.paths[second][-1] not in reached:
            reached = reached | {node for at in reached for node in neighbours[at]}
            steps += 1
        return steps

    def is_known(self, text: str | None) -> bool:
        return text is not None and bool(self.paths.get(text))

    def cross_entropy(self, own: str, texts: Mapping[str, Tensor]) -> Tensor:
        """-sum_u q(u) log p(u) over the batch's diagnosis texts with their logits."""
        mass = {u: math.exp(-self.distance(own, u) / self.temperature) for u in texts if self.is_known(u)}
        total = sum(mass.values())
        denominator = logaddexp(list(texts.values()))
        loss = zero()
        for text, m in mass.items():
            loss = loss + m / total * (denominator - texts[text])
        return loss


def contrastive(
    images: Tensor,
    text_features: Mapping[str, Tensor],
    captions: Sequence[Captions],
    weights: list[list[float]],
    aspects: set[str],
    scale: Tensor,
    own_as_negatives: bool = False,
    soft: SoftTargets | None = None,
) -> Tensor:
    """(I2T + T2I) / 2 over distinct texts with ownership, the diagnosis pairs mixed with their soft targets."""
    owned = [{text for _, text in image} for image in captions]
    mine = [own_texts(c, w, aspects) for c, w in zip(captions, weights, strict=True)]
    columns = columns_of(captions, aspects)
    diagnosis_texts = columns_of(captions, {"diagnosis"})

    def logit(i: int, text: str) -> Tensor:
        return scale * (images[i] * text_features[text]).sum()

    def mixed(i: int, text: str, pair: Tensor) -> Tensor:
        own = diagnosis_of(captions[i])
        if soft is None or text != own or not soft.is_known(own):
            return pair
        cross_entropy = soft.cross_entropy(text, {u: logit(i, u) for u in diagnosis_texts})
        return (1 - soft.alpha) * pair + soft.alpha * cross_entropy

    image_losses = []
    for i in range(len(captions)):
        if not mine[i]:
            continue
        total = zero()
        for text, weight in mine[i].items():
            if own_as_negatives:
                others = [logit(i, c) for c in columns if c != text]
            else:
                others = [logit(i, c) for c in columns if c not in owned[i]]
            total = total + weight * mixed(i, text, logaddexp([logit(i, text), *others]) - logit(i, text))
        image_losses.append(total / sum(mine[i].values()))
    if not image_losses:
        return zero()
    image_to_text = torch.stack(image_losses).mean()

    total, total_weight = zero(), 0.0
    for i in range(len(captions)):
        for text, weight in mine[i].items():
            others = [logit(j, text) for j in range(len(captions)) if text not in owned[j]]
            total = total + weight * mixed(i, text, logaddexp([logit(i, text), *others]) - logit(i, text))
            total_weight += weight
    return (image_to_text + total / total_weight) / 2


def diagnosis_weights(
    captions: Captions, text_features: Mapping[str, Tensor], subcaption_aspects: set[str], temperature: float
) -> list[float]:
    """softmax over the sub-captions of cos(diagnosis, sub-caption) / temperature, divided by the largest."""
    diagnosis = diagnosis_of(captions)
    if diagnosis is None:
        return [1.0] * len(captions)
    closeness = {
        k: float((text_features[diagnosis] * text_features[text]).sum())
        for k, (aspect, text) in enumerate(captions)
        if aspect in subcaption_aspects
    }
    if not closeness:
        return [1.0] * len(captions)
    total = sum(math.exp(c / temperature) for c in closeness.values())
    soft = {k: math.exp(c / temperature) / total for k, c in closeness.items()}
    return [soft[k] / max(soft.values()) if k in soft else 1.0 for k in range(len(captions))]


# ---------------------------------------------------------------------------------------------- sigmoid


def siglip(
    images: Tensor,
    text_features: Mapping[str, Tensor],
    captions: Sequence[Captions],
    aspects: set[str],
    scale: Tensor,
    bias: Tensor,
) -> Tensor:
    """Every image with every distinct text of the term: log(1 + exp(-z logit)), divided by the number of images."""
    total = zero()
    for i, image in enumerate(captions):
        for text in columns_of(captions, aspects):
            sign = 1 if text in {t for _, t in image} else -1
            logit = scale * (images[i] * text_features[text]).sum() + bias
            total = total + logaddexp([zero(), -sign * logit])
    return total / len(captions)


# ---------------------------------------------------------------------------------------------- regions


def select_regions(
    patches: Tensor, text_features: Mapping[str, Tensor], own: Sequence[Mapping[str, float]], sigma: float
) -> list[dict[str, Tensor]]:
    """For each image the regions of those of its texts that select a patch."""
    regions: list[dict[str, Tensor]] = []
    for i, texts in enumerate(own):
        regions.append({})
        for text in texts:
            region, selected = torch.zeros_like(patches[i, 0]), False
            for p in range(patches.shape[1]):
                cosine = (patches[i, p] * text_features[text]).sum()
                if float(cosine.detach()) >= sigma:
                    region, selected = region + cosine * patches[i, p], True
            if selected:
                regions[i][text] = region / region.norm()
    return regions


def local_alignment(
    patches: Tensor,
    text_features: Mapping[str, Tensor],
    captions: Sequence[Captions],
    weights: list[list[float]],
    aspects: set[str],
    scale: Tensor,
    sigma: float,
    text_to_region: bool = False,
) -> Tensor:
    """Each sub-caption's region of its own image, contrasted with the term's texts."""
    owned = [{text for _, text in image} for image in captions]
    columns = columns_of(captions, aspects)
    everything = [own_texts(c, w, aspects) for c, w in zip(captions, weights, strict=True)]
    regions = select_regions(patches, text_features, everything, sigma)
    mine = [{t: w for t, w in own.items() if t in regions[i]} for i, own in enumerate(everything)]

    def logit(i: int, text: str, of: str) -> Tensor:
        return scale * (regions[i][of] * text_features[text]).sum()

    image_losses = []
    for i in range(len(captions)):
        if not mine[i]:
            continue
        total = zero()
        for text, weight in mine[i].items():
            others = [logit(i, c, of=text) for c in columns if c not in owned[i]]
            total = total + weight * (logaddexp([logit(i, text, of=text), *others]) - logit(i, text, of=text))
        image_losses.append(total / sum(mine[i].values()))
    if not image_losses:
        return zero()
    loss = torch.stack(image_losses).mean()
    if not text_to_region:
        return loss
    total, total_weight = zero(), 0.0
    for i in range(len(captions)):
        for text, weight in mine[i].items():
            others = [logit(j, text, of) for j in range(len(captions)) if text not in owned[j] for of in regions[j]]
            total = total + weight * (logaddexp([logit(i, text, of=text), *others]) - logit(i, text, of=text))
            total_weight += weight
    return (loss + total / total_weight) / 2


# ---------------------------------------------------------------------------------------------- masked latent


def cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over images and tokens of 1 - cos."""
    losses = []
    for p, t in zip(predicted.flatten(0, 1), target.flatten(0, 1), strict=True):
        losses.append(1 - (p * t).sum() / ((p * p).sum().sqrt() * (t * t).sum().sqrt()))
    return torch.stack(losses).mean()


def normalised_smooth_l1(predicted: Tensor, target: Tensor, beta: float = 1.0, epsilon: float = 1e-5) -> Tensor:
    """Mean over images, tokens and dimensions of the smooth L1 to the target, normalised within its token."""
    losses = []
    for p, t in zip(predicted.flatten(0, 1), target.flatten(0, 1), strict=True):
        normal = (t - t.mean()) / ((t - t.mean()).pow(2).mean() + epsilon).sqrt()
        for error in (p - normal).abs():
            losses.append(0.5 * error**2 / beta if error < beta else error - 0.5 * beta)
    return torch.stack(losses).mean()
