"""A split of shards and an encoder to numbers: zero-shot classification and retrieval, each with its interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.schema import Sample
from pretrain.data.manifest import ShardedDataset
from pretrain.evaluation import retrieval, zero_shot
from pretrain.evaluation.embed import Encoder
from pretrain.evaluation.statistics import Estimate

TEMPLATES_PATH = Path(__file__).parents[2] / "configs" / "eval" / "templates.json"


@dataclass(frozen=True)
class Evaluation:
    classnames: tuple[str, ...]
    num_images: int  # all; retrieval uses them
    num_labelled: int  # those with a diagnosis among the classes; zero-shot uses them
    zero_shot: dict[str, Estimate]
    retrieval: dict[str, Estimate]
    chance: dict[str, float]  # by metric, where guessing has a value
    per_class_recall: dict[str, Estimate]
    confusion: NDArray[np.int64]
    top_predictions: dict[int, list[tuple[str, float]]]  # position in the split -> the three most probable classes


def diagnoses(*datasets: ShardedDataset) -> tuple[str, ...]:
    """The class names of some splits, sorted."""
    return tuple(sorted({name for data in datasets for name in data.manifest.samples_by_diagnosis} - {"unknown"}))


def evaluate(encoder: Encoder, data: ShardedDataset, classnames: Sequence[str], templates: Sequence[str]) -> Evaluation:
    """Raises InputError when no sample has one of the classes as its diagnosis."""
    samples = [data.read_sample(position) for position in range(len(data))]
    image_ND = encoder.encode_images(data)
    labelled = [position for position, sample in enumerate(samples) if sample.diagnosis in classnames]
    if not labelled:
        raise InputError(f"{data.directory}: no sample has one of the {len(classnames)} classes as its diagnosis")
    classifier = zero_shot.build_classifier(encoder.encode_texts, classnames, templates)
    labels = np.array([classnames.index(str(samples[position].diagnosis)) for position in labelled])
    groups = [samples[position].group or samples[position].key for position in labelled]
    features = image_ND[labelled]
    zero_shot_metrics = zero_shot.zero_shot_metrics(features, labels, classifier, encoder.logit_scale, groups)
    probabilities = zero_shot.probabilities(features, classifier, encoder.logit_scale)
    predicted = probabilities.argmax(1)
    retrieval_metrics, retrieval_chance = _retrieval(encoder, samples, image_ND)
    top = zero_shot.top_predictions(probabilities, classnames)
    return Evaluation(
        classnames=tuple(classnames),
        num_images=len(data),
        num_labelled=len(labelled),
        zero_shot=zero_shot_metrics,
        retrieval=retrieval_metrics,
        chance={**zero_shot.chance_levels(len(classnames)), **retrieval_chance},
        per_class_recall=zero_shot.per_class_recall(labels, predicted, classnames, groups),
        confusion=zero_shot.confusion_matrix(labels, predicted, len(classnames)),
        top_predictions={position: list(top[i]) for i, position in enumerate(labelled)},
    )


def _retrieval(
    encoder: Encoder, samples: Sequence[Sample], image_ND: NDArray[np.float32]
) -> tuple[dict[str, Estimate], dict[str, float]]:
    """Images against the distinct whole captions; images with an equal caption all count as right."""
    texts = sorted({sample.caption for sample in samples})
    position = {text: i for i, text in enumerate(texts)}
    owner_text = np.array([position[sample.caption] for sample in samples])
    metrics = retrieval.retrieval_metrics(image_ND, encoder.encode_texts(texts), owner_text)
    return metrics, retrieval.chance_levels(owner_text, len(texts))


def write_json(path: Path, evaluation: Evaluation) -> None:
    numbers = {
        "num_images": evaluation.num_images,
        "num_labelled": evaluation.num_labelled,
        "classnames": evaluation.classnames,
        "zero_shot": {name: asdict(value) for name, value in evaluation.zero_shot.items()},
        "retrieval": {name: asdict(value) for name, value in evaluation.retrieval.items()},
        "chance": evaluation.chance,
        "per_class_recall": {name: asdict(value) for name, value in evaluation.per_class_recall.items()},
        "confusion": evaluation.confusion.tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=1), encoding="utf-8")


def print_table(evaluation: Evaluation, before: Evaluation | None = None) -> None:
    """One line a metric: its value with the interval, before training too where given, and what guessing gives."""
    columns = ["before", "after"] if before else ["value"]
    print(f"{'metric':28}" + "".join(f"{name:>10} {'95 % interval':17}" for name in columns) + "  chance")
    for part in ("zero_shot", "retrieval"):
        earlier = getattr(before, part) if before else {}
        for name, value in getattr(evaluation, part).items():
            chance = evaluation.chance.get(name)
            shown = "" if chance is None else f"{chance:8.3f}"
            print(f"{name:28}" + "".join(_cell(e) for e in ([earlier[name]] if before else []) + [value]) + shown)


def _cell(estimate: Estimate) -> str:
    return f"{estimate.value:10.3f} " + f"[{estimate.low:.3f}, {estimate.high:.3f}]".ljust(17)
