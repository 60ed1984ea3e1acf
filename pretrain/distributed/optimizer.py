"""AdamW, its groups and their learning rates: the same for both engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from pretrain.config import OptimizerConfig

LrScales = Mapping[str, float]  # by parameter name

_NO_DECAY = (
    *("positional_embedding", "class_embedding", "pos_embed", "cls_token"),
    *("position_embeddings.weight", "token_type_embeddings.weight"),
)


def parameter_groups(module: nn.Module, config: OptimizerConfig, lr_scales: LrScales) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay; vectors, scalars and position and class embeddings do not.

    `lr_scale` is the layer-wise factor of the learning rate, 1 for a name that `lr_scales` does not hold.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and not name.endswith(_NO_DECAY)
        scale = lr_scales.get(name, 1.0)
        weight_decay = config.weight_decay if decays else 0.0
        group = groups.setdefault(
            (decays, scale), {"params": [], "weight_decay": weight_decay, "lr_scale": scale, "lr": config.lr * scale}
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(module: nn.Module, config: OptimizerConfig, lr_scales: LrScales) -> torch.optim.AdamW:
    groups = parameter_groups(module, config, lr_scales)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
