"""Comparisons of real evaluation folders: two tiny models with random weights on sets of noise, and made-up tables."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from data_prep.errors import InputError
from pretrain.evaluation.comparison.compare import Comparison, Entry, compare
from pretrain.evaluation.config import ConceptsTask, ZeroShotTask
from pretrain.evaluation.interfaces import Row
from pretrain.evaluation.results import (
    DatasetInfo,
    EvaluationResult,
    Metric,
    ModelInfo,
    TaskResult,
    write_result,
)
from pretrain.evaluation.tables import write_table
from pretrain.evaluation.tasks import concepts, zero_shot
from tests.unit.evaluation.open_clip_set import make_input, make_rows, renamed, write_evaluation


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Path]:
    """Zero-shot of three models on two sets, "many" with five classes and "two" with two."""
    root, found = tmp_path_factory.mktemp("evaluations"), {}
    for name, classnames in (
        ("many", ("melanoma", "nevus", "basal cell carcinoma", "psoriasis", "tinea corporis")),
        ("two", ("benign lesion", "melanoma")),
    ):
        for model in range(3):
            rows = make_rows(60, classnames)
            given = renamed(make_input(root / name / str(model), rows, classnames, model_seed=model), name, name)
            found[model, name] = write_evaluation(given, zero_shot.run(ZeroShotTask(), given))
    return found


@pytest.fixture(scope="module")
def comparison(folders: dict[tuple[int, str], Path]) -> Comparison:
    return compare(list(folders.values()), num_resamples=100, num_permutations=100)


def entry_of(comparison: Comparison, model: str, dataset: str) -> Entry:
    (found,) = [entry for entry in comparison.entries if (entry.model, entry.dataset) == (model, dataset)]
    return found


def test_values_and_ranks(comparison: Comparison) -> None:
    assert [model.label for model in comparison.models] == ["tiny 0", "tiny 1", "tiny 2"]
    assert [data.name for data in comparison.datasets] == ["many", "two"] and len(comparison.entries) == 6
    (ranks,) = comparison.ranks
    assert ranks.metrics == {"many": "balanced_accuracy", "two": "auroc"}
    for dataset, metric in ranks.metrics.items():
        values = {}
        for model in comparison.models:
            entry = entry_of(comparison, model.label, dataset)
            values[model.label] = entry.result.tasks[0].metrics[metric].value
        assert sorted(values, key=lambda label: -values[label]) == sorted(
            values, key=lambda label: ranks.ranks[label][dataset]
        )
    assert ranks.mean_rank == pytest.approx({m: np.mean(list(of.values())) for m, of in ranks.ranks.items()})
    assert list(ranks.mean_rank.values()) == sorted(ranks.mean_rank.values())
    assert ranks.critical_difference == pytest.approx(2.343, abs=0.01)  # q 2.343 x sqrt(3 x 4 / (6 x 2))
    assert ranks.not_different == (tuple(ranks.mean_rank),)


def test_differences_are_of_the_values(comparison: Comparison) -> None:
    pairs = [("tiny 0", "tiny 1"), ("tiny 0", "tiny 2"), ("tiny 1", "tiny 2")]
    assert [(d.dataset, d.first, d.second) for d in comparison.differences] == [
        (dataset, *pair) for dataset in ("many", "two") for pair in pairs
    ]
    for difference in comparison.differences:
        values = []
        for label in (difference.first, difference.second):
            entry = entry_of(comparison, label, difference.dataset)
            values.append(entry.result.tasks[0].metrics[difference.metric].value)
        found = difference.value
        assert found.value == pytest.approx(values[1] - values[0], abs=1e-9)
        assert found.low <= found.value <= found.high and found.n == 60 and difference.num_patients == 30
        assert difference.better == (difference.second if values[1] > values[0] else difference.first)
        assert difference.p.permutation <= difference.p.holm <= 6 * difference.p.permutation
        assert 0 < difference.p.bootstrap <= 1
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison


def test_hostile_class_names_come_back_as_they_were(tmp_path: Path) -> None:
    classnames = ("key", 'a, "quoted"\r\nname', "=1+1", "<script>")
    folders = []
    for model in range(2):
        given = make_input(tmp_path / str(model), make_rows(40, classnames), classnames, model_seed=model)
        folders.append(write_evaluation(given, zero_shot.run(ZeroShotTask(), given)))
    found = compare([folder / "evaluation.json" for folder in folders], num_resamples=20, num_permutations=20)
    assert len(found.differences) == 1 and found.differences[0].value.n == 40


def test_order_of_the_folders_changes_only_signs(folders: dict[tuple[int, str], Path]) -> None:
    forth, back = (
        compare([folders[a, "many"], folders[b, "many"]], num_resamples=50, num_permutations=50)
        for a, b in ((0, 1), (1, 0))
    )
    assert back.differences[0].value.value == pytest.approx(-float(forth.differences[0].value.value))
    assert back.differences[0].better == forth.differences[0].better
    assert forth.ranks == ()  # one set


def made_up(
    folder: Path, model: str, task: TaskResult | None = None, digest: str = "same", dataset: str = "set"
) -> Path:
    folder.mkdir(parents=True)
    write_result(
        folder,
        EvaluationResult(
            model=ModelInfo(name=model, kind="hub", digest=model, num_parameters=1, image_px=1, embed_dim=1),
            dataset=DatasetInfo(name=dataset, num_images=3, digest=digest),
            tasks=(task or made_up_task("concepts", "mean_auroc", 0.5),),
            seconds=1,
            created="",
            versions={},
        ),
    )
    return folder


def made_up_task(name: str, primary: str, value: float, **metrics: Metric) -> TaskResult:
    return TaskResult.model_validate(
        {"task": name, "primary": primary, "metrics": {primary: Metric(value=value, n=4), **metrics}}
    )


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one, other_set = made_up(tmp_path / "one", "a"), made_up(tmp_path / "two", "b", digest="other")
    with pytest.raises(InputError, match=r"one and .*two were evaluated on different sets called 'set'.*same data"):
        compare([one, other_set])
    with pytest.raises(InputError, match="two models or more"):
        compare([one])
    with pytest.raises(InputError, match="no two models were evaluated on the same set: a on set, b on elsewhere"):
        compare([one, made_up(tmp_path / "three", "b", dataset="elsewhere")])
    with pytest.raises(InputError, match="one model is there twice on one set"):
        compare([one, made_up(tmp_path / "four", "a"), made_up(tmp_path / "five", "b")])
    with pytest.raises(InputError, match="no such file"):
        compare([one, tmp_path / "nowhere"])


def test_a_task_without_a_table_for_it_is_noted(tmp_path: Path) -> None:
    tasks = [made_up_task("concepts", "mean_auroc", value) for value in (0.6, 0.7)]
    found = compare([made_up(tmp_path / name, name, task) for name, task in zip("ab", tasks, strict=True)])
    assert found.differences == () and "concepts: the tables do not hold what mean_auroc needs" in found.notes[0]


def multiple_choice(folder: Path, model: str, predicted: str, patients: str = "", value: float | None = None) -> Path:
    """Right answers are all 1."""
    share = predicted.count("1") / len(predicted)
    made_up(folder, model, made_up_task("multiple_choice", "accuracy", share if value is None else value))
    write_table(
        folder / "multiple_choice_answers.csv",
        ("key", "patient", "answer", "predicted"),
        [(f"q{i}", patients[i : i + 1], 1, "" if code == "-" else code) for i, code in enumerate(predicted)],
    )
    return folder


def test_multiple_choice_pairs_questions_by_key(tmp_path: Path) -> None:
    first = multiple_choice(tmp_path / "a", "a", "1100-210")
    second = multiple_choice(tmp_path / "b", "b", "11110111")
    (difference,) = compare([first, second]).differences
    assert difference.value.value == pytest.approx(4 / 8) and difference.better == "b"
    # a is never right alone, b four times: all four to one side, of 16 ways, or all to the other
    assert difference.p.is_exact and difference.p.permutation == pytest.approx(2 / 2**4)
    shuffled = multiple_choice(tmp_path / "c", "c", "11110111")
    lines = (shuffled / "multiple_choice_answers.csv").read_text().splitlines()
    (shuffled / "multiple_choice_answers.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    again = compare([first, shuffled]).differences[0]
    assert (again.value, again.p) == (difference.value, difference.p)


def test_patients_are_the_units(tmp_path: Path) -> None:
    first = multiple_choice(tmp_path / "a", "a", "00001111", "xxxxyyyy")
    second = multiple_choice(tmp_path / "b", "b", "11111111", "xxxxyyyy")
    (difference,) = compare([first, second]).differences
    assert difference.num_patients == 2 and difference.p.permutation == 1  # one patient alone proves nothing


def test_retrieval_pairs_queries_of_both_directions(tmp_path: Path) -> None:
    folders = []
    for model, ranks in (("a", ([1, 6, 2, 30], [1, 50])), ("b", ([1, 4, 2, 3], [11, 1]))):
        recalls = [np.mean([[rank <= k for rank in of] for k in (1, 5)]) for of in ranks]
        names = {f"image_to_text_recall@{k}": Metric(value=0, n=4) for k in (1, 5)}
        task = made_up_task("retrieval", "mean_recall", float(np.mean(recalls)), **names)
        folders.append(made_up(tmp_path / model, model, task))
        rows = [("image_to_text", f"{i}", "", rank) for i, rank in enumerate(ranks[0])]
        rows += [("text_to_image", f"{i}", "", rank) for i, rank in enumerate(ranks[1])]
        write_table(tmp_path / model / "retrieval_ranks.csv", ("direction", "key", "patient", "rank"), rows)
    (difference,) = compare(folders).differences
    # images: (1, 0, .5, 0) and (1, .5, .5, .5); texts: (1, 0) and (0, 1)
    assert difference.value.value == pytest.approx((0.625 - 0.375) / 2)
    assert difference.value.n == 6 and difference.num_patients == 6


def probe(folder: Path, model: str, amount: str, share: str, rows: list[tuple[int, str, str, str]]) -> Path:
    """rows: seed, key, label, predicted; balanced accuracy as scikit-learn computes it."""
    seeds = sorted({seed for seed, *_ in rows})
    values = [
        balanced_accuracy_score(*([row[column] for row in rows if row[0] == seed] for column in (2, 3)))
        for seed in seeds
    ]
    made_up(folder, model, made_up_task("probe", f"balanced_accuracy@{amount}", float(np.mean(values))))
    table = [(share, seed, key, None, label, predicted) for seed, key, label, predicted in rows]
    other = [("0.01", 0, "0", None, "nevus", "nevus")]  # of a smaller share, which is not compared
    write_table(
        folder / "probe_predictions.csv", ("share", "seed", "key", "patient", "label", "predicted"), other + table
    )
    return folder


@pytest.mark.parametrize(("amount", "share"), [("30%", "0.3"), ("100%", "1.0"), ("4_shots", "4 shots")])
def test_probe_is_a_mean_over_seeds(tmp_path: Path, amount: str, share: str) -> None:
    rng = np.random.default_rng(0)
    names, labels = np.array(["melanoma", "nevus", "psoriasis"]), rng.integers(3, size=30)
    folders = []
    for model, skill in (("a", 0.2), ("b", 0.8)):
        rows = [
            (seed, str(i), str(names[labels[i]]), str(names[labels[i] if rng.random() < skill else rng.integers(3)]))
            for seed in range(3)
            for i in range(30)
        ]
        if model == "a":
            rows[0] = (*rows[0][:3], "a class that no image has")
        folders.append(probe(tmp_path / model, model, amount, share, rows))
    (difference,) = compare(folders).differences
    assert difference.num_patients == 30 and difference.value.n == 90  # an image is one unit, whatever the seeds
    assert difference.better == "b" and difference.p.permutation < 0.01 and difference.p.bootstrap < 0.01


def test_auroc_of_two_classes_counts_ties_as_one_half(tmp_path: Path) -> None:
    names = ("benign lesion", "melanoma")
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 1])
    folders, values = [], []
    for model, scores in (("a", [0.2, 0.5, 0.5, 0.5, 0.2, 0.9, 0.9, 0.9]), ("b", [0.1, 0.1, 0.5, 0.5, 0.5, 1, 0.9, 1])):
        values.append(float(roc_auc_score(labels, scores)))
        folders.append(made_up(tmp_path / model, model, made_up_task("zero_shot", "auroc", values[-1])))
        rows = [
            (str(i), None, names[labels[i]], names[score > 0.5], 1 - score, score) for i, score in enumerate(scores)
        ]
        write_table(folders[-1] / "zero_shot_probabilities.csv", ("key", "patient", "label", "predicted", *names), rows)
    (difference,) = compare(folders).differences
    assert difference.value.value == pytest.approx(values[1] - values[0], abs=1e-12)


def with_concepts(num_images: int) -> list[Row]:
    """Ulcer is known of all images and rare; scale of every second one; crust is shown by all that are annotated."""
    rng = np.random.default_rng(5)
    rows = []
    for number, row in enumerate(make_rows(num_images)):
        concepts = {"ulcer": bool(rng.random() < 0.2)}
        if number % 2:
            concepts |= {"scale": bool(rng.random() < 0.5), "crust": True}
        rows.append(replace(row, concepts=concepts))
    return rows


def test_concepts_are_compared_by_the_ranks_of_their_scores(tmp_path: Path) -> None:
    rows, folders, values = with_concepts(80), [], []
    for model in range(2):
        given = make_input(tmp_path / str(model), rows, model_seed=model)
        result = concepts.run(ConceptsTask(), given)
        folders.append(write_evaluation(given, result))
        with (given.out_dir / "concept_scores.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        aurocs = []
        for name in ("ulcer", "scale"):
            known = [line for line in table if line[f"{name}:present"]]
            aurocs.append(roc_auc_score([int(r[f"{name}:present"]) for r in known], [float(r[name]) for r in known]))
        values.append(float(np.mean(aurocs)))
        assert result.metrics["mean_auroc"].value == pytest.approx(values[-1], abs=1e-12)
    found = compare(folders, num_resamples=200, num_permutations=200)
    (difference,) = found.differences
    assert (difference.task, difference.metric, difference.num_patients) == ("concepts", "mean_auroc", 40)
    assert difference.value.value == pytest.approx(values[1] - values[0], abs=1e-9)
    assert difference.value.low < difference.value.value < difference.value.high and found.notes == ()
    assert 0 < difference.p.permutation <= 1

    copy = shutil.copytree(folders[0], tmp_path / "copy")  # the same scores by another model: nothing differs
    text = (copy / "evaluation.json").read_text().replace('"tiny 0"', '"twin"').replace("0" * 16, "f" * 16)
    (copy / "evaluation.json").write_text(text)
    (same,) = compare([folders[0], copy], num_resamples=50, num_permutations=50).differences
    assert same.value.value == 0 and same.p.permutation == 1 and same.better is None

    path = copy / "concept_scores.csv"
    path.write_text(path.read_text().replace(":present", ":shown"))
    with pytest.raises(InputError, match="does not say which image shows which concept; evaluate again"):
        compare([folders[0], copy])


def test_no_interval_where_one_patient_shows_the_concept(tmp_path: Path) -> None:
    rows = [replace(row, concepts={"ulcer": number < 8}) for number, row in enumerate(make_rows(60))]
    rows = [replace(row, patient="one") if number < 8 else row for number, row in enumerate(rows)]
    folders = []
    for model in range(2):
        given = make_input(tmp_path / str(model), rows, model_seed=model)
        result = concepts.run(ConceptsTask(), given)
        assert result.metrics["mean_auroc"].low is None
        folders.append(write_evaluation(given, result))
    (difference,) = compare(folders, num_resamples=50, num_permutations=50).differences
    assert difference.value.value is not None and difference.value.low is None
    assert difference.p.bootstrap is None and difference.p.permutation is not None


def test_other_synonyms_are_another_question(tmp_path: Path) -> None:
    rows, folders = with_concepts(60), []
    for model, word in enumerate(("ulcer", "a photograph of a dog")):
        terms = tmp_path / f"{model}" / "terms.json"
        terms.parent.mkdir()
        terms.write_text(json.dumps({"ulcer": [word], "scale": ["scale"]}))
        given = make_input(tmp_path / str(model), rows, model_seed=model)
        folders.append(write_evaluation(given, concepts.run(ConceptsTask(terms=terms), given)))
    found = compare(folders)
    assert found.differences == () and "different terms_digest" in found.notes[0]


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    good = multiple_choice(tmp_path / "good", "good", "1100")
    other = multiple_choice(tmp_path / "other", "other", "1110", value=0.9)
    with pytest.raises(InputError, match=r"gives accuracy 0.750000, evaluation.json beside it says 0.9"):
        compare([good, other])
    path = good / "multiple_choice_answers.csv"
    text = path.read_text()
    for content, message in (
        (text + "q0,,1,0\n", "a row is there twice"),
        (text + "q9,,1\n", "row 5 has 3 cells, the header 4"),
        (text.replace("answer", "right"), "expected key, patient, answer, predicted as its first columns"),
        (text.splitlines()[0], "no rows"),
        (text + '"q9,,1,0\n', "not a CSV table"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            compare([good, multiple_choice(tmp_path / message[:5] / "b", "b", "1110")])
    path.unlink()
    with pytest.raises(InputError, match="no such table"):
        compare([good, multiple_choice(tmp_path / "b", "b", "1110")])


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = []
    for digest in ("aaaaaaaa1", "bbbbbbbb2"):
        folder = made_up(tmp_path / digest, "same name")
        text = (folder / "evaluation.json").read_text().replace('"digest": "same name"', f'"digest": "{digest}"')
        (folder / "evaluation.json").write_text(text)
        folders.append(folder)
    assert [model.label for model in compare(folders).models] == ["same name (aaaaaa)", "same name (bbbbbb)"]
