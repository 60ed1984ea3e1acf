"""The rival of `benchmarks.step`: multi-aspect and local alignment as released research code lays them out.

As in MAKE's repository (github.com/SiyuanYan1/MAKE, a7af1db): all K slots of every image are encoded at the full
context, an empty slot as the empty string; every slot is a column, and the image's logits are repeated for each of
its K slots, so that one cross-entropy can take one label a row; local alignment multiplies every patch with every
text of the batch and picks an image's own afterwards. What that code gets wrong (docs/objectives.md) is put right by
masks, so that the value is ours; they are made beforehand, and cost the rival no time.

Shapes: B images, K slots, T = B * K texts, image-major; L context length, P patches, D width. One process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.schema import ASPECT_CODE, SUBCAPTION_ASPECTS, Aspect
from pretrain.config import DiagnosisWeights, LocalAlignmentObjective, MultiAspectObjective
from pretrain.data.batch import Batch
from pretrain.data.manifest import ShardedDataset
from pretrain.data.tokenize import TextTokenizer
from pretrain.models.dual_encoder import DualEncoder
from pretrain.train.schedule import learning_rate
from pretrain.train.trainer import Trainer


@dataclass
class PaddedBatch:
    image_BCHW: Tensor  # uint8
    token_TL: Tensor  # int64
    aspect_BK: Tensor  # int64 codes; NO_ASPECT_CODE in an empty slot
    same_BKK: Tensor  # bool: two slots of an image hold the same string
    shared_TB: Tensor  # bool: another image than the slot's own owns its string, so it is no negative
    blocked_TT: dict[str, Tensor]  # by term; bool: the column is no negative of the row's image, nor the row's own


def pad_batch(batch: Batch, token_TL: Tensor, aspects_by_term: Mapping[str, Sequence[Aspect]]) -> PaddedBatch:
    """The padded form of a batch of one process."""
    B, K = batch.text_BK.shape
    text_T, aspect_T = batch.text_BK.reshape(-1), batch.aspect_BK.reshape(-1)
    is_valid_T = text_T < batch.num_texts
    owned_BT = (batch.text_BK.unsqueeze(2) == text_T).any(1) & is_valid_T
    image_T = torch.arange(B).repeat_interleave(K)
    shared_TB = owned_BT.T.clone()
    shared_TB[torch.arange(B * K), image_T] = False
    blocked_TT = {}
    for term, aspects in aspects_by_term.items():
        # a string that several slots hold counts once among the negatives: in the first slot that is of the term
        is_used_T = is_valid_T & torch.isin(aspect_T, torch.tensor([ASPECT_CODE[aspect] for aspect in aspects]))
        first = np.unique(text_T[is_used_T].numpy(), return_index=True)[1]
        is_column_T = torch.zeros(B * K, dtype=torch.bool)
        is_column_T[is_used_T.nonzero().squeeze(1)[torch.from_numpy(first)]] = True
        blocked = (owned_BT | ~is_column_T).repeat_interleave(K, dim=0)
        blocked_TT[term] = blocked.fill_diagonal_(False)
    return PaddedBatch(
        image_BCHW=batch.image_BCHW,
        token_TL=token_TL,
        aspect_BK=batch.aspect_BK,
        same_BKK=(batch.text_BK.unsqueeze(2) == batch.text_BK.unsqueeze(1)) & is_valid_T.view(B, K, 1),
        shared_TB=shared_TB,
        blocked_TT=blocked_TT,
    )


def padded_tokens(batch: Batch, data: ShardedDataset, tokenizer: TextTokenizer) -> Tensor:
    """(T, L) token ids of every slot at the full context."""
    num_slots = batch.text_BK.shape[1]
    texts: list[str] = []
    for sample in batch.sample_B.tolist():
        captions = [caption.text for caption in data.read_sample(sample).captions]
        texts += captions + [""] * (num_slots - len(captions))
    token_TL = torch.full((len(texts), tokenizer.context_length), tokenizer.pad_id, dtype=torch.int64)
    for row, ids in enumerate(tokenizer.encode(texts)):
        token_TL[row, : len(ids)] = torch.from_numpy(ids)
    return token_TL


# ---------------------------------------------------------------------------------------------- losses


@torch.no_grad()
def _slot_weights(
    padded: PaddedBatch, text_BKD: Tensor, aspects: Sequence[Aspect], guided: DiagnosisWeights | None
) -> Tensor:
    """(B, K): softmax over the sub-captions of their cosine with the diagnosis, by its largest; a string once."""

    def has_aspect(wanted: Sequence[Aspect]) -> Tensor:
        return torch.isin(padded.aspect_BK, torch.tensor([ASPECT_CODE[aspect] for aspect in wanted]))

    used_BK = has_aspect(aspects)
    weight_BK = used_BK.to(text_BKD.dtype)
    if guided is not None:
        is_diagnosis_BK = has_aspect([Aspect.DIAGNOSIS])
        is_guided_BK = used_BK & has_aspect(SUBCAPTION_ASPECTS)
        diagnosis_BD = (text_BKD * is_diagnosis_BK.unsqueeze(2)).sum(1)
        cosine_BK = (text_BKD * diagnosis_BD.unsqueeze(1)).sum(2) / guided.temperature
        lowest = torch.finfo(cosine_BK.dtype).min
        softmax_BK = cosine_BK.masked_fill(~is_guided_BK, lowest).softmax(1)
        relative_BK = softmax_BK / softmax_BK.amax(1, keepdim=True)
        is_guided_BK &= is_diagnosis_BK.any(1, keepdim=True)
        weight_BK = torch.where(is_guided_BK, relative_BK, weight_BK)
    largest_BK = (padded.same_BKK * weight_BK.unsqueeze(1)).amax(2)
    is_repeat_BK = padded.same_BKK.tril(-1).any(2)
    return largest_BK.masked_fill(is_repeat_BK, 0.0)


def _cross_entropy(logits: Tensor, blocked: Tensor, label_T: Tensor) -> Tensor:
    return F.cross_entropy(logits.masked_fill(blocked, torch.finfo(logits.dtype).min), label_T, reduction="none")


def _mean_over_images(loss_T: Tensor, weight_BK: Tensor) -> Tensor:
    """Of each image's weighted mean, over the images with weight."""
    total_B = weight_BK.sum(1)
    mean_B = (loss_T.view_as(weight_BK) * weight_BK).sum(1) / total_B.clamp_min(torch.finfo(total_B.dtype).tiny)
    return mean_B.sum() / (total_B > 0).sum().clamp_min(1)


