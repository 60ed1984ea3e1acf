"""The page of several models: the best one marked, differences named only where they are sure, one chart for all."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from pretrain.evaluation.comparison.compare import Comparison
from pretrain.evaluation.reports.comparison import write_comparison
from pretrain.evaluation.results import Metric
from tests.unit.evaluation.pages import ATTACK, Page, comparison


def rendered(tmp_path: Path, given: Comparison) -> str:
    return write_comparison(tmp_path / "new folder" / "comparison.html", given).read_text(encoding="utf-8")


def drawings(page: Page) -> list[str]:
    return [base64.b64decode(uri.partition(",")[2]).decode() for uri in page.uris()]


def test_texts_of_the_data_cannot_become_markup(tmp_path: Path) -> None:
    plain, attacked = Page(rendered(tmp_path, comparison())), Page(rendered(tmp_path, comparison(ATTACK)))
    assert "script" not in [tag for tag, _ in attacked.tags]
    assert [tag for tag, _ in attacked.tags if tag != "wbr"] == [tag for tag, _ in plain.tags if tag != "wbr"]


def test_values_the_best_and_mean_ranks(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, comparison()))
    assert page.texts_of("h1") == ["4 models on 2 data sets"]
    assert page.texts_of("h2") == ["Retrieval", "Linear probe", "Data efficiency", "Models and data"]
    probe = page.text[page.text.index("Linear probe Value") :]
    assert re.search(
        r"model 3 nevus best 0\.750 0\.690 to 0\.800 without overlap 0\.720 0\.660 to 0\.770 n = 440 best 0\.710 "
        r"0\.650 to 0\.760 without overlap 0\.680 0\.620 to 0\.730 n = 440 1\.00 (Ranks|model)",
        probe,
    )
    assert re.search(
        r"model 0 nevus 0\.600 0\.540 to 0\.650 without overlap 0\.570 0\.510 to 0\.620 n = 440 0\.560", probe
    )
    assert "Without overlap: of the images that are not in that model's training data." in probe
    assert "run from 0.4 to 0.8" in probe
    assert "Friedman" in probe and "p = 0.030" in probe
    assert "nearer than 2.10" in probe
    assert "model 3 nevus, model 2 nevus and model 1 nevus; model 2 nevus, model 1 nevus and model 0 nevus" in probe


def test_equal_values_are_all_best(tmp_path: Path) -> None:
    text = Page(rendered(tmp_path, comparison())).text
    retrieval = text[text.index("Retrieval Value") : text.index("Linear probe Value")]
    assert retrieval.count("best 0.310") == 4


def test_lower_can_be_better(tmp_path: Path) -> None:
    given = comparison()
    entries = []
    for rank, entry in zip((9.0, 9.0, 3.0, 3.0, 20.0, 20.0, 5.0, 5.0), given.entries, strict=True):
        probe = entry.result.tasks[0]
        changed = probe.metrics["balanced_accuracy"].model_copy(
            update={"value": rank, "low": rank, "high": rank, "is_share": False, "lower_is_better": True}
        )
        task = probe.model_copy(update={"metrics": {"balanced_accuracy": changed}})
        entries.append(entry.model_copy(update={"result": entry.result.model_copy(update={"tasks": (task,)})}))
    text = Page(rendered(tmp_path, given.model_copy(update={"entries": tuple(entries)}))).text
    assert re.search(r"model 1 nevus best 3\.0", text) and text.count("best 3.0") == 2 and "best 20.0" not in text


def test_a_model_is_called_better_only_where_holm_allows(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, comparison()))
    assert re.search(r"model 1 nevus better \+0\.031 \+0\.012 to \+0\.050 0\.002 < 0\.001 0\.012 457", page.text)
    assert re.search(r"PAD nevus -0\.020 -0\.110 to \+0\.070 undefined 0\.600 0\.600 457", page.text)
    # and of the rows that neither was trained on by their own
    assert re.search(r"HAM nevus, without overlap \+0\.018 -0\.004 to \+0\.041 0\.090 0\.110 0\.220 440", page.text)
    assert page.text.count(" better +") == 1 and " better -" not in page.text
    # 0 is in the middle of a scale that holds both intervals
    lines = [attrs for tag, attrs in page.tags if tag == "line" and attrs["x1"] == attrs["x2"] == "50.0%"]
    assert len(lines) == 3


def test_one_chart_for_all_models_and_one_diagram_of_ranks(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, comparison()))
    charts = drawings(page)
    assert len(charts) == 2 * (1 + 2)  # ranks; an efficiency chart a set; two themes
    for chart in charts[2:]:
        assert all(f"model {number} nevus" in chart for number in range(4))  # the legend
    assert "critical difference 2.10" in charts[0]
    assert all(f"model {number} nevus" in charts[0] for number in range(4))


def test_labels_that_begin_with_an_underscore_stay_in_the_legend(tmp_path: Path) -> None:
    given = comparison()
    names = {model.label: f"_{model.label}" for model in given.models}
    entries = tuple(entry.model_copy(update={"model": names[entry.model]}) for entry in given.entries)
    models = tuple(model.model_copy(update={"label": names[model.label]}) for model in given.models)
    page = Page(rendered(tmp_path, given.model_copy(update={"entries": entries, "models": models, "ranks": ()})))
    assert all("_model 3 nevus" in chart for chart in drawings(page))


def test_names_that_differ_at_their_end_can_be_told_apart(tmp_path: Path) -> None:
    given = comparison("/a/folder/with/a/very/long/path/to/one/of/many/models (3f0a2c)")
    models = {model.label: f"{'local-dir:/a/long/way/' * 3}export ({code})" for code, model in enumerate(given.models)}
    entries = tuple(entry.model_copy(update={"model": models[entry.model]}) for entry in given.entries)
    ranks = given.ranks[0].model_copy(
        update={
            "mean_rank": {models[name]: rank for name, rank in given.ranks[0].mean_rank.items()},
            "not_different": (),
        }
    )
    changed = {
        "entries": entries,
        "models": tuple(model.model_copy(update={"label": models[model.label]}) for model in given.models),
        "ranks": (ranks,),
    }
    for chart in drawings(Page(rendered(tmp_path, given.model_copy(update=changed)))):
        assert "…" in chart and all(f"export ({code})" in chart for code in range(4))


def test_leakage_is_said_for_each_model_and_set(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, comparison()))
    assert page.text.count("17 of 400 images are in its training data") == 8
    with_value = "the value without them stands below the one with them"
    assert page.text.count(f"{with_value}.") == 4 and page.text.count(f"{with_value}; of Retrieval there is none.") == 4
    given = comparison()
    tasks = tuple(task.model_copy(update={"without_overlap": {}}) for task in given.entries[0].result.tasks)
    first = given.entries[0].model_copy(update={"result": given.entries[0].result.model_copy(update={"tasks": tasks})})
    text = Page(rendered(tmp_path, given.model_copy(update={"entries": (first, *given.entries[1:])}))).text
    assert text.count("the values here include them.") == 1
    first = given.entries[0].model_copy(update={"result": given.entries[0].result.model_copy(update={"leakage": None})})
    text = Page(rendered(tmp_path, given.model_copy(update={"entries": (first, *given.entries[1:])}))).text
    assert "model 0 nevus on HAM nevus: not compared with its training data." in text


def test_without_ranks_and_differences(tmp_path: Path) -> None:
    given = comparison(num_models=2).model_copy(update={"ranks": (), "differences": (), "notes": ()})
    page = Page(rendered(tmp_path, given))
    assert "Ranks over the sets" not in page.texts_of("h3") and "Mean rank" not in page.texts_of("th")


def test_models_that_are_equal_in_all(tmp_path: Path) -> None:
    given = comparison()
    same = given.differences[0].model_copy(update={"value": Metric(value=0.0, low=0.0, high=0.0, n=457)})
    page = Page(rendered(tmp_path, given.model_copy(update={"differences": (same,)})))
    assert "+0.000 +0.000 to +0.000" in page.text and " better +" not in page.text


def test_many_models(tmp_path: Path) -> None:
    assert len(rendered(tmp_path, comparison(num_models=30))) < 1_500_000


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    assert rendered(tmp_path, comparison()) == rendered(tmp_path, comparison())
