"""Gradients of a global batch that does not fit in one forward: cached features (GradCache, Gao et al. 2021).

Pass 1 encodes every part without a graph and keeps unit features only: texts (R, D), images (B, D), regions
(B, K, D). The loss over the whole global batch, all negatives included, gives their gradients. Pass 2 encodes every
part again, with the same dropout and masks, and sends those gradients through the towers. A region's gradient also
reaches the texts that chose it, which other parts and ranks may have encoded; so images come first, then texts.

Equal to one forward over everything, to rounding. Shapes as in objectives/features.py; b images of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.batch import Batch, PackedTexts
from pretrain.data.plan import step_seed
from pretrain.distributed import comm
from pretrain.models.dual_encoder import Encoded
from pretrain.objectives.base import Term
from pretrain.objectives.features import Regions, gather_features, gather_texts, select_regions, texts_of_slots
from pretrain.train.trainer import Trainer


@dataclass
class _Part:
    """The images of one forward."""

    image_bCHW: Tensor  # uint8
    text_bK: Tensor
    visible_bV: Tensor | None
    masked_bM: Tensor | None


@dataclass
class Cache:
    """Features of this rank's whole share as leaves, whose `grad` the loss fills."""

    text_RD: Tensor
    gathered_UD: Tensor  # no leaf: the gather of text_RD, with its graph
    text_UD: Tensor  # the loss's, and every region's, gradient with respect to the gathered texts
    image_BD: Tensor
    regions: Regions | None
    logit_scale: Tensor
    logit_bias: Tensor | None


def backward_cached(trainer: Trainer, batch: Batch, step: int) -> tuple[Tensor, dict[str, Term], bool]:
    """As `step.backward_whole`, `config.micro_batch_size` images and a like share of the texts at a time."""
    parts = Parts(trainer, batch, step)
    cache = parts.encode() if trainer.contrastive else None
    terms = {} if cache is None else contrastive_terms(trainer, batch, cache)
    # with masked latents the loss is known after the backward only, whose gradients are forgotten then
    if trainer.masked_latent is None and not trainer.learns_from(step, trainer.total(terms), terms):
        return trainer.total(terms).detach(), terms, False
    if cache is not None:
        trainer.total(terms).backward()  # fills the cache's gradients

    masked = parts.backward_images(cache)
    if cache is not None:
        parts.backward_texts(cache)
    if trainer.masked_latent is not None:
        terms[trainer.masked_latent.label] = _sum(masked)
    loss = trainer.total(terms).detach()
    if trainer.masked_latent is not None and not trainer.learns_from(step, loss, terms):
        trainer.engine.forget()
        return loss, terms, False
    return loss, terms, True


def contrastive_terms(trainer: Trainer, batch: Batch, cache: Cache) -> dict[str, Term]:
    """The contrastive terms over the global batch, from features of `Parts.encode`."""
    features = gather_features(batch, cache.image_BD, cache.text_UD, cache.regions, cache.logit_scale, cache.logit_bias)
    return {objective.label: objective(features) for objective in trainer.contrastive}


