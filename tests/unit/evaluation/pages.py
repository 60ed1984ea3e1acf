"""Pages for tests: a parser, and results with every part filled, with a name of the caller's wherever data have one."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from pretrain.evaluation.comparison.compare import ComparedModel, Comparison, Difference, Entry, PValues, Ranks
from pretrain.evaluation.reports.extras import (
    CaptionsOfImage,
    ImagesOfCaption,
    Neighbours,
    Picture,
    RankedImage,
    RankedText,
    ReportExtras,
    thumbnail,
)
from pretrain.evaluation.results import (
    ByGroup,
    Confusion,
    Curve,
    DatasetInfo,
    EvaluationResult,
    Leakage,
    Metric,
    ModelInfo,
    TaskResult,
)

#: Markup, a formula, a template, an underscore, characters that XML forbids, and one that turns the text around.
ATTACK = '_"><script>alert(1)</script><img src=x onerror=alert(2)></style></title>&amp;$x_1$ {{ 7 * 7 }}\x08\u202e'
#: As a page shows it.
SHOWN_ATTACK = ATTACK.replace("\x08", "\ufffd").replace("\u202e", "\ufffd")
VOID_TAGS = {"meta", "img", "source", "wbr", "circle", "line"}


class Page(HTMLParser):
    """Tags with attributes, texts by enclosing tag, and whether every tag was closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(text for _, text in self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], " ".join(data.split())))

    def texts_of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def uris(self) -> list[str]:
        """What a browser would fetch; a link within the page is none."""
        found = [attrs[key] for _, attrs in self.tags for key in ("src", "srcset", "href") if key in attrs]
        return [uri for uri in found if not uri.startswith("#")]


