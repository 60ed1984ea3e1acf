"""What a rank holds in memory, by formula; of activations, what autograd itself says it would keep.

M trained parameters, F frozen ones, W ranks, e bytes of a weight (2 in bf16 and fp16, 4 in fp32):

    part                            ZeRO 0        1 and 2         3
    weights                         e (M + F)     e (M + F)       e (M + F) / W
    gradients                       e M           e M, 2: e M / W e M / W
    fp32 masters (fp32 at 0, 3: 0)  4 M           4 M / W         4 M / W
    Adam's two moments              8 M           8 M / W         8 M / W
    gradients in fp32, in the step  4 M (fp32: 0) 4 M / W         4 M / W (fp32: 0)
    reduction bucket                0             e x zero_optimization.reduce_bucket_size
    gathered weights                0             0               at most e x min(M + F, stage3_max_live_parameters)

The torch engine is as ZeRO 0 in fp32, with two flat copies of the gradients in a step of several ranks. DeepSpeed pads
each group of parameters to a multiple of W: a few hundred elements, left out. A teacher is held whole and in fp32 by
every rank. With offload_optimizer the masters, moments and fp32 gradients lie in the host's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.config import (
    ClipObjective,
    EngineConfig,
    LocalAlignmentObjective,
    MultiAspectObjective,
    ObjectiveConfig,
    SiglipObjective,
    TrainConfig,
)
from pretrain.data.batch import PackedTexts
from pretrain.data.masks import num_masked
from pretrain.deepspeed_options import REDUCE_BUCKET_SIZE
from pretrain.models.dual_encoder import DualEncoder
from pretrain.objectives.build import build_objectives, find_masked_latent
from pretrain.train.preflight.captions import TermSize
from pretrain.train.preflight.towers import Count

STAGES = (0, 1, 2, 3)  # of ZeRO; the torch engine has 0 alone
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: DeepSpeed's default, in elements
_MAX_LIVE_PARAMETERS = 1_000_000_000

#: the part's name -> bytes of one rank
Parts = dict[str, int]

_OFFLOADED = ("masters", "moments", "fp32 gradients")


def state_bytes(module: Count, num_teacher: int, engine: EngineConfig, num_ranks: int, stage: int) -> Parts:
    """Weights and what the optimizer keeps, by part; a part that the engine offloads is not among them.

    Args:
        module: of everything in the engine's module.
        num_teacher: parameters of the teacher.
    """
    is_fp32 = engine.precision == "fp32" or engine.kind == "torch"  # whose bf16 is autocast's
    e = 4 if is_fp32 else BYTES[engine.precision]
    zero = engine.deepspeed.get("zero_optimization", {})

    def part_of(number: int, from_stage: int) -> int:
        return -(-number // num_ranks) if stage >= from_stage else number

    parts = {
        "weights": e * part_of(module.total, 3),
        "gradients": e * part_of(module.trained, 2),
        "masters": 0 if is_fp32 and stage in (0, 3) else 4 * part_of(module.trained, 1),
        "moments": 8 * part_of(module.trained, 1),
        "fp32 gradients": 0 if is_fp32 and stage in (0, 3) else 4 * part_of(module.trained, 1),
        "bucket": e * int(zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE)) if stage else 0,
        "gathered": 0,
        "teacher": 4 * num_teacher,
    }
    if engine.kind == "torch":
        parts["flat gradients"] = 2 * 4 * module.trained if num_ranks > 1 else 0  # this rank's, and their sum
    if stage == 3:
        live = int(zero.get("stage3_max_live_parameters", _MAX_LIVE_PARAMETERS))
        parts["gathered"] = e * min(module.total, live)
    if stage and engine.offload_optimizer == "cpu":
        parts = {name: size for name, size in parts.items() if name not in _OFFLOADED}
    return parts


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps for the backward, in the towers' precision."""

    per_image: int
    per_token: int  # of a packed text


def activations(model: DualEncoder, config: TrainConfig, image_px: int, context_length: int) -> Activations:
    """Runs the module's forward on fake tensors (shapes alone) and adds up what it saves for the backward.

    Attention is the fused kind, which keeps no (tokens x tokens) matrix; dropout's masks are left out. Blocks under
    activation checkpointing keep their inputs: the peak inside one block comes on top.
    """
    dtype = DTYPES[config.engine.precision]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # with dropout, fused attention has no form on the CPU
    masked = find_masked_latent(config.objectives)
    model.train()

    def image_inputs(size: int) -> list[Any]:
        visible_BV = masked_BM = None
        if masked is not None:
            grid = tuple(model.visual.grid_size)
            count = num_masked(masked.mask, grid)
            visible_BV = torch.zeros(size, grid[0] * grid[1] - count, dtype=torch.int64)
            masked_BM = torch.zeros(size, count, dtype=torch.int64)
        return [torch.zeros(size, 3, image_px, image_px, dtype=dtype), None, visible_BV, masked_BM]

    def text_inputs(size: int) -> list[Any]:
        tokens = torch.zeros(size, context_length, dtype=torch.int64)
        return [None, PackedTexts([tokens], torch.arange(size)), None, None]

    def one_more(inputs: Any) -> int:
        return _saved_bytes(model, dtype, inputs, 2) - _saved_bytes(model, dtype, inputs, 1)

    reads_texts = bool(build_objectives(config.objectives))
    return Activations(one_more(image_inputs), one_more(text_inputs) // context_length if reads_texts else 0)


def _saved_bytes(model: DualEncoder, dtype: torch.dtype, make_inputs: Any, size: int) -> int:
    storages: dict[int, Any] = {}  # by identity, and kept, so that no identity comes twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: _fake(tensor, dtype) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            torch.func.functional_call(model, state, tuple(make_inputs(size)))
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


def _fake(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    wanted = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=wanted, device="cpu").requires_grad_(tensor.requires_grad)


def logit_bytes(term: ObjectiveConfig, num_images: int, size: TermSize, num_ranks: int) -> int:
    """Of the similarities of one term on one rank that are kept for the backward, fp32.

    N images, M captions and C columns of the term in the global batch, W ranks:
        clip, multi_aspect   N / W images by all C columns, and all N images by C / W columns (alone: once for both)
        local_alignment      M / W regions by all C columns; with text_to_region M regions by C / W columns, too
        siglip               N / W images by all C columns, three times: logits, signs, their product
    While a matrix is made or back-propagated another of its size stands beside it.
    """
    columns, captions = round(size.columns), round(size.captions)

    def both_ways(rows: int) -> tuple[int, int]:
        return -(-rows // num_ranks) * (columns + 1), rows * (-(-columns // num_ranks) + 1)

    if isinstance(term, ClipObjective | MultiAspectObjective):
        own, all_rows = both_ways(num_images)
        return 4 * (own if num_ranks == 1 else own + all_rows)
    if isinstance(term, LocalAlignmentObjective):
        own, all_rows = both_ways(captions)
        return 4 * (own + all_rows if term.text_to_region else own)
    if isinstance(term, SiglipObjective):
        return 4 * 3 * both_ways(num_images)[0]
    return 0


def feature_bytes(num_images: int, num_texts: float, columns: Sequence[float], embed_dim: int) -> int:
    """Features of the global batch in fp32, whole on every rank: images, texts, and each term's columns once more."""
    return round(4 * embed_dim * (num_images + num_texts + sum(columns)))