class Parts:
    """One step's micro-batches, `micro_batch_size` images each; the last can be smaller in validation."""

    def __init__(self, trainer: Trainer, batch: Batch, step: int) -> None:
        self.trainer, self.packed, self.step = trainer, batch.packed, step
        self.images = _split(batch, trainer.config.micro_batch_size or batch.image_BCHW.shape[0])
        self._batch = batch

    @torch.no_grad()
    def encode(self) -> Cache:
        """Pass 1. Texts first: they choose the regions, so that no patch outlives its part."""
        trainer = self.trainer
        texts, images, regions = [], [], []
        for number in range(len(self.packed)):
            texts.append(self._encode_texts(number).text_RD)
        text_RD = _leaf(torch.cat(texts))
        with torch.enable_grad():
            gathered_UD = gather_texts(text_RD, self._batch)
        for number, part in enumerate(self.images):
            encoded = self.encode_images(number, predict=False)
            images.append(encoded.image_BD)
            if trainer.sigma is not None:
                text_bKD = texts_of_slots(gathered_UD, part.text_bK)
                regions.append(select_regions(encoded.patch_BPD, text_bKD, trainer.sigma))
        bias = encoded.logit_bias
        return Cache(
            text_RD=text_RD,
            gathered_UD=gathered_UD,
            text_UD=_leaf(gathered_UD),
            image_BD=_leaf(torch.cat(images)),
            regions=_concatenate(regions) if regions else None,
            logit_scale=_leaf(encoded.logit_scale),
            logit_bias=None if bias is None else _leaf(bias),
        )

    def backward_images(self, cache: Cache | None) -> list[Term]:
        """Pass 2 of the images; returns the parts' shares of the masked-latent term."""
        trainer, masked = self.trainer, []
        for number, part in enumerate(self.images):
            encoded = self.encode_images(number, predict=True, touch_texts=cache is not None and number == 0)
            losses = [] if cache is None else self._inner_products(cache, encoded, number)
            if trainer.masked_latent is not None and trainer.teacher is not None:
                target_bTW = trainer.teacher(part.image_bCHW)
                term = trainer.masked_latent(encoded, target_bTW, part.visible_bV, part.masked_bM)
                masked.append(Term(term.loss / len(self.images), term.statistics))
                losses.append(trainer.masked_latent.weight * masked[-1].loss)
            is_last = cache is None and number == len(self.images) - 1
            trainer.engine.backward(torch.stack(losses).sum(), last=is_last)
        return masked

    def _inner_products(self, cache: Cache, encoded: Encoded, number: int) -> list[Tensor]:
        """What sends the cached gradients through the image tower, and a region's into `cache.text_UD`."""
        part = self.images[number]
        rows = slice(number * len(part.text_bK), (number + 1) * len(part.text_bK))
        losses = [_inner(encoded.image_BD, _gradient(cache.image_BD)[rows])]
        if cache.regions is not None and self.trainer.sigma is not None:
            text_bKD = texts_of_slots(cache.text_UD, part.text_bK)
            regions = select_regions(encoded.patch_BPD, text_bKD, self.trainer.sigma)
            losses.append(_inner(regions.region_BKD, _gradient(cache.regions.region_BKD)[rows]))
        if number == 0:
            losses += [encoded.text_RD.sum(), _inner(encoded.logit_scale, _gradient(cache.logit_scale))]
            if cache.logit_bias is not None:
                losses.append(_inner(encoded.logit_bias, _gradient(cache.logit_bias)))
        return [*losses, _nothing(encoded)]

    def backward_texts(self, cache: Cache) -> None:
        """Pass 2 of the texts: one collective brings every rank's gradients of the texts that this rank encodes."""
        (gradient_RD,) = torch.autograd.grad(cache.gathered_UD, cache.text_RD, _gradient(cache.text_UD))
        sizes = [len(packed.order_R) for packed in self.packed]
        for number, gradient in enumerate(gradient_RD.split(sizes)):
            encoded = self._encode_texts(number)
            loss = _inner(encoded.text_RD, gradient) + _nothing(encoded)
            self.trainer.engine.backward(loss, last=number == len(sizes) - 1)

    def encode_images(self, number: int, predict: bool, touch_texts: bool = False) -> Encoded:
        part = self.images[number]
        # the first backward of a step reaches every parameter: ZeRO-3 overwrites what is left of the last step's
        # gradients there, and adds afterwards
        packed = _no_text_of(self.packed[0]) if touch_texts else None
        image_bCHW = self.trainer.normalise(part.image_bCHW)
        self._seed(number)
        return Encoded(**self.trainer.engine(image_bCHW, packed, part.visible_bV, part.masked_bM, predict))

    def _encode_texts(self, number: int) -> Encoded:
        self._seed(len(self.images) + number)
        return Encoded(**self.trainer.engine(None, self.packed[number]))

    def _seed(self, part: int) -> None:
        """Dropout of a part: the same in both passes."""
        torch.manual_seed(step_seed(self.trainer.config.seed, self.step, comm.rank(), part))


def _split(batch: Batch, size: int) -> list[_Part]:
    num_parts = len(batch.image_BCHW.split(size))

    def chunks(tensor: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * num_parts if tensor is None else tensor.split(size)

    return [
        _Part(image, text, visible, masked)
        for image, text, visible, masked in zip(
            batch.image_BCHW.split(size),
            batch.text_BK.split(size),
            chunks(batch.visible_BV),
            chunks(batch.masked_BM),
            strict=True,
        )
    ]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _gradient(leaf: Tensor) -> Tensor:
    """Zeros where no term reads it: local alignment alone needs no image feature."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _nothing(encoded: Encoded) -> Tensor:
    """Zero, with a gradient: of a tower that is frozen and has no projection nothing else has one."""
    return 0.0 * encoded.logit_scale.sum()


def _inner(features: Tensor, gradient: Tensor) -> Tensor:
    return (features.to(gradient.dtype) * gradient).sum()


def _no_text_of(packed: PackedTexts) -> PackedTexts:
    """One text goes through the tower, and none comes out."""
    return PackedTexts([packed.bucket_tokens[0][:1]], packed.order_R[:0])


def _concatenate(regions: list[Regions]) -> Regions:
    region_BKD = _leaf(torch.cat([part.region_BKD for part in regions]))
    return Regions(region_BKD, torch.cat([part.num_selected_BK for part in regions]), regions[0].num_patches)


def _sum(parts: list[Term]) -> Term:
    statistics = {
        name: (
            torch.stack([part.statistics[name][0] for part in parts]).sum(),
            torch.stack([part.statistics[name][1] for part in parts]).sum(),
        )
        for name in parts[0].statistics
    }
    return Term(torch.stack([part.loss.detach() for part in parts]).sum(), statistics)
