"""The evaluators, while training goes on: what `validation` in a run's config asks for.

All ranks share the work and run the same number of forwards through the engine, whatever their data, since ZeRO-3
gathers weights in each. Towers are in eval mode, nothing has a gradient, and the training goes on as if nothing had
been: tests/integration/test_validation.py compares bits.

Shapes: N images of the validation (k batches of B on each of W ranks), T texts, D joint width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import TrainConfig, ValidationConfig
from pretrain.data.batch import Batch
from pretrain.data.manifest import ShardedDataset, diagnoses
from pretrain.data.reader import BatchDataset, ReaderSpec, read_batches
from pretrain.data.texts import pack
from pretrain.data.tokenize import TextTokenizer
from pretrain.data.transforms import ImageTransform, decode
from pretrain.distributed import comm
from pretrain.evaluation.config import RetrievalTask
from pretrain.evaluation.methods import zero_shot
from pretrain.evaluation.methods.retrieval import retrieval_metrics, usable_ks
from pretrain.evaluation.metrics.statistics import Floats, balanced_accuracy
from pretrain.models.build import build_tokenizer, eval_transform, image_px
from pretrain.models.dual_encoder import Encoded
from pretrain.objectives.base import Term
from pretrain.prompts import TEMPLATES_PATH, load_templates
from pretrain.train.cached import Parts, contrastive_terms
from pretrain.train.metrics import reduce_terms
from pretrain.train.state import build_reader
from pretrain.train.trainer import Trainer, Validator

_TEXTS_PER_FORWARD = 64  # on each rank


def make_validator(trainer: Trainer, config: TrainConfig) -> Validator | None:
    """What computes the run's validation; None where it has none. Raises InputError for a split that cannot be used.

    Its values are `val/loss`, `val/loss/<objective>`, `val/retrieval/mean_recall` and, where the split has diagnoses,
    `val/zero_shot/balanced_accuracy`. The loss is that of the contrastive terms over fixed global batches of whole
    images; in a run of masked latents alone, whose texts learn nothing, theirs with fixed masks, and nothing else.
    """
    return None if config.validation is None else _Validation(trainer, config, config.validation)


class _Validation:
    def __init__(self, trainer: Trainer, config: TrainConfig, validation: ValidationConfig) -> None:
        self._trainer, self._config = trainer, config
        self._tokenizer = build_tokenizer(config.model, trainer.model.text)
        self._batches = _fixed_batches(trainer, config, validation, self._tokenizer)
        data = self._batches.data
        samples = [data.read_sample(int(position)) for position in self._batches.order(0)]
        self._captions = sorted({sample.caption for sample in samples})
        position = {caption: i for i, caption in enumerate(self._captions)}
        self._owner_text_N = np.array([position[sample.caption] for sample in samples])
        self._classnames = diagnoses(data)
        self._templates = load_templates(TEMPLATES_PATH, validation.templates)
        class_of = {name: i for i, name in enumerate(self._classnames)}
        self._label_N = np.array([class_of.get(str(sample.diagnosis), -1) for sample in samples])
        self._check_best_by(config.checkpoint.best_by, validation)

    def _check_best_by(self, best_by: str, validation: ValidationConfig) -> None:
        """Now, and not hours later at the first validation."""
        if best_by != "loss" and not self._trainer.contrastive:
            raise InputError(f"checkpoint.best_by: {best_by}: without a contrastive term there is the loss alone")
        if best_by == "retrieval" and min(len(self._owner_text_N), len(self._captions)) < 2:
            raise InputError(
                f"checkpoint.best_by: retrieval: {validation.val_dir} has fewer than two distinct captions among the "
                "samples that are used; take loss, or another split"
            )
        if best_by == "zero_shot" and not (self._label_N >= 0).any():
            raise InputError(
                f"checkpoint.best_by: zero_shot: no sample of {validation.val_dir} that is used has a diagnosis; take "
                "loss or retrieval, or another split"
            )

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        model, device = self._trainer.model, next(self._trainer.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.eval()
            try:
                return self._values(device)
            finally:
                model.train()

    def _values(self, device: torch.device) -> dict[str, float]:
        losses: dict[str, list[float]] = {}
        images = []
        for batch in self._read(device):
            terms, features = self._encode(batch)
            images += [] if features is None else [features]
            for name, value in reduce_terms(self._trainer.total(terms), terms).items():
                if name.startswith("loss"):
                    losses.setdefault(f"val/{name}", []).append(value)
        values = {name: float(np.mean(series)) for name, series in losses.items()}
        if not images:
            return values
        image_ND = torch.cat(images).numpy()
        return values | self._retrieval(image_ND, device) | self._zero_shot(image_ND, device)

    def _read(self, device: torch.device) -> Iterator[Batch]:
        data, num_batches = self._config.data, self._batches.steps_per_epoch
        pin = device.type == "cuda"
        for batch in read_batches(self._batches, 0, num_batches, data.num_workers, data.prefetch_batches, pin=pin):
            if batch.damaged:
                (position, reason), *_ = batch.damaged
                raise InputError(
                    f"{self._batches.data.directory}: sample {position} cannot be read ({reason}); run `dermvlp verify`"
                )
            yield batch.to(device)

    def _encode(self, batch: Batch) -> tuple[dict[str, Term], Tensor | None]:
        """The terms of one global batch, and the features of its images, of all ranks."""
        trainer = self._trainer
        if trainer.contrastive:
            # the whole image, also where training shares the masked student's view: so it will be used
            cache = Parts(trainer, dataclasses.replace(batch, visible_BV=None, masked_BM=None), 0).encode()
            image_BD = F.normalize(cache.image_BD.float(), dim=-1)  # again: bf16 rounds it to a thousandth
            return contrastive_terms(trainer, batch, cache), comm.gather(image_BD).cpu()
        assert trainer.masked_latent is not None and trainer.teacher is not None
        parts, losses = Parts(trainer, batch, 0), []
        for number, part in enumerate(parts.images):
            encoded, target_bTW = parts.encode_images(number, predict=True), trainer.teacher(part.image_bCHW)
            term = trainer.masked_latent(encoded, target_bTW, part.visible_bV, part.masked_bM)
            losses.append(term.loss * (len(part.image_bCHW) / len(batch.image_BCHW)))
        return {trainer.masked_latent.label: Term(torch.stack(losses).sum())}, None

    def _retrieval(self, image_ND: Floats, device: torch.device) -> dict[str, float]:
        text_UD = self._encode_texts(self._captions, device)
        ks = usable_ks(RetrievalTask().ks, len(image_ND), len(text_UD))
        if not ks:
            return {}
        metrics = retrieval_metrics(
            image_ND, text_UD, self._owner_text_N, ks=ks, num_resamples=1
        )  # intervals cost time
        return {"val/retrieval/mean_recall": metrics["mean_recall"].value}

    def _zero_shot(self, image_ND: Floats, device: torch.device) -> dict[str, float]:
        """Of the images with a diagnosis; nothing where none has one."""
        is_labelled_N = self._label_N >= 0
        if not is_labelled_N.any():
            return {}
        encode_texts = partial(self._encode_texts, device=device)
        classifier_CD = zero_shot.build_classifier(encode_texts, self._classnames, self._templates)
        predicted = zero_shot.probabilities(image_ND[is_labelled_N], classifier_CD, logit_scale=1.0).argmax(1)
        return {"val/zero_shot/balanced_accuracy": balanced_accuracy(self._label_N[is_labelled_N], predicted)}

    def _encode_texts(self, texts: Sequence[str], device: torch.device) -> NDArray[np.float32]:
        """(T, D) unit vectors. In each round every rank encodes its part of the texts, in the last one perhaps none."""
        tokens, trim = self._tokenizer.encode(texts), self._tokenizer.can_trim
        by_length = np.argsort([len(ids) for ids in tokens], kind="stable")  # so that little is padded
        edges, size = (self._tokenizer.context_length,), _TEXTS_PER_FORWARD
        rounds = []
        for start in range(0, len(texts), comm.world_size() * size):
            mine = by_length[start + comm.rank() * size : start + (comm.rank() + 1) * size]
            packed = pack([tokens[i] for i in mine], edges, self._tokenizer.pad_id, trim).to(device)
            text_RD = F.normalize(Encoded(**self._trainer.engine(None, packed)).text_RD.float(), dim=-1)
            rounds.append(comm.gather(F.pad(text_RD, (0, 0, 0, size - len(mine)))).cpu())
        features = torch.cat(rounds)[: len(texts)]  # the padding is the end
        text_TD = torch.empty_like(features)
        text_TD[torch.from_numpy(by_length)] = features
        return text_TD.numpy()


class _FixedBatches(BatchDataset):
    """The same global batches of given samples, whenever they are read."""

    def __init__(
        self, reader: BatchDataset, spec: ReaderSpec, transform: ImageTransform, sample_N: NDArray[np.int64]
    ) -> None:
        super().__init__(reader.data, spec, transform, reader.tokenizer, reader.rank, reader.world_size)
        self._sample_N = sample_N

    @property
    def steps_per_epoch(self) -> int:
        return len(self._sample_N) // self.spec.global_batch_size

    def samples(self, step: int) -> NDArray[np.int64]:
        size = self.spec.global_batch_size
        return self._sample_N[step * size : (step + 1) * size]

    def order(self, epoch: int) -> NDArray[np.int64]:
        return self._sample_N

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        return self._sample_N


def _fixed_batches(
    trainer: Trainer, config: TrainConfig, validation: ValidationConfig, tokenizer: TextTokenizer
) -> _FixedBatches:
    """Samples evenly spaced over the split, in as few batches as hold them, each spread over the whole split.

    No batch is larger than the run's; a few samples are left out where the batches would not be equal.
    """
    num_samples, world_size = len(ShardedDataset(validation.val_dir)), comm.world_size()
    wanted = min(num_samples, validation.max_num_samples or num_samples)
    num_batches = math.ceil(wanted / config.global_batch_size)
    images_per_rank = wanted // (num_batches * world_size)
    if images_per_rank == 0:
        raise InputError(
            f"validation: {wanted} samples of {validation.val_dir} are fewer than the {world_size} ranks; raise "
            "max_num_samples, or take another split"
        )
    size = images_per_rank * world_size
    data = config.data.model_copy(update={"train_dir": validation.val_dir, "stream": None, "stage_dir": None})
    changes = {"data": data, "global_batch_size": size, "micro_batch_size": None}
    reader = build_reader(config.model_copy(update=changes), trainer.model, tokenizer)
    num_parts = math.ceil(images_per_rank / (config.micro_batch_size or images_per_rank))
    spec = dataclasses.replace(reader.spec, num_parts=num_parts)
    spaced = np.arange(num_batches * size, dtype=np.int64) * num_samples // (num_batches * size)
    in_turn = np.concatenate([spaced[first::num_batches] for first in range(num_batches)])
    return _FixedBatches(reader, spec, _InferenceTransform(trainer.model.visual), in_turn)


class _InferenceTransform:
    """open_clip's preprocessing as uint8, as the reader delivers it: what it normalises is normalised on the device."""

    def __init__(self, visual: Any) -> None:
        self._transform, self.image_px = eval_transform(visual), image_px(visual)
        self._mean, self._std = (torch.tensor(visual.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))

    def __call__(self, jpeg: bytes, seed: int) -> Tensor:
        image = self._transform(decode(jpeg))
        return (255 * (image * self._std + self._mean)).round().to(torch.uint8)  # exact: it was uint8 before
