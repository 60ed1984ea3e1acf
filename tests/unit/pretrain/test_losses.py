"""Each loss and its gradients against float64 loops, and CLIP's and SigLIP's own losses in the plain case."""

from __future__ import annotations

import math
import random
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.schema import ASPECTS, SUBCAPTION_ASPECTS, Aspect
from pretrain.config import (
    ClipObjective,
    DiagnosisWeights,
    LocalAlignmentObjective,
    MultiAspectObjective,
    OntologyTargets,
    SiglipObjective,
)
from pretrain.losses.contrastive import column_pair_losses, hide_own, row_pair_losses, row_pair_losses_among_all
from pretrain.losses.masked_latent import cosine_distance, normalised_smooth_l1
from pretrain.losses.sigmoid import sigmoid_loss_sum
from pretrain.losses.soft_targets import related_diagnoses_loss
from pretrain.losses.weights import diagnosis_guided
from pretrain.objectives.base import Term
from pretrain.objectives.build import build_objectives
from tests.reference import loops
from tests.reference.cases import CAPTIONS, PATHS, Captions, Case, make_case, random_captions, rank_features

SUBCAPTIONS = {str(aspect) for aspect in SUBCAPTION_ASPECTS}
Config = ClipObjective | MultiAspectObjective | SiglipObjective | LocalAlignmentObjective


def ours(case: Case, captions: Captions, *configs: Config) -> list[Term]:
    features = rank_features(case, captions, configs)
    return [objective(features) for objective in build_objectives(configs)]


def reference(case: Case, captions: Captions, config: Config) -> Tensor:
    aspects = {str(aspect) for aspect in config.aspects}
    if isinstance(config, SiglipObjective):
        return loops.siglip(case.images, case.texts, captions, aspects, case.scale[0], case.bias[0])
    guided = None if isinstance(config, ClipObjective) else config.diagnosis_weights
    weights = [[1.0] * len(image) for image in captions]
    if guided is not None:
        texts = {string: feature.detach() for string, feature in case.texts.items()}
        used = SUBCAPTIONS & aspects
        weights = [loops.diagnosis_weights(image, texts, used, guided.temperature) for image in captions]
    if isinstance(config, LocalAlignmentObjective):
        return loops.local_alignment(
            case.patches, case.texts, captions, weights, aspects, case.scale[0], config.sigma, config.text_to_region
        )
    ontology, soft = config.ontology, None
    if ontology is not None:
        soft = loops.SoftTargets(ontology.alpha, ontology.temperature, PATHS)
    own_as_negatives = config.own_captions_as_negatives
    return loops.contrastive(case.images, case.texts, captions, weights, aspects, case.scale[0], own_as_negatives, soft)


def gradients(loss: Tensor, case: Case) -> Tensor:
    """One vector over all leaves; zeros where a leaf is not reached."""
    if not loss.requires_grad:
        loss = loss + 0 * case.scale.sum()
    found = torch.autograd.grad(loss, case.leaves, allow_unused=True, retain_graph=True)
    pairs = zip(found, case.leaves, strict=True)
    return torch.cat([(torch.zeros_like(leaf) if g is None else g).reshape(-1) for g, leaf in pairs])


def assert_same(mine: Tensor, theirs: Tensor, case: Case) -> None:
    """Values and gradients to 1e-12 of their size."""
    torch.testing.assert_close(mine.squeeze(), theirs.detach(), rtol=1e-12, atol=1e-14)
    a, b = gradients(mine, case), gradients(theirs, case)
    assert (a - b).norm() <= 1e-12 * b.norm() + 1e-14


