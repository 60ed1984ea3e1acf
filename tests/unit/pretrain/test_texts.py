"""Who owns which text, who encodes it, which columns a term uses, how texts are packed: against strings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_prep.schema import ASPECT_CODE, MAX_CAPTIONS, NO_ASPECT_CODE, SUBCAPTION_ASPECTS, Aspect, text_hash
from pretrain.data.texts import TextPlan, choose_bucket_edges, pack, plan_columns, plan_texts
from pretrain.losses.weights import once_per_text

Captions = list[list[tuple[Aspect, str]]]  # by image

WORLD_SIZES = (1, 2, 3, 4, 6, 12)


def random_captions(seed: int, num_images: int = 12) -> Captions:
    """Ragged, with strings shared between images and between the aspects of one image."""
    rng = np.random.default_rng(seed)
    images: Captions = []
    for image in range(num_images):
        captions = [(Aspect.CAPTION, f"whole {rng.integers(num_images)}" if rng.random() < 0.4 else f"own {image}")]
        if rng.random() < 0.7:
            captions.append((Aspect.DIAGNOSIS, f"diagnosis {rng.integers(3)}"))
        if rng.random() < 0.5:
            captions.append((Aspect.VISUAL_CONCEPTS, f"concept {rng.integers(3)}"))
        for _ in range(rng.integers(0, MAX_CAPTIONS - len(captions) + 1)):
            aspect = SUBCAPTION_ASPECTS[rng.integers(len(SUBCAPTION_ASPECTS))]
            captions.append((aspect, f"part {rng.integers(20)}" if rng.random() < 0.8 else captions[0][1]))
        images.append(captions)
    return images


def arrays(images: Captions) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    hash_NK = np.zeros((len(images), MAX_CAPTIONS), dtype=np.uint64)
    aspect_NK = np.full((len(images), MAX_CAPTIONS), NO_ASPECT_CODE, dtype=np.uint8)
    for i, captions in enumerate(images):
        for k, (aspect, text) in enumerate(captions):
            hash_NK[i, k], aspect_NK[i, k] = text_hash(text), ASPECT_CODE[aspect]
    return hash_NK, aspect_NK


def strings_of(plan: TextPlan, images: Captions) -> list[str]:
    """The U texts, from the slots that supply them."""
    return [images[slot // MAX_CAPTIONS][slot % MAX_CAPTIONS][1] for slot in plan.first_slot_U.tolist()]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_plan_equals_a_count_by_strings(seed: int, world_size: int) -> None:
    images = random_captions(seed)
    plan = plan_texts(*arrays(images), world_size)
    strings = strings_of(plan, images)
    assert sorted(strings) == sorted({text for captions in images for _, text in captions})  # distinct, and all
    for i, captions in enumerate(images):
        owned = [strings[u] for u in plan.text_NK[i] if u != plan.num_texts]
        assert owned == [text for _, text in captions]
        assert (plan.text_NK[i, len(captions) :] == plan.num_texts).all()

    per_rank = len(images) // world_size
    supplied = [strings[plan.supplied_by(rank)] for rank in range(world_size)]
    assert [text for part in supplied for text in part] == strings  # ranges that add up, in order
    for rank, part in enumerate(supplied):
        mine = {text for captions in images[rank * per_rank : (rank + 1) * per_rank] for _, text in captions}
        lower = {text for captions in images[: rank * per_rank] for _, text in captions}
        assert set(part) == mine - lower

    # after a gather in which every rank is padded to the largest count
    padded = int(plan.num_texts_by_rank.max())
    gathered = [text for part in supplied for text in part + ["padding"] * (padded - len(part))]
    assert [gathered[row] for row in plan.gathered_rows()] == strings


def test_the_plan_does_not_depend_on_the_number_of_ranks() -> None:
    hashes, aspects = arrays(random_captions(1))
    whole = plan_texts(hashes, aspects, 1)
    for world_size in WORLD_SIZES:
        plan = plan_texts(hashes, aspects, world_size)
        assert np.array_equal(plan.text_NK, whole.text_NK) and np.array_equal(plan.first_slot_U, whole.first_slot_U)


def test_a_rank_may_have_nothing_to_encode() -> None:
    images: Captions = [[(Aspect.CAPTION, "the same")] for _ in range(4)]
    plan = plan_texts(*arrays(images), 4)
    assert plan.num_texts_by_rank.tolist() == [1, 0, 0, 0]
    assert plan.gathered_rows().tolist() == [0] and plan.gathered_rows().dtype == np.int64
    assert plan.supplied_by(3) == slice(1, 1)
    packed = pack([], (16, 64), pad_id=0, trim=True)
    assert packed.order_R.shape == (0,) and [len(tokens) for tokens in packed.bucket_tokens] == [1, 1]


@pytest.mark.parametrize("seed", range(6))
def test_columns_are_the_texts_under_a_terms_aspects(seed: int) -> None:
    images = random_captions(seed)
    hashes, aspects = arrays(images)
    plan = plan_texts(hashes, aspects, 2)
    strings = strings_of(plan, images)
    terms = {
        "clip": [Aspect.CAPTION],
        "diagnosis": [Aspect.DIAGNOSIS, Aspect.VISUAL_CONCEPTS],
        "local": SUBCAPTION_ASPECTS,
        "everything": tuple(Aspect),
    }
    columns = plan_columns(plan, aspects, terms)
    assert set(columns) == set(terms)
    for term, wanted in terms.items():
        text_C, column_of_text = columns[term].text_C.tolist(), columns[term].column_of_text.tolist()
        expected = {text for captions in images for aspect, text in captions if aspect in wanted}
        assert {strings[u] for u in text_C} == expected and len(text_C) == len(expected)
        for u in range(plan.num_texts):
            assert column_of_text[u] == (text_C.index(u) if u in text_C else len(text_C))
        assert column_of_text[plan.num_texts] == len(text_C) and len(column_of_text) == plan.num_texts + 1


def test_a_term_without_a_text_has_no_column() -> None:
    hashes, aspects = arrays([[(Aspect.CAPTION, "a")], [(Aspect.CAPTION, "b")]])
    columns = plan_columns(plan_texts(hashes, aspects, 2), aspects, {"local": SUBCAPTION_ASPECTS})["local"]
    assert columns.text_C.shape == columns.slot_M.shape == (0,)
    assert columns.column_of_text.tolist() == [0, 0, 0] and columns.num_slots_by_rank == [0, 0]


def test_the_slots_of_a_term_are_those_that_hold_the_weight_of_its_texts() -> None:
    images: Captions = [
        [(Aspect.CAPTION, "a"), (Aspect.MORPHOLOGY, "b"), (Aspect.HISTORY, "b"), (Aspect.OTHER, "a")],
        [(Aspect.CAPTION, "c"), (Aspect.MORPHOLOGY, "b")],
        [(Aspect.CAPTION, "c")],
        [(Aspect.CAPTION, "d"), (Aspect.OTHER, "e"), (Aspect.HISTORY, "b")],
    ]
    hashes, aspects = arrays(images)
    plan = plan_texts(hashes, aspects, 2)
    columns = plan_columns(plan, aspects, {"local": SUBCAPTION_ASPECTS})["local"]
    weights = torch.from_numpy(np.isin(aspects, [ASPECT_CODE[aspect] for aspect in SUBCAPTION_ASPECTS])).float()
    weights = once_per_text(torch.from_numpy(plan.text_NK), weights)
    assert columns.slot_M.tolist() == weights.flatten().nonzero().squeeze(1).tolist()
    assert columns.num_slots_by_rank == [3, 2]


# ---------------------------------------------------------------------------------------------- packing


def random_tokens(lengths: list[int], seed: int = 0) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(100, 1000, length) for length in lengths]


@pytest.mark.parametrize("pad_id", [0, 1, 999])
@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("lengths", [[3, 40, 16, 17, 9, 64, 64, 2], [64], [5, 5, 5], [20, 30]], ids=str)
def test_packed_texts_come_back(lengths: list[int], trim: bool, pad_id: int) -> None:
    edges = (8, 16, 32, 64)
    tokens = random_tokens(lengths)
    packed = pack(tokens, edges, pad_id, trim)
    assert len(packed.bucket_tokens) == len(edges)
    rows = [row for bucket in packed.bucket_tokens for row in bucket.numpy()]
    order = packed.order_R.tolist()
    assert len(set(order)) == len(tokens)  # no two texts in one row
    bucket_of_row = [b for b, bucket in enumerate(packed.bucket_tokens) for _ in bucket]
    for text, row in enumerate(order):
        assert np.array_equal(rows[row][: lengths[text]], tokens[text])
        assert (rows[row][lengths[text] :] == pad_id).all()
        assert bucket_of_row[row] == sum(lengths[text] > edge for edge in edges)
    for bucket, edge in enumerate(edges):
        members = [length for length in lengths if sum(length > e for e in edges) == bucket]
        width = packed.bucket_tokens[bucket].shape[1]
        assert len(packed.bucket_tokens[bucket]) == max(1, len(members))
        assert width == (edge if not trim else max(members, default=2))
    # every other row is the dummy of an empty bucket: a real token in it, of any vocabulary
    for row in set(range(len(rows))) - set(order):
        assert (rows[row] != pad_id).any() and rows[row].max() <= max(pad_id, 1)


def test_a_text_beyond_the_last_edge_is_an_error() -> None:
    with pytest.raises(ValueError, match="65 tokens is longer than the last bucket edge 64"):
        pack(random_tokens([3, 65]), (16, 64), pad_id=0, trim=True)


def test_bucket_edges_pad_to_the_fewest_tokens() -> None:
    two_kinds = np.array([10] * 60 + [38] * 40)
    assert choose_bucket_edges(two_kinds, 2, 128) == (10, 128)  # trimmed to 10 and to 38: nothing is padded
    assert choose_bucket_edges(two_kinds, 1, 77) == (77,)
    lengths = np.random.default_rng(0).integers(3, 64, size=300)

    def padded(edges: tuple[int, ...]) -> int:
        total, low = 0, 0
        for edge in edges:
            members = [n for n in lengths.tolist() if low < n <= edge]
            total, low = total + len(members) * max(members, default=0), edge
        return total

    chosen = choose_bucket_edges(lengths, 3, 64)
    assert len(chosen) == 3 and chosen[-1] == 64
    assert padded(chosen) == min(padded((i, j, 64)) for i in range(1, 63) for j in range(i + 1, 64))


def test_texts_that_no_term_reads_are_not_encoded() -> None:
    images: Captions = [
        [(Aspect.CAPTION, "a"), (Aspect.DIAGNOSIS, "nevus"), (Aspect.HISTORY, "h")],
        [(Aspect.CAPTION, "nevus"), (Aspect.DIAGNOSIS, "eczema")],
    ]
    plan = plan_texts(*arrays(images), 1, (Aspect.CAPTION,))
    assert strings_of(plan, images) == ["a", "nevus"]
    # the first image's diagnosis is the second one's caption: read, so owned by both; the others are as if empty
    assert plan.text_NK[:, :3].tolist() == [[0, 1, 2], [1, 2, 2]]
    assert plan_texts(*arrays(images), 1, ()).num_texts == 0
