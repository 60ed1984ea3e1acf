"""Retrieval against a reference written with loops, with texts that belong to several images."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.errors import InputError
from pretrain.evaluation.methods.retrieval import (
    chance_levels,
    cumulative_match,
    resampling_groups,
    retrieval_metrics,
    retrieval_ranks,
)
from pretrain.evaluation.metrics.statistics import group_codes


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def noisy_pairs(
    num_images: int, num_texts: int, width: int = 24, noise: float = 0.6, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each text has at least one image; images lie around their text. (N, D), (U, D), (N,)."""
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(num_texts), rng.integers(num_texts, size=num_images - num_texts)])
    rng.shuffle(owner)
    texts = unit(rng.normal(size=(num_texts, width)))
    return unit(texts[owner] + noise * rng.normal(size=(num_images, width))), texts, owner


def loop_ranks(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> tuple[list[int], list[int]]:
    """Places by sorting: right items after wrong ones of equal similarity."""
    image_rank = []
    for i, image in enumerate(images):
        order = sorted(range(len(texts)), key=lambda u: (-round(float(image @ texts[u]), 12), u == owner[i]))
        image_rank.append(next(place for place, u in enumerate(order) if u == owner[i]))
    text_rank = []
    for u, text in enumerate(texts):
        order = sorted(range(len(images)), key=lambda i: (-round(float(images[i] @ text), 12), owner[i] == u))
        text_rank.append(next((place for place, i in enumerate(order) if owner[i] == u), -1))
    return image_rank, text_rank


@pytest.mark.parametrize(("num_images", "num_texts"), [(40, 40), (90, 25), (12, 1)])
def test_ranks_and_recalls_equal_the_loops(num_images: int, num_texts: int) -> None:
    images, texts, owner = noisy_pairs(num_images, num_texts, noise=0.8)
    expected_image, expected_text = loop_ranks(images, texts, owner)
    image_rank, text_rank = retrieval_ranks(images, texts, owner, chunk_size=7)
    assert image_rank.tolist() == expected_image
    assert text_rank.tolist() == expected_text
    metrics = retrieval_metrics(images, texts, owner, num_resamples=20, ks=(1, 5, 10))
    recalls = []
    for name, ranks in (("image_to_text", expected_image), ("text_to_image", expected_text)):
        for k in (1, 5, 10):
            recalls.append(sum(rank < k for rank in ranks) / len(ranks))
            assert metrics[f"{name}_recall@{k}"].value == pytest.approx(recalls[-1])
            assert metrics[f"{name}_recall@{k}"].n == len(ranks)
        assert metrics[f"{name}_median_rank"].value == np.median(ranks) + 1
    assert metrics["mean_recall"].value == pytest.approx(np.mean(recalls))
    assert num_texts == 1 or 0 < recalls[0] < 1  # otherwise the comparison shows nothing


def test_any_owner_is_a_right_answer() -> None:
    texts = np.eye(3)
    images = unit(np.array([[1, 0, 0.1], [0, 0.1, 1], [0.1, 1, 0], [0, 0, 1]]))
    owner = np.array([0, 0, 1, 2])  # image 1 shows text 2 but belongs to text 0, which image 0 finds
    image_rank, text_rank = retrieval_ranks(images, texts, owner)
    assert image_rank.tolist() == [0, 2, 0, 0]
    assert text_rank.tolist() == [0, 0, 0]


def test_ties_count_against_the_model() -> None:
    """A collapsed encoder finds nothing below the number of candidates."""
    collapsed = np.tile(unit(np.ones((1, 8))), (30, 1))
    metrics = retrieval_metrics(collapsed, collapsed, np.arange(30), num_resamples=20, ks=(1, 5, 10))
    assert metrics["mean_recall"].value == 0
    assert metrics["image_to_text_median_rank"].value == 30
    # repeated images under different texts tie exactly, in whichever chunk they fall
    images, texts, owner = noisy_pairs(64, 64, noise=0.1)
    doubled, owner = np.vstack([images, images]), np.concatenate([owner, np.roll(owner, 1)])
    for chunk_size in (1, 5, 64, 128):
        _, text_rank = retrieval_ranks(doubled, texts, owner, chunk_size=chunk_size)
        assert (text_rank >= 1).all()


def test_chunks_do_not_change_the_ranks() -> None:
    images, texts, owner = noisy_pairs(3000, 3000, width=48, noise=0.5)
    whole = retrieval_ranks(images.astype(np.float32), texts.astype(np.float32), owner, chunk_size=3000)
    chunked = retrieval_ranks(images.astype(np.float32), texts.astype(np.float32), owner, chunk_size=257)
    assert (whole[0] == chunked[0]).all() and (whole[1] == chunked[1]).all()
    assert 0.05 < (whole[0] == 0).mean() < 0.95


def test_fewer_candidates_than_k() -> None:
    images, texts, owner = noisy_pairs(6, 3, noise=3.0)
    metrics = retrieval_metrics(images, texts, owner, num_resamples=20, ks=(1, 5, 10))
    assert metrics["image_to_text_recall@5"].value == 1 and metrics["text_to_image_recall@10"].value == 1
    assert chance_levels(owner, 3)["image_to_text_recall@5"] == 1
    assert retrieval_metrics(images, texts, owner, ks=(2,), num_resamples=5).keys() == {
        "image_to_text_recall@2",
        "image_to_text_median_rank",
        "text_to_image_recall@2",
        "text_to_image_median_rank",
        "mean_recall",
    }


def test_a_text_without_images_distracts_but_asks_nothing() -> None:
    images, texts, owner = noisy_pairs(20, 20, noise=0.01)
    distracted = np.vstack([texts, images[:1]])  # the new text is exactly image 0
    image_rank, text_rank = retrieval_ranks(images, distracted, owner)
    assert image_rank.tolist() == [1] + [0] * 19
    assert text_rank.tolist() == [0] * 20 + [-1]
    assert (
        retrieval_metrics(images, distracted, owner, num_resamples=20, ks=(1, 5, 10))["text_to_image_recall@1"].n == 20
    )


def test_chance_is_what_random_features_reach() -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(30), [1, 2, 3] * 10)
    levels = chance_levels(owner, 30)
    sums: dict[str, float] = dict.fromkeys(levels, 0.0)
    for _ in range(60):
        images, texts = unit(rng.normal(size=(60, 64))), unit(rng.normal(size=(30, 64)))
        metrics = retrieval_metrics(images, texts, owner, num_resamples=1, ks=(1, 5, 10))
        for name in sums:
            sums[name] += metrics[name].value / 60
    assert sums == pytest.approx(levels, abs=0.03)
    assert levels["image_to_text_recall@1"] == pytest.approx(1 / 30)
    # one, two and three right ones among 60, one drawn
    assert levels["text_to_image_recall@1"] == pytest.approx(2 / 60)