def multi_aspect_loss(
    config: MultiAspectObjective, padded: PaddedBatch, image_BD: Tensor, text_TD: Tensor, scale: Tensor
) -> Tensor:
    B, K = padded.aspect_BK.shape
    weight_BK = _slot_weights(padded, text_TD.view(B, K, -1), config.aspects, config.diagnosis_weights)
    logits_BT = scale * image_BD @ text_TD.T
    expanded_TT = logits_BT.unsqueeze(1).expand(B, K, B * K).reshape(B * K, B * K)
    loss_T = _cross_entropy(expanded_TT, padded.blocked_TT[config.label], torch.arange(B * K))
    image_to_text = _mean_over_images(loss_T, weight_BK)
    loss_T = _cross_entropy(logits_BT.T, padded.shared_TB, torch.arange(B).repeat_interleave(K))
    text_to_image = (loss_T * weight_BK.view(-1)).sum() / weight_BK.sum()
    return (image_to_text + text_to_image) / 2


def local_alignment_loss(
    config: LocalAlignmentObjective, padded: PaddedBatch, patch_BPD: Tensor, text_TD: Tensor, scale: Tensor
) -> Tensor:
    B, K = padded.aspect_BK.shape
    weight_BK = _slot_weights(padded, text_TD.view(B, K, -1), config.aspects, config.diagnosis_weights)
    cosine_BPT = patch_BPD @ text_TD.T
    attention_BPT = (cosine_BPT >= config.sigma) * cosine_BPT
    image_B = torch.arange(B)
    attention_BPK = attention_BPT.view(B, -1, B, K)[image_B, :, image_B]
    region_BKD = F.normalize(torch.einsum("bpk,bpd->bkd", attention_BPK, patch_BPD), dim=-1)
    logits_TT = scale * region_BKD.reshape(B * K, -1) @ text_TD.T
    loss_T = _cross_entropy(logits_TT, padded.blocked_TT[config.label], torch.arange(B * K))
    return _mean_over_images(loss_T, weight_BK * (attention_BPK != 0).any(1))


def padded_losses(
    configs: Sequence[MultiAspectObjective | LocalAlignmentObjective],
    padded: PaddedBatch,
    image_BD: Tensor,
    patch_BPD: Tensor | None,
    text_TD: Tensor,
    scale: Tensor,
) -> Tensor:
    """The weighted sum of the terms, scalar."""
    total = text_TD.new_zeros(())
    for config in configs:
        if isinstance(config, MultiAspectObjective):
            loss = multi_aspect_loss(config, padded, image_BD, text_TD, scale)
        else:
            assert patch_BPD is not None
            loss = local_alignment_loss(config, padded, patch_BPD, text_TD, scale)
        total = total + config.weight * loss
    return total


# ---------------------------------------------------------------------------------------------- the step


def encode_slots(model: DualEncoder, padded: PaddedBatch) -> Tensor:
    """(T, D) unit features of every slot."""
    return F.normalize(model.text(padded.token_TL), dim=-1)


def padded_forward(trainer: Trainer, padded: PaddedBatch) -> Tensor:
    """The loss of the padded form with the trainer's towers."""
    model = trainer.model
    image_BD, patch_BPD = model.encode_image(trainer.normalise(padded.image_BCHW))
    text_TD = encode_slots(model, padded)
    objectives = [o for o in trainer.config.objectives if isinstance(o, MultiAspectObjective | LocalAlignmentObjective)]
    return padded_losses(objectives, padded, image_BD, patch_BPD, text_TD, model.logit_scale.exp())


def padded_step(trainer: Trainer, padded: PaddedBatch, step: int) -> Tensor:
    """One update with the trainer's towers and engine; returns the loss."""
    loss = padded_forward(trainer, padded)
    trainer.engine.backward(loss)
    trainer.engine.step(learning_rate(trainer.config.optimizer, step, trainer.config.steps))
    if trainer.max_log_scale is not None:
        trainer.engine.clamp_(trainer.model.logit_scale, trainer.max_log_scale)
    return loss.detach()
