"""The encoder that evaluation uses, and features of a data set.

Shapes: N images, T texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from data_prep.errors import InputError
from data_prep.progress import Progress
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.data.texts import pack
from pretrain.data.tokenize import TextTokenizer
from pretrain.data.transforms import decode
from pretrain.models.build import build_tokenizer, eval_transform
from pretrain.models.dual_encoder import DualEncoder
from pretrain.train.checkpoint import checkpoint_config, list_checkpoints
from pretrain.train.state import build_dual_encoder

_BATCH_SIZE = 64


@dataclass
class Encoder:
    """A dual encoder in eval mode with what stands before its towers."""

    model: DualEncoder
    tokenizer: TextTokenizer
    transform: Callable[[Image.Image], torch.Tensor]  # open_clip's inference preprocessing
    device: torch.device

    @property
    def logit_scale(self) -> float:
        """exp of the parameter."""
        return float(self.model.logit_scale.detach().exp())

    @torch.no_grad()
    def encode_images(self, data: ShardedDataset) -> NDArray[np.float32]:
        """(N, D) unit vectors of all samples of a split, in the order of its index."""
        features = []
        with Progress("encoding images", unit="images", total=len(data)) as progress:
            for start in range(0, len(data), _BATCH_SIZE):
                positions = range(start, min(start + _BATCH_SIZE, len(data)))
                images = torch.stack([self.transform(decode(data.read_image(position))) for position in positions])
                image_BD, _ = self.model.encode_image(images.to(self.device))
                features.append(image_BD.float().cpu())
                progress.advance(len(positions))
        return torch.cat(features).numpy()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(T, D) unit vectors."""
        if not texts:
            raise InputError("no text to encode")
        tokens = self.tokenizer.encode(texts)
        by_length = np.argsort([len(ids) for ids in tokens], kind="stable")
        features: torch.Tensor | None = None
        for start in range(0, len(texts), _BATCH_SIZE):  # neighbours in length share a batch, so little is padded
            chosen = by_length[start : start + _BATCH_SIZE]
            edges = (self.tokenizer.context_length,)
            packed = pack([tokens[i] for i in chosen], edges, self.tokenizer.pad_id, self.tokenizer.can_trim)
            text_TD = self.model.encode_texts(packed.to(self.device)).float().cpu()
            features = text_TD.new_empty(len(texts), text_TD.shape[1]) if features is None else features
            features[torch.from_numpy(chosen)] = text_TD
        assert features is not None
        return features.numpy()


def untrained_encoder(config: TrainConfig) -> Encoder:
    """The model that a run starts from."""
    return _encoder(config, build_dual_encoder(config))


def load_encoder(run_or_checkpoint: Path) -> Encoder:
    """The newest checkpoint of a run, or the checkpoint named."""
    checkpoint = find_checkpoint(run_or_checkpoint)
    config = checkpoint_config(checkpoint)
    model = build_dual_encoder(config, load_pretrained=False)
    state = load_file(checkpoint / "model.safetensors")
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("predictor.")})
    return _encoder(config, model)


def find_checkpoint(run_or_checkpoint: Path) -> Path:
    if (run_or_checkpoint / "meta.json").is_file():
        return run_or_checkpoint
    checkpoints = list_checkpoints(run_or_checkpoint)
    if not checkpoints:
        raise InputError(f"{run_or_checkpoint}: no checkpoint here; train with `dermvlp train CONFIG` first")
    return checkpoints[-1]


def _encoder(config: TrainConfig, model: DualEncoder) -> Encoder:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    return Encoder(
        model=model,
        tokenizer=build_tokenizer(config.model, model.text),
        transform=eval_transform(model.visual),
        device=device,
    )