CONFIGS = [
    ClipObjective(),
    ClipObjective(own_captions_as_negatives=True),
    MultiAspectObjective(),
    MultiAspectObjective(diagnosis_weights=None),
    MultiAspectObjective(diagnosis_weights=DiagnosisWeights(temperature=0.1)),
    MultiAspectObjective(own_captions_as_negatives=True),
    MultiAspectObjective(aspects=(Aspect.DIAGNOSIS, Aspect.MORPHOLOGY, Aspect.SYMPTOMS)),
    MultiAspectObjective(ontology=OntologyTargets(alpha=0.3)),
    MultiAspectObjective(ontology=OntologyTargets(alpha=1.0, temperature=0.5), own_captions_as_negatives=True),
    ClipObjective(aspects=(Aspect.DIAGNOSIS,), ontology=OntologyTargets(alpha=0.5, temperature=2.0)),
    SiglipObjective(),
    SiglipObjective(aspects=ASPECTS),
    LocalAlignmentObjective(sigma=0.0),
    LocalAlignmentObjective(sigma=0.3),
    LocalAlignmentObjective(sigma=0.0, text_to_region=True),
    LocalAlignmentObjective(sigma=0.3, text_to_region=True, diagnosis_weights=None),
]


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: str(config.model_dump(exclude_defaults=True)) + config.kind
)
def test_objective_equals_the_loop_reference(config: Config) -> None:
    case = make_case()
    (term,) = ours(case, CAPTIONS, config)
    assert_same(term.loss, reference(case, CAPTIONS, config), case)
    assert gradients(term.loss, case).norm() > 0.01  # the comparison saw gradients


def random_configs(seed: int) -> list[Config]:
    """Two softmax terms with names, a sigmoid one and local alignment, with random settings."""
    draw = random.Random(seed)

    def aspects(*always: Aspect) -> tuple[Aspect, ...]:
        return tuple({*always, *draw.sample(ASPECTS, draw.randint(1, 8))})

    def maybe_ontology() -> OntologyTargets | None:
        if draw.random() < 0.4:
            return None
        return OntologyTargets(alpha=draw.uniform(0.05, 1), temperature=draw.uniform(0.3, 3))

    def maybe_weights() -> DiagnosisWeights | None:
        return None if draw.random() < 0.3 else DiagnosisWeights(temperature=draw.uniform(0.2, 2))

    return [
        ClipObjective(
            name="first",
            aspects=aspects(Aspect.DIAGNOSIS),
            own_captions_as_negatives=draw.random() < 0.5,
            ontology=maybe_ontology(),
        ),
        MultiAspectObjective(
            name="second",
            aspects=aspects(Aspect.DIAGNOSIS),
            own_captions_as_negatives=draw.random() < 0.5,
            ontology=maybe_ontology(),
            diagnosis_weights=maybe_weights(),
        ),
        SiglipObjective(aspects=aspects(Aspect.CAPTION)),
        LocalAlignmentObjective(
            aspects=aspects(),
            sigma=draw.uniform(-0.5, 0.5),
            text_to_region=draw.random() < 0.5,
            diagnosis_weights=maybe_weights(),
        ),
    ]


@pytest.mark.parametrize("seed", range(30))
def test_random_batches_with_random_settings_equal_the_loops(seed: int) -> None:
    captions = random_captions(seed)
    case, configs = make_case(captions, seed), random_configs(seed)
    for config, term in zip(configs, ours(case, captions, *configs), strict=True):
        assert_same(term.loss, reference(case, captions, config), case)


# ---------------------------------------------------------------------------------------------- plain cases


def plain(n: int) -> Captions:
    return [[("caption", f"text {i}")] for i in range(n)]


