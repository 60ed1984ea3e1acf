"""Which tasks an evaluation does, and how. Data sets have their own descriptions (datasets.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict

from pydantic import AfterValidator, Field, PositiveInt, field_validator, model_validator

from data_prep.schema import Frozen


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"expected each value once, got {list(values)}")
    return values


class ZeroShotTask(Frozen):
    """Class names in templates against images, as the peers do: features averaged, then normalised."""

    kind: Literal["zero_shot"] = "zero_shot"
    templates: str | None = None  # a list in configs/eval/templates.json; None: the data set's, or `dermatology`


class RetrievalTask(Frozen):
    kind: Literal["retrieval"] = "retrieval"
    ks: Annotated[tuple[PositiveInt, ...], AfterValidator(_distinct)] = (1, 5, 10, 50, 100)


class ProbeTask(Frozen):
    """Logistic regression on frozen features (of `layer`), at most 1,000 iterations, l2 cost D C / 100, no search."""

    kind: Literal["probe"] = "probe"
    layer: str = "tower"
    shares: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], AfterValidator(_distinct)] = (
        *(0.01, 0.1, 0.3, 0.5, 1.0),
    )
    num_seeds: PositiveInt = 5
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # by patient, where the data set has no training part
    max_iterations: PositiveInt = 1000
    shots: Annotated[
        tuple[PositiveInt, ...], AfterValidator(_distinct)
    ] = ()  # also trained with so many images a class: 1, 2, 4, 8, 16


class ConceptsTask(Frozen):
    """Target against reference prompts with synonyms (MONET, MAKE): AUROC of each concept."""

    kind: Literal["concepts"] = "concepts"
    terms: Path | None = None  # JSON, {concept: [synonym, ...]}; None: configs/eval/concepts.json
    min_images: PositiveInt = 5  # a concept counts in the mean where as many images show it, and as many do not


class MultipleChoiceTask(Frozen):
    """The option whose text is nearest to the image. Its text: the question with the option after it (Shen et al.,
    2021), or, where all questions ask for the diagnosis, the option alone in templates as in zero-shot."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    templates: str | None = None  # a list in configs/eval/templates.json; None: question and option


class HierarchyTask(Frozen):
    """The zero-shot prediction, scored over the ontology: right at level 1 ... 5, steps between the two nodes."""

    kind: Literal["hierarchy"] = "hierarchy"
    ontology: Path | None = None  # None: the paths that the rows carry
    templates: str | None = None  # as in zero-shot


TaskConfig = Annotated[
    ZeroShotTask | RetrievalTask | ProbeTask | ConceptsTask | MultipleChoiceTask | HierarchyTask,
    Field(discriminator="kind"),
]

#: in the order of the report
TASKS: dict[str, type[Frozen]] = {
    "zero_shot": ZeroShotTask,
    "retrieval": RetrievalTask,
    "probe": ProbeTask,
    "concepts": ConceptsTask,
    "multiple_choice": MultipleChoiceTask,
    "hierarchy": HierarchyTask,
}


class Resampling(TypedDict):
    num_resamples: int
    confidence: float
    seed: int


class EvaluationSettings(Frozen):
    """What all tasks share."""

    batch_size: PositiveInt = 64
    num_workers: Annotated[int, Field(ge=0)] = 2  # decode images
    num_resamples: PositiveInt = 1000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: Annotated[int, Field(ge=0)] = 0
    min_group_size: PositiveInt = 20  # smaller groups are shown, and are never called the worst

    @property
    def resampling(self) -> Resampling:
        """Arguments of `bootstrap_interval`."""
        return {"num_resamples": self.num_resamples, "confidence": self.confidence, "seed": self.seed}


class EvaluationConfig(Frozen):
    """`dermvlp evaluate --config FILE`. Tasks that a data set has nothing for are left out, and named."""

    tasks: tuple[TaskConfig, ...] = (
        ZeroShotTask(),
        RetrievalTask(),
        ProbeTask(),
        ConceptsTask(),
        MultipleChoiceTask(),
        HierarchyTask(),
    )
    settings: EvaluationSettings = EvaluationSettings()

    @field_validator("tasks", mode="before")
    @classmethod
    def _by_kind(cls, tasks: object) -> object:
        """Also as {kind: {option: value}}: these tasks alone."""
        if isinstance(tasks, dict):
            return [{"kind": kind, **(options or {})} for kind, options in tasks.items()]
        return tasks

    @model_validator(mode="after")
    def _each_task_once(self) -> Self:
        kinds = [task.kind for task in self.tasks]
        if not kinds or len(set(kinds)) < len(kinds):
            raise ValueError(f"tasks: expected at least one, each kind once; got {kinds}")
        return self
