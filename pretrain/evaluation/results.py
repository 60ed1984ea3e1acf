"""The numbers of an evaluation as they stand in its evaluation.json: what report, comparison and model card read.

An evaluation is one model on one data set. Its folder:

    evaluation.json    an `EvaluationResult`
    report.html
    TABLES             a CSV for each task
    trained_on.csv     keys of the rows tested on whose image the training data holds, where it was compared
    rejected.jsonl     what could not be used, each with its reason
    features/          of the images, reused when the command is run again

Nothing here knows torch. NaN and infinity are None in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from data_prep.errors import InputError
from data_prep.files import write_atomically
from data_prep.schema import Frozen
from pretrain.evaluation.metrics.statistics import Estimate

RESULT_NAME = "evaluation.json"
TRAINED_ON_NAME = "trained_on.csv"
#: by task, with a row an image or query
TABLES = {
    "zero_shot": "zero_shot_probabilities.csv",  # key, patient, label, predicted, then a column a class
    "retrieval": "retrieval_ranks.csv",  # direction, key, patient, rank (from 1)
    "probe": "probe_predictions.csv",  # share, seed, key, patient, label, predicted
    "concepts": "concept_scores.csv",  # key, patient, a column a concept, then CONCEPT:present (1, 0, or empty)
    "multiple_choice": "multiple_choice_answers.csv",  # key, patient, answer, predicted, then a column an option
    "hierarchy": "hierarchy_predictions.csv",  # key, patient, label, predicted, tree_distance, then a column a level
}
#: as pages and cards head them, in their order
TASK_TITLES = {
    "zero_shot": "Zero-shot classification",
    "retrieval": "Retrieval",
    "probe": "Linear probe",
    "concepts": "Concept annotation",
    "multiple_choice": "Multiple choice",
    "hierarchy": "Hierarchical scoring",
}

Settings = dict[str, str | int | float | tuple[str, ...] | tuple[float, ...]]

#: A number, or None where it is undefined.
Number = Annotated[float | None, BeforeValidator(lambda value: None if value is None or value != value else value)]


class Metric(Frozen):
    """A value with its interval; `n` rows were used. None = undefined (a class without images, one group alone)."""

    value: Number
    low: Number = None
    high: Number = None
    n: int
    chance: Number = None  # what guessing gives; None where there is no such constant
    is_share: bool = True  # in [0, 1]; otherwise a quantity such as a median rank
    lower_is_better: bool = False

    @model_validator(mode="after")
    def _has_both_ends(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high: expected both or neither")
        return self

    @classmethod
    def of(
        cls, estimate: Estimate, chance: float | None = None, is_share: bool = True, lower_is_better: bool = False
    ) -> Metric:
        return cls(
            value=estimate.value,
            low=estimate.low,
            high=estimate.high,
            n=estimate.n,
            chance=chance,
            is_share=is_share,
            lower_is_better=lower_is_better,
        )


def digest_of(value: object) -> str:
    """12 hex digits of a value of JSON, for the settings of a task."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def undefined(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The same metrics of no row: what is left without the overlap where the training data holds every image."""
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    return {name: metric.model_copy(update=nothing) for name, metric in metrics.items()}


class ByGroup(Frozen):
    """One metric over the groups of one attribute: skin tone, sex, age band, site, source."""

    attribute: str  # "fitzpatrick", "sex", "age_band", "body_site", "source"
    metric: str
    groups: dict[str, Metric]  # in the attribute's own order: I, II, ... VI
    num_unknown: int  # rows without a value: in no group
    min_group_size: int | None = None  # smaller groups are shown, and are never the worst; None: not said
    worst: str | None  # among the groups with enough rows; None where fewer than two have
    gap: Metric | None  # best minus worst, with its own interval


class Confusion(Frozen):
    classnames: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]  # row = true class


