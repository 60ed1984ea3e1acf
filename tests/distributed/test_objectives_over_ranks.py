"""W ranks give the loss and the gradients of one process with the whole batch (float64, ragged captions)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from data_prep.schema import ASPECTS, Aspect
from pretrain.config import (
    ClipObjective,
    LocalAlignmentObjective,
    MultiAspectObjective,
    ObjectiveConfig,
    OntologyTargets,
    SiglipObjective,
)
from pretrain.data.texts import plan_texts
from pretrain.distributed import comm
from pretrain.objectives.build import build_objectives
from tests.distributed.run import run_on_ranks
from tests.reference.cases import CAPTIONS, Captions, encoded_by, index_rows, make_case, rank_features

CONFIGS: tuple[ObjectiveConfig, ...] = (
    ClipObjective(),
    ClipObjective(name="own negatives", aspects=ASPECTS, own_captions_as_negatives=True),
    MultiAspectObjective(),
    MultiAspectObjective(name="ontology", ontology=OntologyTargets(alpha=0.4, temperature=1.5)),
    MultiAspectObjective(
        name="narrow", aspects=(Aspect.DIAGNOSIS, Aspect.MORPHOLOGY), ontology=OntologyTargets(alpha=0.4)
    ),
    SiglipObjective(aspects=ASPECTS),
)
#: only one local alignment is allowed in a run: its regions are the batch's
RUNS: dict[str, tuple[ObjectiveConfig, ...]] = {
    "regions to texts": (*CONFIGS, LocalAlignmentObjective(sigma=0.1)),
    "both ways": (LocalAlignmentObjective(sigma=0.1, text_to_region=True),),
}
#: of four ranks the second owns no text that it encodes itself, the third none that "narrow" or local alignment
#: uses, the last encodes one and uses it
LOPSIDED: Captions = [
    [("caption", "w0"), ("diagnosis", "melanoma"), ("morphology", "m0"), ("history", "h0")],
    [("caption", "w1"), ("diagnosis", "nevus"), ("morphology", "m1"), ("symptoms", "s1")],
    [("caption", "w0"), ("diagnosis", "nevus"), ("morphology", "m0")],
    [("caption", "w1"), ("symptoms", "s1"), ("history", "h0")],
    [("caption", "w4")],
    [("caption", "w5"), ("visual_concepts", "black")],
    [("caption", "w0"), ("diagnosis", "eczema")],
    [("caption", "w1"), ("diagnosis", "melanoma"), ("morphology", "m1")],
]
BATCHES = {"ragged": CAPTIONS, "lopsided": LOPSIDED}


def losses_and_gradients() -> dict[str, Tensor]:
    """This rank's losses and, for each leaf, gradient / W: the part of the mean that reaches this rank."""
    result: dict[str, Tensor] = {}
    for batch, captions in BATCHES.items():
        for run, configs in RUNS.items():
            case = make_case(captions)
            features = rank_features(case, captions, configs, comm.rank(), comm.world_size())
            terms = {objective.label: objective(features) for objective in build_objectives(configs)}
            for label, term in terms.items():
                result[f"loss, {batch}, {run}, {label}"] = term.loss.detach().squeeze()
                leaves = {"images": case.images, "patches": case.patches, "scale": case.scale, "bias": case.bias}
                leaves |= {f"text {string}": feature for string, feature in case.texts.items()}
                found = torch.autograd.grad(term.loss, list(leaves.values()), allow_unused=True, retain_graph=True)
                for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
                    gradient = torch.zeros_like(leaf) if gradient is None else gradient
                    result[f"gradient, {batch}, {run}, {label}, {name}"] = gradient / comm.world_size()
    return result


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return losses_and_gradients()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_add_up_to_one_process(world_size: int, whole: dict[str, Tensor]) -> None:
    parts = run_on_ranks(losses_and_gradients, world_size)
    for name, expected in whole.items():
        values = torch.stack([part[name] for part in parts])
        together = values.mean(0) if name.startswith("loss") else values.sum(0)
        torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")


def test_the_comparison_sees_every_term(whole: dict[str, Tensor]) -> None:
    losses = {name: value for name, value in whole.items() if name.startswith("loss")}
    assert len(losses) == 16 and all(value > 0.01 for value in losses.values())
    for name in losses:
        term = name.removeprefix("loss, ")
        reached = [n for n, g in whole.items() if n.startswith(f"gradient, {term},") and g.norm() > 1e-3]
        assert len(reached) >= 5


def test_a_text_shared_by_ranks_is_encoded_by_the_lowest_alone() -> None:
    """What each of four ranks encodes, as the batches above are meant."""
    by_batch = {}
    for batch, captions in BATCHES.items():
        rows = index_rows(captions)
        plan = plan_texts(rows["text_hash"], rows["text_aspect"], 4)
        by_batch[batch] = [encoded_by(plan, captions, rank) for rank in range(4)]
        everything = [string for strings in by_batch[batch] for string in strings]
        assert sorted(everything) == sorted({text for image in captions for _, text in image})
    ragged = by_batch["ragged"]
    assert "nevus" in ragged[1] and not any("nevus" in strings for strings in ragged[2:])
    assert [len(strings) for strings in by_batch["lopsided"]] == [8, 0, 3, 1]
