"""Clinical concepts in images, from prompts alone: MONET (Kim et al., Nature Medicine 2024, Methods), MAKE after it.

A concept's score in an image is a softmax over two cosines, averaged over the prompts: that of a prompt naming the
concept (itself averaged over the concept's synonyms), and that of the same prompt naming none.

Shapes: N images, K concepts, P prompts, D joint width, R rows of a resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import expit

from data_prep.errors import InputError
from data_prep.labels.concepts import Concepts, read_terms
from pretrain.evaluation.encoding.features import embed_images
from pretrain.evaluation.interfaces import Encoder, Row
from pretrain.evaluation.metrics.statistics import Floats, Ints, check_features
from pretrain.evaluation.tables import write_table

TERMS_PATH = Path(__file__).parents[3] / "configs" / "eval" / "concepts.json"

#: With the concept, and without it. The six of MAKE, of which the first three are MONET's, to the letter: other words
#: give other numbers.
PROMPTS = (
    ("This is skin image of {}", "This is skin image"),
    ("This is dermatology image of {}", "This is dermatology image"),
    ("This is image of {}", "This is image"),
    ("A skin image of {}", "A skin image"),
    ("An image of {}, a skin condition.", "An image of a skin condition."),
    ("{}, a skin disorder, is shown in this image.", "a skin disorder is shown in this image."),
)
#: What the two cosines are multiplied with: both papers fix it, whatever scale a model has learnt. It matters, since
#: the prompts are averaged after the softmax.
SCALE = math.exp(4.5944)


@dataclass(frozen=True)
class ConceptPrompts:
    """Features of the prompts. `target_KPD` holds means over synonyms, so not unit vectors; `reference_PD` is unit."""

    concepts: tuple[str, ...]
    target_KPD: NDArray[np.float64]
    reference_PD: NDArray[np.float64]


def find_synonyms(concepts: Sequence[str], terms_path: Path) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """The words for each concept as a list of terms gives them, and the concepts that it lacks: these go by their name.

    A concept is looked up as data preparation does: a term, a synonym of one term alone, or either in the singular.
    Synonyms that the list repeats stay repeated, as they do in MAKE's means. Raises InputError for a malformed list.
    """
    terms, lookup = read_terms(terms_path), Concepts.load(terms_path)
    words: dict[str, tuple[str, ...]] = {}
    unlisted = []
    for concept in concepts:
        term = lookup.find(concept)
        words[concept] = tuple(terms[term]) if term is not None and terms[term] else (concept,)
        if term is None:
            unlisted.append(concept)
    return words, tuple(unlisted)


def encode_prompts(
    encode_texts: Callable[[list[str]], Floats], synonyms: Mapping[str, Sequence[str]]
) -> ConceptPrompts:
    """`synonyms`: concept -> its words. `encode_texts` gets each distinct text once, and returns unit features (T, D).

    Raises InputError for no concept, a concept without words, a blank word, or undefined features.
    """
    if not synonyms:
        raise InputError("concepts: expected at least one")
    for concept, words in synonyms.items():
        if not words or not all(word.strip() for word in words):
            raise InputError(f"concept {concept!r}: expected its synonyms, at least one and none blank; got {words!r}")
    targets = {
        concept: [[with_it.format(word) for word in words] for with_it, _ in PROMPTS]
        for concept, words in synonyms.items()
    }
    references = [without for _, without in PROMPTS]
    texts = list(dict.fromkeys([*references, *(t for prompts in targets.values() for same in prompts for t in same)]))
    text_TD = np.asarray(encode_texts(texts))
    check_features(text_TD, "text features")
    feature_of = dict(zip(texts, text_TD.astype(np.float64), strict=True))
    return ConceptPrompts(
        concepts=tuple(synonyms),
        # the mean of the cosines with the synonyms is the cosine with their mean
        target_KPD=np.array(
            [[np.mean([feature_of[text] for text in same], axis=0) for same in prompts] for prompts in targets.values()]
        ),
        reference_PD=np.array([feature_of[text] for text in references]),
    )


def concept_scores(image_ND: Floats, prompts: ConceptPrompts) -> NDArray[np.float64]:
    """(N, K) in [0, 1]: the mean over prompts of softmax(SCALE x [target cosine, reference cosine])[0].

    image_ND: unit vectors. Raises InputError for undefined features or another width than the prompts'.
    """
    check_features(image_ND, "image features")
    if image_ND.shape[1] != prompts.reference_PD.shape[1]:
        raise InputError(f"image features have width {image_ND.shape[1]}, the prompts' {prompts.reference_PD.shape[1]}")
    images = image_ND.astype(np.float64)
    score_NK = np.empty((len(images), len(prompts.concepts)))
    for k, target_PD in enumerate(prompts.target_KPD):
        # a softmax over two is the logistic function of their difference
        score_NK[:, k] = expit(SCALE * (images @ (target_PD - prompts.reference_PD).T)).mean(axis=1)
    return score_NK


def aurocs(present_NK: NDArray[np.int8], score_NK: NDArray[np.float64]) -> Callable[[Ints], NDArray[np.float64]]:
    """A function from row numbers, (R,), to the area under the ROC curve of each concept over these rows, (K,).

    Rows may be repeated, as in a bootstrap's draw. The scores are sorted here, once; a draw then counts. A tie
    counts one half; NaN for a concept that all or none of the rows show.

    present_NK: 1 = shows it, 0 = does not, -1 = not annotated, so left out of that concept alone.
    """
    num_rows, num_concepts = score_NK.shape
    # all concepts end to end: A (row, concept) pairs that do not show it, by score within a concept, and Q that do
    absent_A, present_Q, below_Q, up_to_Q = [], [], [], []
    start_K = np.zeros(num_concepts + 1, dtype=np.int64)
    for k in range(num_concepts):
        absent, present = (np.flatnonzero(present_NK[:, k] == kind) for kind in (0, 1))
        absent = absent[np.argsort(score_NK[absent, k])]
        in_order = score_NK[absent, k]
        below_Q.append(start_K[k] + np.searchsorted(in_order, score_NK[present, k], "left"))
        up_to_Q.append(start_K[k] + np.searchsorted(in_order, score_NK[present, k], "right"))
        absent_A.append(absent)
        present_Q.append(present)
        start_K[k + 1] = start_K[k] + len(absent)
    concept_Q = np.repeat(np.arange(num_concepts), [len(rows) for rows in present_Q])
    row_A, row_Q, below, up_to = (np.concatenate(parts) for parts in (absent_A, present_Q, below_Q, up_to_Q))

    def of_rows(rows_R: Ints) -> NDArray[np.float64]:
        times_N = np.bincount(rows_R, minlength=num_rows)
        num_before = np.concatenate([[0], np.cumsum(times_N[row_A])])
        # of a concept's absent rows those strictly below, and those up to an equal score: the mean has ties as one half
        twice_beaten_Q = num_before[below] + num_before[up_to] - 2 * num_before[start_K[concept_Q]]
        twice_ordered_K = np.bincount(concept_Q, times_N[row_Q] * twice_beaten_Q, minlength=num_concepts)
        num_pairs_K = np.bincount(concept_Q, times_N[row_Q], minlength=num_concepts) * np.diff(num_before[start_K])
        return np.where(num_pairs_K > 0, twice_ordered_K / np.maximum(2 * num_pairs_K, 1), np.nan)

    return of_rows


def annotate(
    encoder: Encoder, images: Iterable[str | Path | Image.Image], synonyms: Mapping[str, Sequence[str]]
) -> NDArray[np.float64]:
    """Scores of image files or pictures, (N, K) in the order of `synonyms`: {"ulcer": ["ulcer", "ulcerated"]}.

    Raises InputError as `embed_images` and `encode_prompts` do.
    """
    prompts = encode_prompts(encoder.encode_texts, synonyms)
    return concept_scores(embed_images(encoder, images), prompts)


def annotate_rows(
    encoder: Encoder, rows: Sequence[Row], image_ND: Floats, out_path: Path, terms_path: Path | None = None
) -> None:
    """A CSV of the scores of all concepts in a list of terms, a line a row: what `dermvlp annotate` writes.

    `image_ND`: joint features of the rows, in their order. `terms_path`: None = configs/eval/concepts.json.
    """
    terms_path = TERMS_PATH if terms_path is None else terms_path
    synonyms, _ = find_synonyms(tuple(read_terms(terms_path)), terms_path)
    prompts = encode_prompts(encoder.encode_texts, synonyms)
    write_scores(out_path, rows, prompts.concepts, concept_scores(image_ND, prompts))


def write_scores(
    path: Path,
    rows: Sequence[Row],
    concepts: Sequence[str],
    score_NK: NDArray[np.float64],
    present_NK: NDArray[np.int8] | None = None,
) -> None:
    """key, patient, a column a concept; where annotations are given, CONCEPT:present after them: 1, 0, or empty."""
    score_lists = score_NK.tolist()
    columns = ["key", "patient", *concepts]
    if present_NK is not None:
        columns += [f"{concept}:present" for concept in concepts]
        known = [[None if kind < 0 else kind for kind in kinds] for kinds in present_NK.tolist()]
        score_lists = [[*scores, *kinds] for scores, kinds in zip(score_lists, known, strict=True)]
    write_table(path, columns, ([r.key, r.patient, *cells] for r, cells in zip(rows, score_lists, strict=True)))
