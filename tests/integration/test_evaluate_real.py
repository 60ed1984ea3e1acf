"""Every task of the evaluation on real images and labels (DERMVLP_DATA), with a model that was trained for a moment.

Captions are templates of the real columns, concepts and questions stand-ins made of the labels. Each task's numbers are
computed again from its table of rows, by other means; then what all of them must keep to, whatever they say.
"""

from __future__ import annotations

import csv
import importlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from data_prep.config import PrepareConfig
from data_prep.config_file import load_config
from data_prep.prepare import prepare
from pretrain.cli import main
from pretrain.evaluation.config import TASKS, EvaluationSettings, HierarchyTask
from pretrain.evaluation.datasets import open_data
from pretrain.evaluation.encoding.encoders import load_encoder
from pretrain.evaluation.encoding.features import image_features
from pretrain.evaluation.interfaces import TaskInput
from pretrain.evaluation.leakage import overlap
from pretrain.evaluation.results import Metric, TaskResult

ROOT = Path(__file__).parents[2]
ONTOLOGY_PATH = ROOT / "configs" / "data" / "ontology_skin_tumours.json"
NUM_LEAKED = 12  # training images that the test part holds too

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is unset: needs the real images"),
]


@dataclass(frozen=True)
class Real:
    given: TaskInput
    results: dict[str, TaskResult]
    table: list[dict[str, str]]  # as the source has it

    def read(self, name: str) -> list[dict[str, str]]:
        with (self.given.out_dir / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Real:
    folder = tmp_path_factory.mktemp("real")
    table = _write_tables(folder)
    run_dir = _train(folder, tiny_model_path)
    data, encoder = open_data(_write_description(folder)), load_encoder(run_dir)
    settings = EvaluationSettings(num_resamples=100, num_workers=0)
    out_dir = folder / "evaluation"
    out_dir.mkdir()
    overlap_N, leakage = overlap(data, folder / "prepared" / "train")
    assert leakage.num_overlap >= NUM_LEAKED
    given = TaskInput(
        encoder=encoder,
        data=data,
        features=lambda layer: image_features(encoder, data, (layer,), folder / "features", settings).by_layer[layer],
        overlap_N=overlap_N,
        settings=settings,
        out_dir=out_dir,
    )
    return Real(given, {name: _run(name, given) for name in TASKS}, table)


def _run(name: str, given: TaskInput) -> TaskResult:
    module = importlib.import_module(f"pretrain.evaluation.tasks.{name}")
    task = HierarchyTask(ontology=ONTOLOGY_PATH) if name == "hierarchy" else TASKS[name]()
    assert (module.lacks(given.data, task) if name == "hierarchy" else module.lacks(given.data)) is None
    return module.run(task, given)


def _write_tables(folder: Path) -> list[dict[str, str]]:
    """all.csv to evaluate on, train.csv to train on. The test part holds some of the training images again."""
    source = Path(os.environ["DERMVLP_DATA"]) / "derm-images" / "metadata.csv"
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    train = [row for row in rows if row["split_hint"] == "train"][::12]
    test = [row for row in rows if row["split_hint"] == "val"][::2]
    leaked = [row | {"split_hint": "val", "group_id": f"LEAKED_{i}"} for i, row in enumerate(train[:NUM_LEAKED])]
    table = [row | _annotations(row) for row in (*train, *test, *leaked)]
    for name, kept in (("all.csv", table), ("train.csv", table[: len(train)])):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(kept)
    return table


def _annotations(row: dict[str, str]) -> dict[str, str]:
    labels = ["nevus", "melanoma", "basal cell carcinoma", "actinic keratosis", "benign keratosis", "vascular lesion"]
    rng = random.Random(row["filename"])
    options = [row["label"], *rng.sample([label for label in labels if label != row["label"]], 3)]
    rng.shuffle(options)
    pigmented = {"nevus": "1", "melanoma": "1", "actinic keratosis": "0", "basal cell carcinoma": "0"}
    return {
        "pigmented": pigmented.get(row["label"], ""),
        "scaly": "1" if row["label"] == "actinic keratosis" else "0",
        "question": "What is the diagnosis?",
        **{f"option_{letter}": option for letter, option in zip("ABCD", options, strict=True)},
        "answer": "ABCD"[options.index(row["label"])],
    }


def _write_description(folder: Path) -> Path:
    columns = {
        **{"image": "filename", "label": "label", "texts": ["caption_template"], "patient": "group_id"},
        **{"fitzpatrick": "fitzpatrick", "sex": "sex", "age": "age", "body_site": "site", "source": "source"},
        "concept_columns": {"pigmented": "pigmented", "scaly": "scale"},
        "split": "split_hint",
        "licence": "licence",
        "question": {
            "question": "question",
            "options": [f"option_{letter}" for letter in "ABCD"],
            "answer": "answer",
        },
    }
    description = {
        "name": "derm_images_few",
        "source": {
            "kind": "table",
            "table_path": str(folder / "all.csv"),
            "image_dir": str(Path(os.environ["DERMVLP_DATA"]) / "derm-images"),
            "columns": columns,
        },
        "splits": {"train": "train", "val": "test"},
    }
    path = folder / "derm_images_few.yaml"
    path.write_text(yaml.safe_dump(description))
    return path


def _train(folder: Path, tiny_model_path: Path) -> Path:
    overrides = [f"source.table_path={folder / 'train.csv'}", f"out_dir={folder / 'prepared'}"]
    prepare(load_config(ROOT / "configs" / "data" / "derm_images.yaml", overrides, PrepareConfig))
    config = {
        "run_dir": str(folder / "run"),
        "data": {"train_dir": str(folder / "prepared" / "train"), "num_workers": 0},
        "model": {"name": str(tiny_model_path)},
        "objectives": [{"kind": "clip"}],
        "global_batch_size": 16,
        "num_steps": 4,
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "engine": {"kind": "torch"},
        "checkpoint": {"every": 4},
        "trackers": [],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder / "run"


# ------------------------------------------------------------------------------- numbers again, from the tables of rows


def test_zero_shot(real: Real) -> None:
    result, lines = real.results["zero_shot"], real.read("zero_shot_probabilities.csv")
    label = [line["label"] for line in lines]
    predicted = [line["predicted"] for line in lines]
    classnames = list(lines[0])[4:]
    shares = np.array([[float(line[name]) for name in classnames] for line in lines])
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-9)
    assert [classnames[i] for i in shares.argmax(axis=1)] == predicted
    expected = {
        "accuracy": accuracy_score(label, predicted),
        "balanced_accuracy": balanced_accuracy_score(label, predicted),
        "weighted_f1": f1_score(label, predicted, average="weighted"),
        "auroc": np.mean(
            [roc_auc_score([own == name for own in label], shares[:, i]) for i, name in enumerate(classnames)]
        ),
    }
    assert {name: result.metrics[name].value for name in expected} == pytest.approx(expected, abs=1e-9)
    assert sorted(label) == sorted(row["label"] for row in real.table if row["split_hint"] == "val")


def test_retrieval(real: Real) -> None:
    result, lines = real.results["retrieval"], real.read("retrieval_ranks.csv")
    for direction in ("image_to_text", "text_to_image"):
        ranks = np.array([int(line["rank"]) for line in lines if line["direction"] == direction])
        assert ranks.min() >= 1
        for name, metric in result.metrics.items():
            if name.startswith(f"{direction}_recall@"):
                assert metric.value == pytest.approx(np.mean(ranks <= int(name.partition("@")[2])))
                assert metric.n == len(ranks)


def test_probe(real: Real) -> None:
    lines = real.read("probe_predictions.csv")
    train_keys = {row.key for row in real.given.data.rows if row.is_train}
    assert not train_keys & {line["key"] for line in lines}
    efficiency = [curve for curve in real.results["probe"].curves if curve.kind == "efficiency"]
    assert efficiency and efficiency[0].x[-1] in (1.0, 100.0)
    whole = [line for line in lines if float(line["share"]) == 1.0]
    own = balanced_accuracy_score([line["label"] for line in whole], [line["predicted"] for line in whole])
    assert any(value == pytest.approx(own, abs=0.02) for curve in efficiency for value in curve.y[-1:])


def test_concepts(real: Real) -> None:
    result, lines = real.results["concepts"], real.read("concept_scores.csv")
    concepts_of = {row.key: row.concepts or {} for row in real.given.data.rows}
    for concept, metric in result.per_class.items():
        known = [line for line in lines if concept in concepts_of[line["key"]]]
        truth = [concepts_of[line["key"]][concept] for line in known]
        assert metric.n == len(known)
        assert metric.value == pytest.approx(roc_auc_score(truth, [float(line[concept]) for line in known]), abs=1e-9)
    assert set(result.per_class) == {"pigmented", "scale"} and result.per_class["pigmented"].n < len(lines)
    mean = np.mean([metric.value for metric in result.per_class.values()])
    assert result.metrics["mean_auroc"].value == pytest.approx(mean, abs=1e-9)


def test_multiple_choice(real: Real) -> None:
    result, lines = real.results["multiple_choice"], real.read("multiple_choice_answers.csv")
    assert result.metrics["accuracy"].value == pytest.approx(
        np.mean([line["answer"] == line["predicted"] for line in lines])
    )
    assert result.metrics["accuracy"].chance == 0.25
    answers = ["ABCD".index(row["answer"]) for row in real.table if row["split_hint"] == "val"]
    assert sorted(int(line["answer"]) for line in lines) == sorted(answers)


def test_hierarchy(real: Real) -> None:
    """A level deeper is never easier; a wrong diagnosis is at a distance."""
    metrics = real.results["hierarchy"].metrics
    levels = [metrics[name].value for name in sorted(metrics) if "level" in name and metrics[name].value is not None]
    assert len(levels) >= 2 and levels == sorted(levels, reverse=True)


# -------------------------------------------------------------------------------- what every task must keep to


def _metrics(result: TaskResult) -> Iterator[tuple[str, Metric]]:
    for part in (result.metrics, result.without_overlap, result.per_class):
        yield from part.items()
    for by_group in result.by_group:
        yield from by_group.groups.items()
        if by_group.gap is not None:
            yield f"gap of {by_group.attribute}", by_group.gap


@pytest.mark.parametrize("name", list(TASKS))
def test_values_lie_in_their_intervals_and_shares_in_0_to_1(real: Real, name: str) -> None:
    result = real.results[name]
    assert result.metrics[result.primary].value is not None
    for metric_name, metric in _metrics(result):
        assert (metric.low is None) == (metric.high is None), metric_name
        if metric.low is not None and not metric_name.startswith("gap"):
            assert metric.low <= metric.value <= metric.high, metric_name
        if metric.is_share and metric.value is not None:
            assert 0 <= metric.value <= 1, metric_name
        assert 0 <= metric.n <= 2 * len(real.given.data.rows), metric_name


@pytest.mark.parametrize("name", list(TASKS))
def test_training_rows_never_count_and_the_overlap_is_taken_out(real: Real, name: str) -> None:
    result = real.results[name]
    num_test = sum(row["split_hint"] == "val" for row in real.table)
    assert result.metrics[result.primary].n <= num_test or name == "retrieval"
    assert set(result.without_overlap) == set(result.metrics)
    leaked = real.given.overlap_N
    assert leaked is not None
    taken_out = sum(
        bool(is_copy) for is_copy, row in zip(leaked, real.given.data.rows, strict=True) if not row.is_train
    )
    assert taken_out >= NUM_LEAKED
    if name in ("zero_shot", "multiple_choice"):
        assert result.without_overlap["accuracy"].n == num_test - taken_out


@pytest.mark.parametrize("name", ["zero_shot", "concepts", "multiple_choice", "probe"])
def test_groups_and_unknown_rows_are_all_rows(real: Real, name: str) -> None:
    by_group = real.results[name].by_group
    assert {"fitzpatrick", "sex", "age_band", "body_site", "source"} <= {each.attribute for each in by_group}
    for each in by_group:
        total = sum(metric.n for metric in each.groups.values()) + each.num_unknown
        assert total == real.results[name].metrics[each.metric].n, each.attribute
        if each.worst is not None:
            large = {group: m.value for group, m in each.groups.items() if m.n >= real.given.settings.min_group_size}
            assert large[each.worst] == min(value for value in large.values() if value is not None)


def test_nothing_of_the_source_is_in_the_outputs(real: Real) -> None:
    """No file name, no id of a patient or lesion, no folder."""
    secrets = {Path(row["filename"]).stem for row in real.table} | {row["group_id"] for row in real.table}
    secrets |= {row["orig_id"] for row in real.table} | {os.environ["DERMVLP_DATA"], "images/"}
    files = [path for path in real.given.out_dir.rglob("*") if path.is_file()]
    assert len(files) >= 5
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    texts |= {name: result.model_dump_json() for name, result in real.results.items()}
    for name, text in texts.items():
        assert not [secret for secret in secrets if secret and secret in text], name


@pytest.mark.parametrize("name", list(TASKS))
def test_a_second_run_says_the_same(real: Real, name: str, tmp_path: Path) -> None:
    again = _run(name, replace(real.given, out_dir=tmp_path))
    assert again == real.results[name]
    for path in tmp_path.rglob("*.csv"):
        assert path.read_bytes() == (real.given.out_dir / path.name).read_bytes()


@pytest.mark.parametrize("name", ["zero_shot", "concepts"])
def test_features_of_other_images_give_chance(real: Real, name: str, tmp_path: Path) -> None:
    """No label is looked at on the way: with images exchanged at random, the interval holds what guessing gives."""
    order = np.random.default_rng(0).permutation(len(real.given.data.rows))
    settings = real.given.settings.model_copy(update={"confidence": 0.999, "num_resamples": 400})
    given = replace(real.given, settings=settings, out_dir=tmp_path)
    result = _run(name, replace(given, features=lambda layer: np.asarray(real.given.features(layer))[order]))
    primary = result.metrics[result.primary]
    assert primary.chance is not None and primary.low <= primary.chance <= primary.high


@pytest.mark.parametrize("name", ["zero_shot", "retrieval", "concepts"])
def test_a_collapsed_encoder_is_no_better_than_chance(real: Real, name: str, tmp_path: Path) -> None:
    given = replace(real.given, out_dir=tmp_path)
    result = _run(name, replace(given, features=lambda layer: _first_of_all(real.given, layer)))
    primary = result.metrics[result.primary]
    assert primary.chance is not None and primary.value <= primary.chance + 1e-9


def _first_of_all(given: TaskInput, layer: str) -> NDArray[np.float32]:
    """The first image's features for all images."""
    image_ND = given.features(layer)
    return np.broadcast_to(image_ND[:1], image_ND.shape)