def assert_equals_peer(mine: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(mine.squeeze(), theirs.squeeze(), rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_clip_equals_open_clip_with_one_distinct_caption_an_image() -> None:
    case = make_case(plain(7))
    texts = torch.stack([case.texts[f"text {i}"] for i in range(7)])
    (term,) = ours(case, plain(7), ClipObjective())
    assert_equals_peer(
        term.loss,
        open_clip.ClipLoss()(case.images, texts, case.scale),
        [case.images, case.scale, *case.texts.values()],
    )


def test_siglip_equals_open_clip_with_one_distinct_caption_an_image() -> None:
    case = make_case(plain(7))
    texts = torch.stack([case.texts[f"text {i}"] for i in range(7)])
    (term,) = ours(case, plain(7), SiglipObjective())
    assert_equals_peer(
        term.loss,
        SigLipLoss()(case.images, texts, case.scale, case.bias),
        [case.images, case.scale, case.bias, *case.texts.values()],
    )


# ---------------------------------------------------------------------------------------------- soft targets


def test_a_term_over_diagnoses_alone_is_the_mixture_of_the_specification() -> None:
    """(1 - alpha) L + alpha mean CE, where every image has a known diagnosis and no text is shared by aspects."""
    captions: Captions = [[("diagnosis", text)] for text in ("melanoma", "nevus", "naevus", "eczema", "melanoma")]
    case, ontology = make_case(captions), OntologyTargets(alpha=0.3, temperature=1.5)
    aspects = (Aspect.DIAGNOSIS,)
    plain_term, soft_term = ours(
        case,
        captions,
        ClipObjective(name="plain", aspects=aspects),
        ClipObjective(name="soft", aspects=aspects, ontology=ontology),
    )
    names = sorted(case.texts)
    logits = case.scale * case.images @ torch.stack([case.texts[name] for name in names]).T
    # edges: nevus and naevus are one node, melanoma is their sibling, eczema lies beyond the root
    edges = {("melanoma", "nevus"): 2, ("melanoma", "eczema"): 6, ("nevus", "eczema"): 6}
    cross_entropies = []
    for i, ((_, own),) in enumerate(captions):
        nodes = [("nevus" if name == "naevus" else name) for name in (own, *names)]
        distance = [
            0 if other == nodes[0] else edges.get((nodes[0], other)) or edges[other, nodes[0]] for other in nodes[1:]
        ]
        mass = torch.tensor([math.exp(-d / 1.5) for d in distance], dtype=torch.float64)
        cross_entropies.append(-(mass / mass.sum() * logits[i].log_softmax(0)).sum())
    expected = 0.7 * plain_term.loss + 0.3 * torch.stack(cross_entropies).mean()
    assert_same(soft_term.loss, expected.squeeze(), case)


def test_soft_targets_fade_into_the_plain_term() -> None:
    case = make_case()
    values = [
        ours(case, CAPTIONS, MultiAspectObjective(ontology=ontology))[0].loss.item()
        for ontology in (None, OntologyTargets(alpha=1e-300), OntologyTargets(alpha=1e-6), OntologyTargets(alpha=0.5))
    ]
    assert values[1] == values[0]
    assert 0 < abs(values[2] - values[0]) < 1e-5
    assert abs(values[3] - values[0]) > 1e-2


def test_related_diagnoses_have_their_share_of_the_mass_and_unknown_ones_none() -> None:
    """At the target's own logits the cross-entropy is the entropy; an unknown text in the denominator adds to it."""
    distance = torch.tensor([[0.0, 1.0, math.inf], [math.inf] * 3])
    odds = math.exp(-1 / 0.5)
    target = torch.tensor([1 / (1 + odds), odds / (1 + odds)])
    entropy = -(target * target.log()).sum()
    hidden = torch.cat([target.log(), torch.tensor([-1e4])]).expand(2, 3)
    torch.testing.assert_close(related_diagnoses_loss(hidden, distance, 0.5), torch.stack([entropy, 0 * entropy]))
    equal = torch.cat([target.log(), torch.tensor([0.0])]).expand(2, 3)
    torch.testing.assert_close(related_diagnoses_loss(equal, distance, 0.5)[0], entropy + math.log(2))


# ---------------------------------------------------------------------------------------------- nothing to learn

DEGENERATE: dict[str, Captions] = {
    "one image": plain(1),  # no negative at all
    "one known diagnosis": [[("caption", "w"), ("diagnosis", "nevus"), ("morphology", "m")]],
    "identical texts": [[("caption", "same"), ("morphology", "same too")]] * 3,
    "identical diagnoses": [[("diagnosis", "eczema"), ("morphology", "m")]] * 3,
    "unknown diagnoses": [[("caption", f"w{i}"), ("diagnosis", "something unheard of")] for i in range(3)],
    "no sub-captions": [[("caption", "a")], [("caption", "b"), ("diagnosis", "d")]],
}


@pytest.mark.parametrize("captions", DEGENERATE.values(), ids=DEGENERATE)
def test_values_and_gradients_are_finite_where_nothing_is_to_learn(captions: Captions) -> None:
    case = make_case(captions)
    configs = [
        config.model_copy(update={"name": str(n)})
        for n, config in enumerate(CONFIGS)
        if not isinstance(config, LocalAlignmentObjective)
    ]
    terms = ours(case, captions, *configs)
    for config in CONFIGS:
        if isinstance(config, LocalAlignmentObjective):
            terms += ours(case, captions, config)
    has_negatives = captions in (DEGENERATE["unknown diagnoses"], DEGENERATE["no sub-captions"])
    for config, term in zip([*configs, *CONFIGS[-4:]], terms, strict=True):
        gradient = gradients(term.loss, case)
        assert torch.isfinite(term.loss).all() and torch.isfinite(gradient).all()
        own_negatives = getattr(config, "own_captions_as_negatives", False)
        if not has_negatives and not isinstance(config, SiglipObjective) and not own_negatives:
            assert term.loss.item() == 0 and gradient.norm() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_without_negatives_has_loss_and_gradient_zero(dtype: torch.dtype) -> None:
    """At the largest logits there are, too; and what is hidden stays out of the other rows' losses."""
    logits = torch.tensor([[100.0, -100.0, 0.0], [-100.0, 100.0, 0.0]], dtype=dtype, requires_grad=True)
    own = torch.tensor([[0, 1], [1, 2]])  # the first row owns both columns, the second's other slot has none
    positive, negative = logits.gather(1, own), hide_own(logits, own)
    pair = row_pair_losses(positive, negative)
    assert pair[0].tolist() == [0, 0]
    assert pair[1, 0].item() == pytest.approx(math.log1p(math.exp(-200)), abs=1e-30)
    column = column_pair_losses(positive, negative, own)
    assert column[0, 1].item() == 0 and column[1, 0].item() == 0  # both rows own the second text
    (gradient,) = torch.autograd.grad(pair[0].sum() + column[0, 1] + column[1, 0], logits)
    assert gradient.abs().max() == 0
    among_all = row_pair_losses_among_all(positive, negative, torch.tensor([[True, True], [True, False]]))
    assert among_all[0, 1].item() == pytest.approx(200) and among_all[0, 0].item() == pytest.approx(0, abs=1e-30)


def test_no_patch_over_sigma_gives_no_loss_and_is_counted() -> None:
    case = make_case()
    (term,) = ours(case, CAPTIONS, LocalAlignmentObjective(sigma=0.999, text_to_region=True))
    assert term.loss.item() == 0.0
    selected, possible = term.statistics["selected_fraction"]
    assert selected.item() == 0 and possible.item() > 0
    assert gradients(term.loss, case).norm() == 0


def test_a_string_in_several_slots_is_one_positive_of_the_sigmoid_loss() -> None:
    logits = torch.tensor([[0.3, -0.2, 9.0]], dtype=torch.float64)
    once, twice = (sigmoid_loss_sum(logits, torch.tensor([own])) for own in ([0, 2, 2], [0, 0, 2]))
    assert once == twice
    torch.testing.assert_close(once, -F.logsigmoid(torch.tensor([0.3, 0.2], dtype=torch.float64)).sum())


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device, or sizes a tensor by its values."""

    REFUSED = ("local_scalar_dense", "nonzero", "masked_select", "unique", "to_copy", "is_nonzero", "equal")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__.lstrip("_")
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else []
        assert not any(index is not None and index.dtype == torch.bool for index in indices), f"{name} by a mask"
        kwargs = kwargs or {}
        assert not name.startswith(self.REFUSED) or (name == "to_copy" and "device" not in kwargs), name
        return function(*args, **kwargs)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind} {CONFIGS.index(config)}")
def test_no_objective_waits_for_the_device(config: Config) -> None:
    """Forward and backward, but the first call, which makes the table of the term's aspects."""
    case = make_case()
    features = rank_features(case, CAPTIONS, [config])
    (objective,) = build_objectives([config])
    objective(features)
    with NoWaiting():
        objective(features).loss.backward()
    assert case.images.grad is not None or case.patches.grad is not None


def test_the_check_for_waiting_catches_what_it_should() -> None:
    values = torch.rand(3)
    for wait in (
        lambda: values.sum().item(),
        lambda: values[values > 0.5],
        lambda: (values > 0.5).nonzero(),
        lambda: bool(values.sum() > 1),
        lambda: values.unique(),
        lambda: values.to("meta"),
    ):
        with pytest.raises(AssertionError), NoWaiting():
            wait()


def test_a_sigmoid_term_without_a_text_is_zero() -> None:
    case = make_case(plain(3))
    (term,) = ours(case, plain(3), SiglipObjective(aspects=(Aspect.DIAGNOSIS,)))
    assert term.loss.item() == 0 and gradients(term.loss, case).norm() == 0


def test_statistics_count_texts_weights_and_soft_targets() -> None:
    case = make_case()
    (term,) = ours(case, CAPTIONS, MultiAspectObjective(diagnosis_weights=None, ontology=OntologyTargets()))
    total, count = term.statistics["texts_per_image"]
    assert (total.item(), count.item()) == (sum(len({text for _, text in image}) for image in CAPTIONS), 8)
    weight, used = term.statistics["mean_weight"]
    assert weight.item() == used.item() == total.item()
    loss, known = term.statistics["soft_loss"]
    assert known.item() == 6 and loss.item() > 0  # all with a diagnosis but the one that has no node


# ---------------------------------------------------------------------------------------------- weights


def test_the_closest_subcaption_weighs_one_and_the_least_at_least_exp_minus_two() -> None:
    """At temperature 1; slots that are no sub-captions, and images without a diagnosis, weigh one."""
    generator = torch.Generator().manual_seed(3)
    text_BKD = F.normalize(torch.randn(50, 6, 4, generator=generator), dim=-1)
    is_subcaption_BK = torch.rand(50, 6, generator=generator) < 0.7
    has_diagnosis_B = torch.arange(50) % 5 != 0
    weight_BK = diagnosis_guided(text_BKD, text_BKD[:, 0], has_diagnosis_B, is_subcaption_BK, temperature=1.0)
    guided_BK = is_subcaption_BK & has_diagnosis_B.unsqueeze(1)
    assert torch.all(weight_BK[~guided_BK] == 1)
    for weights_K, guided_K in zip(weight_BK, guided_BK, strict=True):
        if guided_K.any():
            assert weights_K[guided_K].max() == 1 and weights_K[guided_K].min() >= math.exp(-2)
    assert (weight_BK < 0.5).any()


def test_all_aspects_are_the_default_of_multi_aspect() -> None:
    assert MultiAspectObjective().aspects == ASPECTS


# ---------------------------------------------------------------------------------------------- masked latent


@pytest.mark.parametrize("seed", range(3))
def test_masked_latent_losses_equal_the_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predicted, target = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    predicted.requires_grad_()
    for mine, theirs in (
        (cosine_distance(predicted, target), loops.cosine_distance(predicted, target)),
        (normalised_smooth_l1(predicted, target), loops.normalised_smooth_l1(predicted, target)),
        (normalised_smooth_l1(predicted, target, 0.3), loops.normalised_smooth_l1(predicted, target, 0.3)),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
        a, b = (torch.autograd.grad(loss, predicted, retain_graph=True)[0] for loss in (mine, theirs))
        assert b.norm() > 0.01 and (a - b).norm() <= 1e-12 * b.norm()


def test_masked_latent_losses_of_equal_parts_have_the_mean_of_the_whole() -> None:
    """So micro-batches and ranks average: every image has the same number of tokens."""
    predicted, target = (torch.randn(6, 3, 5, dtype=torch.float64) for _ in range(2))
    for loss in (cosine_distance, normalised_smooth_l1):
        parts = torch.stack([loss(p, t) for p, t in zip(predicted.chunk(3), target.chunk(3), strict=True)])
        torch.testing.assert_close(parts.mean(), loss(predicted, target), rtol=1e-13, atol=0)


def test_masked_latent_targets_carry_no_gradient() -> None:
    predicted, target = torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 2, 4, requires_grad=True)
    (cosine_distance(predicted, target) + normalised_smooth_l1(predicted, target)).backward()
    assert target.grad is None and predicted.grad is not None
