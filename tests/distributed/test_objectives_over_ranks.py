"""W ranks give the loss and the gradients of one process with the whole batch (float64, ragged captions)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.config import ClipObjective, LocalAlignmentObjective, MultiAspectObjective
from pretrain.distributed import comm
from pretrain.objectives.build import build_objectives
from pretrain.objectives.features import gather_features
from tests.distributed.run import run_on_ranks
from tests.reference.cases import CAPTIONS, make_case, rank_inputs

CONFIGS = (
    ClipObjective(),
    MultiAspectObjective(),
    LocalAlignmentObjective(sigma=0.1, text_to_region=True),
)
ASPECTS = {config.kind: config.aspects for config in CONFIGS}


def losses_and_gradients() -> dict[str, Tensor]:
    """This rank's losses and, for each leaf, gradient / W: the part of the mean that reaches this rank."""
    case = make_case()
    encoded, batch, strings = rank_inputs(case, CAPTIONS, ASPECTS, comm.rank(), comm.world_size())
    features = gather_features(encoded, batch, None)
    terms = [objective(features) for objective in build_objectives(CONFIGS)]
    result = {config.kind: term.loss.detach() for config, term in zip(CONFIGS, terms, strict=True)}
    torch.stack([term.loss for term in terms]).sum().backward()
    result |= {"images": case.images.grad, "patches": case.patches.grad, "scale": case.scale.grad}
    result |= {f"text {string}": case.texts[string].grad for string in strings}
    return {
        name: value / (1 if name in ASPECTS else comm.world_size())
        for name, value in result.items()
        if value is not None
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_add_up_to_one_process(world_size: int) -> None:
    whole = losses_and_gradients()
    parts = run_on_ranks(losses_and_gradients, world_size)
    for kind in ASPECTS:
        mean = torch.stack([part[kind] for part in parts]).mean()
        torch.testing.assert_close(mean, whole[kind], rtol=1e-13, atol=1e-13)
    for name, expected in whole.items():
        if name not in ASPECTS:
            total = sum(part[name] for part in parts if name in part)
            torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-14, msg=f"gradient of {name}")


def test_a_text_shared_by_ranks_is_encoded_by_the_lowest_alone() -> None:
    case = make_case()
    by_rank = [rank_inputs(case, CAPTIONS, ASPECTS, rank, 4)[2] for rank in range(4)]
    assert "nevus" in by_rank[1] and not any("nevus" in strings for strings in by_rank[2:])
    everything = [string for strings in by_rank for string in strings]
    assert sorted(everything) == sorted({text for image in CAPTIONS for _, text in image})
