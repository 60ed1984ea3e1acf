"""The towers of a run on the meta device: structure and number of parameters, no memory and no download."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import try_to_load_from_cache

from data_prep.errors import InputError
from pretrain.config import EmaTeacher, FrozenTeacher, MaskedLatentObjective, ModelConfig, TowerConfig, TrainConfig
from pretrain.data.masks import check_mask
from pretrain.models.build import image_px
from pretrain.models.dual_encoder import DualEncoder
from pretrain.models.masked import Teacher
from pretrain.models.open_clip_config import PACKAGE_PREFIX, resolved_spec
from pretrain.models.tiny import BERT
from pretrain.objectives.build import find_masked_latent
from pretrain.train.state import add_masked_latent, build_dual_encoder, num_parts

_BERT_BASE: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
#: config.json of the Hub's text towers that our recipes name, so that a plan of them needs no download
PUBLISHED_TEXT_TOWERS: dict[str, dict[str, Any]] = {"neuml/pubmedbert-base-embeddings": _BERT_BASE}


@dataclass(frozen=True)
class Count:
    """Parameters of one part of a run."""

    trained: int = 0
    frozen: int = 0

    @property
    def total(self) -> int:
        return self.trained + self.frozen

    @classmethod
    def of(cls, *parts: nn.Module | nn.Parameter | None) -> Count:
        found = [part for part in parts if part is not None]
        modules = [part for part in found if isinstance(part, nn.Module)]
        parameters = [part for part in found if isinstance(part, nn.Parameter)]
        parameters += [parameter for module in modules for parameter in module.parameters()]
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        return cls(trained, sum(p.numel() for p in parameters) - trained)


@dataclass
class Towers:
    model: DualEncoder  # on the meta device
    teacher: Teacher | None
    is_ema: bool
    knows_text: bool  # False: the text tower's structure would have to be downloaded, a small one stands in

    def counts(self) -> dict[str, Count]:
        """By part: image, text, patch projection, temperature, predictor, teacher."""
        model = self.model
        counts = {
            "image": Count.of(model.visual),
            "text": Count.of(model.text),
            "patch projection": Count.of(model.patch_projection),
            "temperature": Count.of(model.logit_scale, model.logit_bias),
            "predictor": Count.of(model.predictor),
            "teacher": Count.of(self.teacher),
        }
        return {part: count for part, count in counts.items() if count.total}

    @property
    def image_px(self) -> int:
        return image_px(self.model.visual)

    @property
    def embed_dim(self) -> int:
        return int(self.model.spec.model_cfg["embed_dim"])


def is_at_hand(name: str, file: str = "config.json") -> bool:
    """Whether a model that transformers reads is on this machine: a folder, a package, or in the Hub's cache."""
    if name.startswith(PACKAGE_PREFIX) or Path(name).is_dir():
        return True
    try:
        return isinstance(try_to_load_from_cache(name, file), str)
    except ValueError:  # not a name of the Hub
        return False


def build_towers(config: TrainConfig, num_ranks: int, folder: Path, refuse: Callable[[str], None]) -> Towers | None:
    """Towers, predictor and teacher as `state.build_trainer` makes them, of no memory and with no weights.

    Args:
        folder: an empty one, for the model config that is built in the place of one which names the Hub.
        refuse: called with the message of every part that cannot work.

    Returns None where the towers themselves cannot be built.
    """
    try:
        small, knows_text = _without_downloads(config.model, folder)
        config = config.model_copy(update={"model": small, "objectives": _without_teachers_weights(config)})
        with torch.device("meta"):
            model = build_dual_encoder(config, load_pretrained=False)
    except InputError as error:
        refuse(str(error))
        return None
    masked, teacher = find_masked_latent(config.objectives), None
    try:
        with torch.device("meta"):
            teacher = add_masked_latent(model, config)
    except InputError as error:
        refuse(str(error))
    checks: list[Callable[[], None]] = [lambda: _check_batch_norm(model, config, num_ranks)]
    if masked is not None:
        checks.append(lambda: check_mask(masked.mask, tuple(model.visual.grid_size)))
    for check in checks:
        try:
            check()
        except InputError as error:
            refuse(str(error))
    return Towers(model, teacher, masked is not None and isinstance(masked.teacher, EmaTeacher), knows_text)


def _check_batch_norm(model: DualEncoder, config: TrainConfig, num_ranks: int) -> None:
    try:
        parts = num_parts(config, num_ranks)
    except InputError:  # refused elsewhere
        parts = 1
    model.check_batch_norm(num_ranks, parts, config)


def _without_downloads(config: ModelConfig, folder: Path) -> tuple[ModelConfig, bool]:
    """The config of the same towers without weights, with what names the Hub written to `folder`.

    Returns it, and whether the text tower is the real one.
    """
    bare: dict[str, Any] = {"pretrained": None}
    for tower in ("image", "text"):
        bare[tower] = getattr(config, tower).model_copy(update={"weights": None})
    spec = resolved_spec(config)
    name = str(spec.model_cfg["text_cfg"].get("hf_model_name") or "")
    if not name or is_at_hand(name):
        return config.model_copy(update=bare), True
    published = PUBLISHED_TEXT_TOWERS.get(name)
    stand_in = BERT
    if published is not None:
        (folder / "config.json").write_text(json.dumps(published), encoding="utf-8")
        stand_in = str(folder)
    text_cfg = {**spec.model_cfg["text_cfg"], "hf_model_name": stand_in}
    document = {"model_cfg": {**spec.model_cfg, "text_cfg": text_cfg}, "preprocess_cfg": spec.preprocess_cfg}
    path = folder / "model.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return config.model_copy(update={**bare, "name": str(path)}), published is not None


def _without_teachers_weights(config: TrainConfig) -> tuple[Any, ...]:
    def bare(objective: Any) -> Any:
        if isinstance(objective, MaskedLatentObjective) and isinstance(objective.teacher, FrozenTeacher):
            teacher = objective.teacher.model_copy(update={"pretrained": None, "weights": None})
            return objective.model_copy(update={"teacher": teacher})
        return objective

    return tuple(bare(objective) for objective in config.objectives)


def tower_weights(config: TrainConfig) -> list[tuple[str, str, str]]:
    """(key, source, model name) of every file of weights that the run starts from."""
    if config.model.tiny:
        found: list[tuple[str, str | None, str]] = []
    else:
        found = [("model.pretrained", config.model.pretrained, config.model.name)]
        found += [(f"model.{tower}.weights", _source(getattr(config.model, tower)), "") for tower in ("image", "text")]
    masked = find_masked_latent(config.objectives)
    if masked is not None and isinstance(masked.teacher, FrozenTeacher) and not masked.teacher.tiny:
        teacher, key = masked.teacher, "masked_latent.teacher"
        found.append((f"{key}.pretrained", teacher.pretrained, teacher.name))
        found.append((f"{key}.weights", None if teacher.weights is None else teacher.weights.source, ""))
    return [(key, source, name) for key, source, name in found if source is not None]


def _source(tower: TowerConfig) -> str | None:
    return None if tower.weights is None else tower.weights.source