def test_interval_follows_the_texts_not_the_images() -> None:
    """With 200 images of 8 texts, right and wrong by text, the interval is that of about 8 independent answers."""
    rng = np.random.default_rng(0)
    texts = np.eye(8, 16)
    owner = np.repeat(np.arange(8), 25)
    shown = np.where(owner < 4, owner, (owner + 1) % 8)  # images of half of the texts look like the next text
    images = unit(texts[shown] + 0.01 * rng.normal(size=(200, 16)))
    recall = retrieval_metrics(images, texts, owner, ks=(1, 5, 10))["image_to_text_recall@1"]
    assert recall.value == 0.5 and recall.n == 200
    assert recall.high - recall.low > 0.5  # images as independent: 0.14


def test_unusable_arrays_are_refused() -> None:
    images, texts, owner = noisy_pairs(10, 10)
    for arguments, message in (
        ((images, texts, owner + 1), r"owner_text: row \d+ has 10, outside 0 \.\.\. 9"),
        ((images, texts, owner[:5]), "owner_text: expected 10 integers"),
        ((images * np.nan, texts, owner), "image features: 10 rows .* not finite"),
        ((images, texts * 3, owner), "text features: 10 rows .* not unit vectors"),
        ((images, unit(texts[:, :5]), owner), "image features have width 24, text features 5"),
    ):
        with pytest.raises(InputError, match=message):
            retrieval_ranks(*arguments)
    with pytest.raises(InputError, match="chunk_size"):
        retrieval_ranks(images, texts, owner, chunk_size=0)


def test_chance_with_several_texts_an_image() -> None:
    """Hypergeometric in both directions, and a text that no image has is a candidate."""
    pairs = np.array([[0, 0], [0, 1], [1, 2], [2, 2], [3, 3]])
    levels = chance_levels(pairs, num_texts=6, ks=(1, 2), num_images=4)
    assert levels["image_to_text_recall@1"] == pytest.approx((2 / 6 + 3 / 6) / 4)
    assert levels["image_to_text_recall@2"] == pytest.approx(((1 - 4 * 3 / 30) + 3 * 2 / 6) / 4)
    assert levels["text_to_image_recall@1"] == pytest.approx((1 + 1 + 2 + 1) / 4 / 4)
    large = chance_levels(np.arange(100_000), 100_000, ks=(100,))  # binomials of 360 digits
    assert large["mean_recall"] == pytest.approx(0.001)


def test_groups_are_what_captions_and_patients_link() -> None:
    pairs = np.array([[0, 0], [1, 0], [2, 1], [3, 2], [4, 3], [5, 4]])
    by_caption = resampling_groups(pairs, 6, 5)
    assert group_codes(by_caption.image_N).tolist() == [0, 0, 1, 2, 3, 4]
    assert by_caption.text_U.tolist() == by_caption.image_N[[0, 2, 3, 4, 5]].tolist()
    linked = resampling_groups(pairs, 6, 5, ["a", "b", "b", None, "c", "c"])
    assert group_codes(linked.image_N).tolist() == [0, 0, 0, 1, 2, 2] and linked.is_linked
    # a patient of four images joins more than half of them
    apart = resampling_groups(pairs, 6, 5, ["a", "b", "b", "b", "b", "c"])
    assert group_codes(apart.image_N).tolist() == [0, 1, 1, 1, 1, 2] and not apart.is_linked
    assert len({*apart.image_N, *apart.text_U}) == 3 + 5


def test_an_interval_exists_where_few_texts_link_everything() -> None:
    """Texts are groups of their own then; each resample must still hold one."""
    images, texts, _ = noisy_pairs(40, 2, noise=1.0)
    metrics = retrieval_metrics(images, texts, np.repeat([0, 1], [30, 10]), ks=(1,), num_resamples=200)
    assert 0 <= metrics["mean_recall"].low < metrics["mean_recall"].high <= 1


def test_cumulative_match_is_recall() -> None:
    rank = np.array([0, 3, -1, 3, 999, 41])
    k, recall = cumulative_match(rank, 1000)
    assert k[0] == 1 and k[-1] == 1000 and len(k) <= 100 and (np.diff(k) > 0).all()
    assert recall.tolist() == [sum(0 <= r < each for r in rank) / 5 for each in k]
