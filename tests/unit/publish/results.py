"""An evaluation's result as `dermvlp evaluate` leaves it, made up for tests."""

from __future__ import annotations

from typing import Any

from pretrain.evaluation.results import (
    ByGroup,
    DatasetInfo,
    EvaluationResult,
    Leakage,
    Metric,
    ModelInfo,
    TaskResult,
)


def evaluation(name: str, model_name: str = "runs/mine", digest: str = "0" * 16, **changes: Any) -> EvaluationResult:
    """Zero-shot with an undefined metric, three skin tones, and an overlap of five images."""
    task = TaskResult(
        task="zero_shot",
        primary="balanced_accuracy",
        metrics={
            "balanced_accuracy": Metric(value=0.61, low=0.55, high=0.66, n=200, chance=1 / 7),
            "auroc": Metric(value=0.9, n=200),
            "top_3": Metric(value=None, n=0),
        },
        without_overlap={"balanced_accuracy": Metric(value=0.59, low=0.52, high=0.65, n=195)},
        by_group=(
            ByGroup(
                attribute="sex",
                metric="balanced_accuracy",
                groups={"female": Metric(value=0.6, n=90), "male": Metric(value=0.62, n=100)},
                num_unknown=10,
                worst="female",
                gap=Metric(value=0.02, n=190),
            ),
            ByGroup(
                attribute="fitzpatrick",
                metric="balanced_accuracy",
                groups={
                    "II": Metric(value=0.66, low=0.58, high=0.72, n=120),
                    "III": Metric(value=0.57, low=0.44, high=0.7, n=40),
                    "V": Metric(value=None, n=2),
                },
                num_unknown=38,
                min_group_size=20,
                worst="III",
                gap=Metric(value=0.09, low=-0.04, high=0.22, n=160),
            ),
        ),
        notes=("One class has | four images.",),
    )
    result = EvaluationResult(
        model=ModelInfo(name=model_name, kind="checkpoint", digest=digest, num_parameters=1, image_px=48, embed_dim=32),
        dataset=DatasetInfo(name=name, num_images=200, digest="1" * 16),
        tasks=(task,),
        leakage=Leakage(training_data="derm/train, ham/train", num_compared=200, num_same_pixels=3, num_near=2),
        seconds=1.0,
        created="2026-11-22T12:00:00Z",
        versions={"dermvlp": "0.1.0"},
    )
    return result.model_copy(update=changes)