def picture(seed: int, label: str | None) -> Picture:
    pixels = np.random.default_rng(seed).integers(60, 220, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((200, 150)).save(buffer, "PNG")
    return Picture(thumbnail(buffer.getvalue()), label)


def metric(value: float | None, n: int = 457, **more: object) -> Metric:
    low, high = (None, None) if value is None else (value - 0.06, value + 0.05)
    return Metric.model_validate({"value": value, "low": low, "high": high, "n": n, **more})


def zero_shot_result(name: str, num_classes: int = 3) -> TaskResult:
    classnames = tuple(f"{name} {code}" for code in range(num_classes))
    counts = np.random.default_rng(0).integers(0, 9, (num_classes, num_classes)) + 30 * np.eye(num_classes, dtype=int)
    x = tuple(np.linspace(0, 1, 60).tolist())
    skin_tones = ("I", "II", "III", "IV", "V", "VI")
    groups = {tone: metric(0.8 - 0.05 * i, n=100 - 18 * i, chance=0.125) for i, tone in enumerate(skin_tones)}
    return TaskResult(
        task="zero_shot",
        primary="balanced_accuracy",
        metrics={
            "accuracy": metric(0.81, chance=0.125),
            "balanced_accuracy": metric(0.75, chance=0.125),
            "auroc": metric(None, chance=0.5),
        },
        without_overlap={"accuracy": metric(0.79, n=440), "balanced_accuracy": metric(0.72, n=440)},
        by_group=(
            ByGroup(
                attribute="fitzpatrick",
                metric="balanced_accuracy",
                groups=groups,
                num_unknown=31,
                min_group_size=20,
                worst="V",
                gap=metric(0.2),
            ),
            ByGroup(
                attribute=f"camera {name}",
                metric="accuracy",
                groups={f"{name} a": metric(0.7)},
                num_unknown=0,
                worst=None,
                gap=None,
            ),
        ),
        per_class={f"{name} {code}": metric(0.5, n=31) for code in range(num_classes)},
        confusion=Confusion(classnames=classnames, counts=tuple(tuple(row) for row in counts.tolist())),
        curves=(
            *(Curve(kind="roc", name=label, x=x, y=tuple(value**0.3 for value in x)) for label in classnames),
            Curve(kind="reliability", name=f"calibration {name}", x=(0.1, 0.5, 0.9), y=(0.2, 0.45, 0.8)),
        ),
        settings={"templates": (f"a photo of {name} {{}}", "another"), "logit_scale": 100.0},
        notes=(f"Few images of {name}.",),
    )


def probe_result(name: str, value: float = 0.7) -> TaskResult:
    shares = (0.01, 0.1, 0.3, 0.5, 1.0)
    y = tuple(value - 0.2 + 0.04 * i for i in range(5))
    band = {"low": tuple(v - 0.05 for v in y), "high": tuple(v + 0.04 for v in y)}
    return TaskResult(
        task="probe",
        primary="balanced_accuracy",
        metrics={"balanced_accuracy": metric(value)},
        without_overlap={"balanced_accuracy": metric(value - 0.03, n=440)},
        curves=(Curve(kind="efficiency", name="balanced_accuracy", x=shares, y=y, **band),),
        settings={"layer": name},
    )


def retrieval_result(name: str) -> TaskResult:
    return TaskResult(
        task="retrieval",
        primary="mean_recall",
        metrics={
            "mean_recall": metric(0.31, chance=0.05),
            "image_to_text_recall@10": metric(0.42, chance=0.06),
            "image_to_text_median_rank": Metric(
                value=12, low=9, high=15.5, n=457, is_share=False, lower_is_better=True
            ),
        },
        curves=(
            Curve(
                kind="cumulative_match",
                name=f"image to text {name}",
                x=(1, 5, 10, 50, 100),
                y=(0.1, 0.3, 0.4, 0.7, 0.9),
            ),
        ),
    )


def evaluation_result(name: str = "nevus", num_classes: int = 3) -> EvaluationResult:
    """Every part filled; `name` stands wherever a text of the data, of the model or of a task's author can."""
    return EvaluationResult(
        model=ModelInfo(
            name=f"ViT {name}",
            kind="open_clip",
            digest="0123456789abcdef",
            num_parameters=149_620_737,
            image_px=224,
            embed_dim=512,
        ),
        dataset=DatasetInfo(
            name=f"HAM {name}",
            num_images=457,
            num_rejected=3,
            licences={f"CC BY {name}": 450, "CC0": 7},
            digest="fedcba9876543210",
            notes=(f"Names of {name} were unified.",),
        ),
        tasks=(zero_shot_result(name, num_classes), retrieval_result(name), probe_result(name)),
        left_out={"concepts": f"no concepts of {name}"},
        leakage=Leakage(
            training_data=f"derm {name}", num_compared=400, num_same_pixels=12, num_near=5, num_without_hash=2
        ),
        seconds=73.2,
        created="2026-11-22T15:00:00+00:00",
        versions={"dermvlp": "0.1.0", f"torch {name}": "2.14.1"},
    )


def extras(name: str = "nevus") -> ReportExtras:
    labels = [f"{name} 1", f"{name} 2", None]
    images = tuple(RankedImage(picture(i, labels[i % 3]), 0.9 - i / 10, i + 1, i == 0) for i in range(5))
    texts = tuple(RankedText(f"{name} caption {i} " + "long " * 30, 0.5 - i / 10, 1 + 40 * i, i == 2) for i in range(3))
    return ReportExtras(
        neighbours=(Neighbours(picture(9, f"{name} 1"), images),),
        captions_of_images=(CaptionsOfImage(picture(8, None), texts),),
        images_of_captions=(ImagesOfCaption(f"{name} is asked for", images),),
        how_chosen="Examples are the first of each label.",
        candidates="Sought among 3 captions and 5 images.",
    )


def comparison(name: str = "nevus", num_models: int = 4) -> Comparison:
    models = [f"model {number} {name}" for number in range(num_models)]
    datasets = [f"HAM {name}", f"PAD {name}"]
    one = evaluation_result(name)
    entries = []
    for position, model in enumerate(models):
        for column, dataset in enumerate(datasets):
            value = 0.6 + 0.05 * position - 0.04 * column
            probe = probe_result(name, value)
            result = one.model_copy(update={"tasks": (probe, retrieval_result(name)) if column == 0 else (probe,)})
            entries.append(Entry(model=model, dataset=dataset, result=result))
    mean_rank = {model: 1.0 + place for place, model in enumerate(reversed(models))}
    value = Metric(value=0.031, low=0.012, high=0.05, n=457)
    p = PValues(bootstrap=0.002, permutation=0.0004, holm=0.012, is_exact=False)
    return Comparison(
        models=tuple(ComparedModel(label=model, info=one.model) for model in models),
        datasets=tuple(one.dataset.model_copy(update={"name": dataset}) for dataset in datasets),
        entries=tuple(entries),
        differences=(
            Difference(
                dataset=datasets[0],
                task="probe",
                metric="balanced_accuracy",
                first=models[0],
                second=models[1],
                value=value,
                p=p,
                num_patients=300,
                without_overlap=Metric(value=0.018, low=-0.004, high=0.041, n=440),
                p_without_overlap=PValues(bootstrap=0.09, permutation=0.11, holm=0.22, is_exact=False),
            ),
            Difference(
                dataset=datasets[1],
                task="probe",
                metric="balanced_accuracy",
                first=models[0],
                second=models[-1],
                value=Metric(value=-0.02, low=-0.11, high=0.07, n=457),
                p=PValues(bootstrap=None, permutation=0.6, holm=0.6, is_exact=True),
                num_patients=300,
            ),
        ),
        ranks=(
            Ranks(
                task="probe",
                metrics=dict.fromkeys(datasets, "balanced_accuracy"),
                ranks={model: dict.fromkeys(datasets, rank) for model, rank in mean_rank.items()},
                mean_rank=mean_rank,
                friedman_p=0.03,
                critical_difference=2.1,
                not_different=(tuple(list(mean_rank)[:3]), tuple(list(mean_rank)[1:])),
            ),
        ),
        confidence=0.95,
        notes=(f"{name} was left out.",),
    )
