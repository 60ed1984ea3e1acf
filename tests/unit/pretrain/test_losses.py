"""Each loss and its gradients against float64 loops, and CLIP's own loss in the plain case."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
from torch import Tensor

from data_prep.schema import SUBCAPTION_ASPECTS, Aspect
from pretrain.config import ClipObjective, DiagnosisWeights, LocalAlignmentObjective, MultiAspectObjective
from pretrain.losses.masked_latent import cosine_distance, normalised_smooth_l1
from pretrain.losses.weights import diagnosis_guided
from pretrain.objectives.build import build_objectives
from pretrain.objectives.features import gather_features
from tests.reference import loops
from tests.reference.cases import ALL_ASPECTS, CAPTIONS, Case, make_case, rank_inputs

SUBCAPTIONS = {str(aspect) for aspect in SUBCAPTION_ASPECTS}
Config = ClipObjective | MultiAspectObjective | LocalAlignmentObjective


def ours(case: Case, config: Config, captions: list[list[tuple[str, str]]] = CAPTIONS) -> Tensor:
    encoded, batch, _ = rank_inputs(case, captions, {config.kind: config.aspects}, rank=0, world_size=1)
    (objective,) = build_objectives([config])
    return objective(gather_features(encoded, batch, None)).loss


def weights(case: Case, temperature: float | None, aspects: set[str], captions=CAPTIONS) -> list[list[float]]:
    if temperature is None:
        return [[1.0] * len(image) for image in captions]
    texts = {string: feature.detach() for string, feature in case.texts.items()}
    return [loops.diagnosis_weights(image, texts, SUBCAPTIONS & aspects, temperature) for image in captions]


def reference(case: Case, config: Config, captions: list[list[tuple[str, str]]] = CAPTIONS) -> Tensor:
    aspects = {str(aspect) for aspect in config.aspects}
    guided = None if isinstance(config, ClipObjective) else config.diagnosis_weights
    w = weights(case, None if guided is None else guided.temperature, aspects, captions)
    if isinstance(config, LocalAlignmentObjective):
        return loops.local_alignment(
            case.patches, case.texts, captions, w, aspects, case.scale[0], config.sigma, config.text_to_region
        )
    return loops.contrastive(
        case.images, case.texts, captions, w, aspects, case.scale[0], config.own_captions_as_negatives
    )


def assert_same(config: Config, captions: list[list[tuple[str, str]]] = CAPTIONS) -> None:
    case = make_case(captions)
    leaves = [case.images, case.patches, case.scale, *case.texts.values()]
    mine, theirs = ours(case, config, captions), reference(case, config, captions)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (mine, theirs)]
    compared = 0
    for a, b, leaf in zip(*gradients, leaves, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-10, atol=1e-12)
        compared += int(b is not None and bool(b.abs().sum() > 0))
    assert compared >= 3  # the comparison saw gradients


@pytest.mark.parametrize(
    "config",
    [
        ClipObjective(),
        ClipObjective(own_captions_as_negatives=True),
        MultiAspectObjective(),
        MultiAspectObjective(diagnosis_weights=None),
        MultiAspectObjective(diagnosis_weights=DiagnosisWeights(temperature=0.1)),
        MultiAspectObjective(own_captions_as_negatives=True),
        MultiAspectObjective(aspects=(Aspect.DIAGNOSIS, Aspect.MORPHOLOGY, Aspect.SYMPTOMS)),
        LocalAlignmentObjective(sigma=0.0),
        LocalAlignmentObjective(sigma=0.3),
        LocalAlignmentObjective(sigma=0.0, text_to_region=True),
        LocalAlignmentObjective(sigma=0.3, text_to_region=True, diagnosis_weights=None),
    ],
    ids=lambda config: str(config.model_dump(exclude_defaults=True)) + config.kind,
)
def test_objective_equals_the_loop_reference(config: Config) -> None:
    assert_same(config)


def plain(n: int) -> list[list[tuple[str, str]]]:
    return [[("caption", f"text {i}")] for i in range(n)]


def test_clip_equals_open_clip_with_one_distinct_caption_an_image() -> None:
    captions = plain(7)
    case = make_case(captions)
    texts = torch.stack([case.texts[f"text {i}"] for i in range(7)])
    theirs = open_clip.ClipLoss()(case.images, texts, case.scale)
    mine = ours(case, ClipObjective(), captions)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(mine, [case.images, case.scale]),
        torch.autograd.grad(theirs, [case.images, case.scale]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "captions",
    [
        plain(1),  # one image: no negative at all
        [[("caption", "same"), ("morphology", "same too")]] * 3,  # all texts identical
        [[("caption", "a")], [("caption", "b"), ("diagnosis", "d")]],  # no sub-captions anywhere
    ],
    ids=["one image", "identical texts", "no sub-captions"],
)
@pytest.mark.parametrize(
    "config", [ClipObjective(), MultiAspectObjective(), LocalAlignmentObjective(sigma=0.0)], ids=lambda c: c.kind
)
def test_values_and_gradients_are_finite_where_nothing_is_to_learn(config: Config, captions) -> None:
    case = make_case(captions)
    loss = ours(case, config, captions)
    assert torch.isfinite(loss)
    leaves = [case.images, case.patches, case.scale, *case.texts.values()]
    for gradient in torch.autograd.grad(loss, leaves, allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()
    if len({text for image in captions for _, text in image}) <= 2 and captions[0] == captions[-1]:
        assert loss.item() == pytest.approx(0.0, abs=1e-12)


def test_no_patch_over_sigma_gives_no_loss_and_is_counted() -> None:
    case = make_case()
    config = LocalAlignmentObjective(sigma=0.999)
    encoded, batch, _ = rank_inputs(case, CAPTIONS, {config.kind: config.aspects}, 0, 1)
    term = build_objectives([config])[0](gather_features(encoded, batch, None))
    assert term.loss.item() == 0.0
    selected, possible = term.statistics["selected_fraction"]
    assert selected.item() == 0 and possible.item() > 0
    assert torch.isfinite(torch.autograd.grad(term.loss, case.patches)[0]).all()


def test_the_closest_subcaption_weighs_one_and_the_least_at_least_exp_minus_two() -> None:
    """At temperature 1; slots that are no sub-captions, and images without a diagnosis, weigh one."""
    generator = torch.Generator().manual_seed(3)
    text_BKD = torch.nn.functional.normalize(torch.randn(50, 6, 4, generator=generator), dim=-1)
    is_subcaption_BK = torch.rand(50, 6, generator=generator) < 0.7
    has_diagnosis_B = torch.arange(50) % 5 != 0
    weight_BK = diagnosis_guided(text_BKD, text_BKD[:, 0], has_diagnosis_B, is_subcaption_BK, temperature=1.0)
    guided_BK = is_subcaption_BK & has_diagnosis_B.unsqueeze(1)
    assert torch.all(weight_BK[~guided_BK] == 1)
    for weights_K, guided_K in zip(weight_BK, guided_BK, strict=True):
        if guided_K.any():
            assert weights_K[guided_K].max() == 1 and weights_K[guided_K].min() >= math.exp(-2)
    assert (weight_BK < 0.5).any()


def test_masked_latent_losses_against_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    predicted, target = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    predicted.requires_grad_()
    cosine, smooth = [], []
    for b in range(2):
        for m in range(3):
            p, t = predicted[b, m], target[b, m]
            cosine.append(1 - (p * t).sum() / (p.norm() * t.norm()))
            normal = (t - t.mean()) / ((t - t.mean()).pow(2).mean() + 1e-5).sqrt()
            for d in range(4):
                error = (p[d] - normal[d]).abs()
                smooth.append(0.5 * error**2 if error < 1 else error - 0.5)
    for mine, theirs in (
        (cosine_distance(predicted, target), torch.stack(cosine).mean()),
        (normalised_smooth_l1(predicted, target), torch.stack(smooth).mean()),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        a, b = (torch.autograd.grad(loss, predicted, retain_graph=True)[0] for loss in (mine, theirs))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_masked_latent_targets_carry_no_gradient() -> None:
    predicted, target = torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 2, 4, requires_grad=True)
    (cosine_distance(predicted, target) + normalised_smooth_l1(predicted, target)).backward()
    assert target.grad is None and predicted.grad is not None


def test_all_aspects_are_the_default_of_multi_aspect() -> None:
    assert MultiAspectObjective().aspects == ALL_ASPECTS
