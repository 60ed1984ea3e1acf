"""Evaluations on the model card: tables with intervals and by group, and the Hub's model-index."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from huggingface_hub import EvalResult

from pretrain.evaluation.metrics.groups import attribute_title
from pretrain.evaluation.results import TASK_TITLES, ByGroup, EvaluationResult, Metric, TaskResult
from pretrain.publish.markdown import bullets, plain, table
from pretrain.publish.run_facts import Validation

#: the Hub's names of tasks (https://huggingface.co/tasks) where it has one
_HUB_TASKS = {"zero_shot": "zero-shot-image-classification", "probe": "image-classification"}
#: by checkpoint.best_by
_MEASURES = {
    "loss": "the lowest loss",
    "retrieval": "the highest mean recall of retrieval",
    "zero_shot": "the highest balanced accuracy of zero-shot classification",
}
_SKIN_TONE = "fitzpatrick"


def results_section(evaluations: Sequence[EvaluationResult], validation: Validation | None = None) -> str:
    """Every evaluation with its intervals, its groups (skin tone first) and what its training data has in common.

    One of the split that the run was validated on says so before its numbers.
    """
    if not evaluations:
        return "None was given."
    return "\n\n".join(part for evaluation in evaluations for part in _evaluation(evaluation, validation))


def choice_by(validation: Validation, split: str) -> str:
    """What choosing by a split means for results on it, in one sentence."""
    chosen = ""
    if validation.keeps_best:
        which = "this one" if validation.is_best else "another than this one"
        chosen = f", and its best checkpoint, {which}, chosen there by {_MEASURES[validation.best_by]}"
    return (
        f"The run was validated every {validation.every:,} steps on {split}{chosen}: results on it are no independent "
        "test."
    )


def knows_skin_tone(evaluations: Iterable[EvaluationResult]) -> bool:
    """Whether the card shows some metric for two skin tones or more."""
    tasks = [task for evaluation in evaluations for task in evaluation.tasks]
    return any(
        groups.attribute == _SKIN_TONE and len(_large_groups(groups)) > 1 for task in tasks for groups in task.by_group
    )


def eval_results(evaluations: Iterable[EvaluationResult], validation: Validation | None = None) -> list[EvalResult]:
    """The defined metrics for `model-index`, each with its interval and number of rows as arguments."""
    results = []
    for evaluation in evaluations:
        chose = {"run_was_validated_on_it": True} if _is_of_split(evaluation, validation) else {}
        for task in evaluation.tasks:
            # what the Hub shows beside other models: without the images that were trained on, where there are any
            without = {"without_training_images": True} if task.without_overlap else {}
            for name, metric in (task.without_overlap or task.metrics).items():
                if metric.value is None:
                    continue
                results.append(
                    EvalResult(
                        task_type=_HUB_TASKS.get(task.task, task.task.replace("_", "-")),
                        task_name=TASK_TITLES[task.task],
                        dataset_type=_slug(evaluation.dataset.name),
                        dataset_name=evaluation.dataset.name,
                        metric_type=name,
                        metric_name=name.replace("_", " "),
                        metric_value=round(metric.value, 4),
                        metric_args=_arguments(metric, evaluation.confidence) | without | chose,
                    )
                )
    return results


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "data"


def _arguments(metric: Metric, confidence: float) -> dict[str, float | int]:
    arguments: dict[str, float | int] = {"n": metric.n}
    if metric.low is not None and metric.high is not None:
        arguments |= {"confidence": confidence, "low": round(metric.low, 4), "high": round(metric.high, 4)}
    return arguments


def _evaluation(evaluation: EvaluationResult, validation: Validation | None) -> list[str]:
    data = evaluation.dataset
    parts = [
        f"### {plain(data.name)}",
        f"{data.num_images:,} images; {evaluation.confidence:.0%} intervals in brackets.{_leakage(evaluation)}",
    ]
    if validation is not None and _is_of_split(evaluation, validation):
        parts.append(f"**{choice_by(validation, 'this set')}**")
    for task in evaluation.tasks:
        parts += _task(task)
    return parts


def _is_of_split(evaluation: EvaluationResult, validation: Validation | None) -> bool:
    split = None if validation is None else validation.split
    return split is not None and split in (evaluation.dataset.split, evaluation.dataset.name)


def _leakage(evaluation: EvaluationResult) -> str:
    leakage = evaluation.leakage
    if leakage is None:
        return " It was not compared with the training data: some of its images may have been trained on."
    found = f" Of the {leakage.num_compared:,} tested on {leakage.num_overlap:,} are in the training data too"
    if leakage.num_overlap:
        found += f" ({leakage.num_same_pixels:,} with the same pixels, {leakage.num_near:,} near copies)"
    unknown = f"; {leakage.num_without_hash:,} could not be compared" if leakage.num_without_hash else ""
    return f"{found}{unknown}."


def _task(task: TaskResult) -> list[str]:
    head = ["metric", "value", "n"]
    has_chance = any(metric.chance is not None for metric in task.metrics.values())
    head += ["chance"] if has_chance else []
    head += ["without images of the training data"] if task.without_overlap else []
    rows = []
    for name, metric in task.metrics.items():
        row = [plain(name), interval(metric), f"{metric.n:,}"]
        row += ([number(metric.chance)] if metric.chance is not None else [""]) if has_chance else []
        if task.without_overlap:
            other = task.without_overlap.get(name)
            row.append("" if other is None else interval(other))
        rows.append(row)
    parts = [f"#### {TASK_TITLES[task.task]}", table(head, rows)]
    parts += [bullets(plain(note) for note in task.notes)] if task.notes else []
    for groups in sorted(task.by_group, key=lambda groups: groups.attribute != _SKIN_TONE):
        parts += _groups(groups)
    return parts


def _groups(groups: ByGroup) -> list[str]:
    """Without the groups that are too small to say anything: with them, most of a card is tables of a few rows."""
    title = attribute_title(groups.attribute)
    shown = _large_groups(groups)
    rows = [(plain(name), interval(metric), f"{metric.n:,}") for name, metric in shown.items()]
    facts = []
    if groups.worst is not None:
        facts.append(f"worst: {plain(groups.worst)}")
    if groups.gap is not None:
        facts.append(f"gap {interval(groups.gap)}")
    facts.append(f"{groups.num_unknown:,} rows without a value")
    parts = [f"{plain(groups.metric)} by {plain(title)}: {'; '.join(facts)}."]
    parts += [table((plain(title), plain(groups.metric), "n"), rows)] if rows else []
    if num_small := len(groups.groups) - len(shown):
        parts.append(
            f"Left out here: {num_small:,} group(s) of fewer than {groups.min_group_size:,} rows; "
            "`evaluations/*.json` has them."
        )
    return parts


def _large_groups(groups: ByGroup) -> dict[str, Metric]:
    """All of them where the evaluation does not say how many rows a group needs."""
    return {name: metric for name, metric in groups.groups.items() if metric.n >= (groups.min_group_size or 0)}


def interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return number(metric.value)
    return f"{number(metric.value)} [{number(metric.low)}, {number(metric.high)}]"


def number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