class Curve(Frozen):
    """Points to draw. `kind` says how: ROC against the diagonal, reliability against the diagonal, efficiency log-x."""

    kind: Literal["roc", "reliability", "efficiency", "cumulative_match"]
    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _points_are_whole(self) -> Self:
        lengths = {len(self.x), len(self.y), *(len(bounds) for bounds in (self.low, self.high) if bounds)}
        if len(lengths) > 1:
            raise ValueError(f"x, y, low and high: expected equal lengths, got {sorted(lengths)}")
        return self


class TaskResult(Frozen):
    task: Literal["zero_shot", "retrieval", "probe", "concepts", "multiple_choice", "hierarchy"]
    primary: str  # the metric that models are ranked by
    metrics: dict[str, Metric]
    #: of the images that are not in the training data; empty: none was found
    without_overlap: dict[str, Metric] = Field(default_factory=dict)
    by_group: tuple[ByGroup, ...] = ()
    #: recall of a class, AUROC of a concept, accuracy of a kind of question
    per_class: dict[str, Metric] = Field(default_factory=dict)
    confusion: Confusion | None = None
    curves: tuple[Curve, ...] = ()
    settings: Settings = Field(default_factory=dict)  # what was computed, exactly
    notes: tuple[str, ...] = ()  # what a reader must know, plain sentences

    @model_validator(mode="after")
    def _is_ranked_by_a_metric(self) -> Self:
        if self.primary not in self.metrics:
            raise ValueError(f"primary: {self.primary} is none of the metrics")
        return self


class ModelInfo(Frozen):
    name: str  # as it was asked for
    kind: Literal["checkpoint", "export", "open_clip", "hub"]
    digest: str  # SHA-256 of its weights, image tower's config and preprocessing, first 16 hex digits
    num_parameters: int
    image_px: int
    embed_dim: int


class DatasetInfo(Frozen):
    name: str
    num_images: int
    num_rejected: int = 0
    licences: dict[str, int] = Field(default_factory=dict)  # images by licence
    digest: str  # of all that rows say, first 16 hex digits: equal only for the same evaluation set
    split: str | None = None  # DATASET-SPLIT where the rows are those of a prepared split, whatever the set is called
    notes: tuple[str, ...] = ()  # what a reader must know of it, plain sentences


class Leakage(Frozen):
    """Images that the training data holds too, of those that are tested on."""

    training_data: str
    num_compared: int
    num_same_pixels: int
    num_near: int  # copies in the sense of data_prep: rescaled, recompressed
    num_without_hash: int = 0  # could not be compared

    @property
    def num_overlap(self) -> int:
        return self.num_same_pixels + self.num_near


class EvaluationResult(Frozen):
    schema_version: Literal[1] = 1
    model: ModelInfo
    dataset: DatasetInfo
    tasks: tuple[TaskResult, ...] = Field(min_length=1)
    left_out: dict[str, str] = Field(default_factory=dict)  # task -> why the data set has nothing for it
    failed: dict[str, str] = Field(default_factory=dict)  # task -> the error that it ended in
    leakage: Leakage | None = None  # None: not compared
    confidence: float = 0.95
    seconds: float
    created: str  # ISO 8601, UTC
    versions: dict[str, str]  # dermvlp, torch, open_clip, scikit-learn, ...

    def task(self, name: str) -> TaskResult | None:
        return next((task for task in self.tasks if task.task == name), None)


def write_result(folder: Path, result: EvaluationResult) -> Path:
    """Whole or not at all."""
    path = folder / RESULT_NAME
    write_atomically(path, result.model_dump_json(indent=1).encode())
    return path


def read_result(path: Path) -> EvaluationResult:
    """Of a folder or of the file itself. Raises InputError, with the file and the field, for what is none."""
    path = path / RESULT_NAME if path.is_dir() else path
    try:
        return EvaluationResult.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `dermvlp evaluate` writes it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}; evaluate again with this version of dermvlp") from None
