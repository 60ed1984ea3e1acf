"""What an objective does not read does not learn: no parameter is moved by weight decay alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import TrainConfig
from pretrain.train.state import build_trainer
from pretrain.train.step import training_step
from tests.conftest import TINY_MODEL

MASKED = {
    "kind": "masked_latent",
    "mask": {"kind": "random"},
    "predictor_depth": 1,
    "predictor_width": 16,
    "predictor_heads": 2,
}
ATTENTION = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "class token": {},
    "attention": ATTENTION,
    "timm, map": {
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "",
        "image_size": 224,
    },
    "timm, no projection": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "timm_proj": ""},
}
TERMS: dict[str, list[dict[str, Any]]] = {
    "masked latent": [MASKED],
    "local alignment": [{"kind": "local_alignment", "sigma": -1.0}],
    "both": [{"kind": "local_alignment", "sigma": -1.0}, MASKED | {"share_view": True}],
}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("tower", TOWERS)
def test_every_parameter_that_learns_has_a_gradient(
    run_config: dict[str, Any], tmp_path: Path, tower: str, terms: str
) -> None:
    changes = TOWERS[tower]
    is_timm = "timm_model_name" in changes
    vision = {"image_size": 224} | changes if is_timm else TINY_MODEL["vision_cfg"] | changes
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"model_cfg": TINY_MODEL | {"vision_cfg": vision}}), encoding="utf-8")
    run_config |= {"objectives": TERMS[terms], "model": {"name": str(path), "tiny": is_timm}, "global_batch_size": 4}
    run_config["optimizer"] = {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.5}
    trainer, reader = build_trainer(TrainConfig.model_validate(run_config), torch.device("cpu"))
    found: dict[str, bool] = {}

    def note(name: str, parameter: torch.Tensor) -> None:
        found[name] = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)

    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            found[name] = False
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: note(name, p))
    training_step(trainer, reader[0], 0)
    assert found and [name for name, has_gradient in found.items() if not has_gradient] == []
