"""The page of an evaluation: its numbers, what it says of leakage and groups, and that nothing in it can run."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from data_prep.errors import InputError
from pretrain.evaluation.reports.evaluation import MAX_CHARTS, MAX_CURVES, write_evaluation_report
from pretrain.evaluation.reports.extras import ReportExtras
from pretrain.evaluation.reports.page import MAX_TABLE_ROWS, MAX_TEXT_LENGTH, NO_INTERVAL
from pretrain.evaluation.results import Curve, EvaluationResult, Metric, write_result
from tests.unit.evaluation.pages import ATTACK, SHOWN_ATTACK, Page, evaluation_result, extras, metric


def rendered(tmp_path: Path, result: EvaluationResult, shown: ReportExtras | None = None) -> str:
    write_result(tmp_path, result)
    path = write_evaluation_report(tmp_path, shown)
    assert path == tmp_path / "report.html"
    return path.read_text(encoding="utf-8")


def undrawn(result: EvaluationResult) -> EvaluationResult:
    """Without curves: charts are what takes time."""
    return result.model_copy(update={"tasks": tuple(task.model_copy(update={"curves": ()}) for task in result.tasks)})


def with_task(result: EvaluationResult, **changes: object) -> EvaluationResult:
    """Its first task changed, and the others gone."""
    return result.model_copy(update={"tasks": (result.tasks[0].model_copy(update=changes),)})


def test_texts_of_the_data_cannot_become_markup(tmp_path: Path) -> None:
    plain = Page(rendered(tmp_path, evaluation_result(), extras()))
    html = rendered(tmp_path, evaluation_result(ATTACK), extras(ATTACK))
    attacked = Page(html)
    assert "script" not in [tag for tag, _ in attacked.tags]
    assert not [name for _, attrs in attacked.tags for name in attrs if name.startswith("on")]
    assert "<script>alert" not in html and "<img src=x" not in html
    assert [tag for tag, _ in attacked.tags if tag != "wbr"] == [tag for tag, _ in plain.tags if tag != "wbr"]
    assert f"{SHOWN_ATTACK} is asked for" in attacked.text  # the caption is there, as text


def test_page_is_self_contained_and_its_pictures_can_be_read(tmp_path: Path) -> None:
    html = rendered(tmp_path, evaluation_result(ATTACK), extras(ATTACK))
    page = Page(html)
    assert not re.search(r"https?://|url\(|@import", html)
    assert all(uri.startswith(("data:image/jpeg;base64,", "data:image/svg+xml;base64,")) for uri in page.uris())
    drawings = [base64.b64decode(uri.partition(",")[2]) for uri in page.uris() if "svg" in uri]
    assert len(drawings) == 2 * 4  # ROC, reliability, ranks, efficiency; two themes
    for drawing in drawings:
        ElementTree.fromstring(drawing.replace(b"<!DOCTYPE", b"<!-- <!DOCTYPE").replace(b'dtd">', b'dtd"> -->'))
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_numbers_on_the_page(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, undrawn(evaluation_result())))
    assert page.texts_of("h1") == ["ViT nevus on HAM nevus"]
    for text in (
        *("149.6 M", "HAM nevus, 457 images", "3 rows, see rejected.jsonl", "CC BY nevus 450, CC0 7"),
        *("0.750 0.690 to 0.800", "0.720 0.660 to 0.770 n = 440", "12.0 9.0 to 15.5", "undefined"),
        *(
            "a photo of nevus {}; another",
            "Few images of nevus.",
            "Names of nevus were unified.",
            "Concept annotation: no concepts of nevus",
        ),
        *("0123456789abcdef", "fedcba9876543210"),
    ):
        assert text in page.text, text
    first_table = page.text[page.text.index("Main results") :]
    assert re.search(r"Zero-shot classification: balanced_ accuracy 0.750", first_table)


def test_leakage_stands_before_the_results(tmp_path: Path) -> None:
    result = undrawn(evaluation_result())
    text = Page(rendered(tmp_path, result)).text
    sentence = "17 of 400 images tested on (4.2%) are in the training data, derm nevus, too: 12 with the same pixels"
    assert sentence in text and text.index(sentence) < text.index("Main results")
    assert "2 images could not be compared." in text
    assert result.leakage is not None
    clean = result.leakage.model_copy(update={"num_same_pixels": 0, "num_near": 0, "num_without_hash": 0})
    page = Page(rendered(tmp_path, with_task(result.model_copy(update={"leakage": clean}), without_overlap={})))
    assert "None of the 400 images tested on was found in the training data, derm nevus." in page.text
    assert "Without overlap" not in page.texts_of("th") and "notice" not in [a.get("class") for _, a in page.tags]
    page = Page(rendered(tmp_path, result.model_copy(update={"leakage": None})))
    assert "Not compared with the training data" in page.text


def test_groups_worst_gap_and_those_too_small(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, undrawn(evaluation_result())))
    assert "balanced_ accuracy by skin tone (Fitzpatrick type)" in page.text
    assert "Best minus worst group: 0.200 (0.140 to 0.250)." in page.text
    assert "Groups of fewer than 20 are grey" in page.text and "31 rows have no value." in page.text
    assert "No gap: fewer than two groups are large enough." in page.text
    assert re.search(r"V worst 0.600", page.text)
    overview = page.text[page.text.index("By group") :]
    assert overview.startswith(
        "By group Gap: the best group minus the worst, of those that are large enough; n counts the images of these "
        "two. Metric Gap Worst n, worst and best 0 1 balanced_ accuracy by skin tone (Fitzpatrick type) 0.200 0.140 "
        "to 0.250 V 457"
    )
    folded = [attrs for tag, attrs in page.tags if tag == "details"]
    assert ["open" in attrs for attrs in folded[:2]] == [True, False]  # skin tone is open, the camera is not
    few = [attrs for tag, attrs in page.tags if tag == "tr" and attrs.get("class") == "few"]
    assert len(few) == 1  # VI, with 10 rows


def test_a_value_without_an_interval_is_explained_once_in_its_task(tmp_path: Path) -> None:
    result = undrawn(evaluation_result())
    assert NO_INTERVAL not in Page(rendered(tmp_path, result)).text  # an undefined value is another matter
    alone = Metric(value=0.8, n=3)
    skin = result.tasks[0].by_group[0]
    for changed in (
        {"metrics": {"balanced_accuracy": alone}},
        {"per_class": {"nevus": alone}},
        {"by_group": (skin.model_copy(update={"groups": {**skin.groups, "VI": alone}}),)},
        {"by_group": (skin.model_copy(update={"gap": alone}),)},
    ):
        assert Page(rendered(tmp_path, with_task(result, **changed))).text.count(NO_INTERVAL) == 1


def test_curves_over_shots_have_a_heading_of_their_own(tmp_path: Path) -> None:
    shares = Curve(kind="efficiency", name="accuracy", x=(0.1, 1), y=(0.5, 0.6))
    shots = Curve(kind="efficiency", name="accuracy, few-shot", x=(1, 4), y=(0.3, 0.4))
    page = Page(rendered(tmp_path, with_task(undrawn(evaluation_result()), curves=(shots, shares))))
    assert page.texts_of("h3")[1:3] == ["Data efficiency", "Few-shot"]


def test_whiskers_are_drawn_where_the_numbers_are(tmp_path: Path) -> None:
    page = Page(
        rendered(tmp_path, with_task(undrawn(evaluation_result()), metrics={"balanced_accuracy": metric(0.75)}))
    )
    circles = [attrs["cx"] for tag, attrs in page.tags if tag == "circle"]
    assert circles[:4] == ["75.0%", "72.0%", "75.0%", "72.0%"]  # the overview, the task; each without overlap too
    lines = [(attrs["x1"], attrs["x2"]) for tag, attrs in page.tags if tag == "line" and attrs["y1"] == "8"]
    assert lines[0] == ("69.0%", "80.0%")


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    assert rendered(tmp_path, evaluation_result(), extras()) == rendered(tmp_path, evaluation_result(), extras())


def test_of_many_classes_the_page_stays_small_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    html = rendered(tmp_path, evaluation_result("disease", num_classes=210))
    page = Page(html)
    assert len(html) < 3_000_000
    assert f"{210 - MAX_CHARTS * MAX_CURVES} more curves are in evaluation.json." in page.text
    assert f"{210 - MAX_TABLE_ROWS} more rows are in evaluation.json." in page.text
    assert page.texts_of("summary") == [
        "balanced_",
        "accuracy by skin tone (Fitzpatrick type)",
        "accuracy by camera disease",
        "210 rows",
        "How it was computed",
        "How it was computed",
    ]
    assert page.texts_of("h3").count("Most frequent confusions") == 1
    confused = page.text[page.text.index("Most frequent confusions") :]
    assert re.match(r"Most frequent confusions True Predicted Images disease \d+ disease \d+ 8 ", confused)


def test_a_very_long_name_does_not_widen_a_chart(tmp_path: Path) -> None:
    result = evaluation_result("a" * 20_000, num_classes=21)
    page = Page(rendered(tmp_path, result))
    assert max(int(attrs["width"]) for tag, attrs in page.tags if tag == "img") < 900
    assert max(len(text) for text in page.texts_of("dd")) <= MAX_TEXT_LENGTH


def test_a_curve_of_many_points_is_thinned(tmp_path: Path) -> None:
    x = tuple(i / 100_000 for i in range(100_001))
    curve = Curve(kind="roc", name="long", x=x, y=x)
    assert len(rendered(tmp_path, with_task(evaluation_result(), curves=(curve,)))) < 250_000


def test_a_task_alone(tmp_path: Path) -> None:
    bare = with_task(
        evaluation_result(),
        by_group=(),
        per_class={},
        confusion=None,
        curves=(),
        settings={},
        notes=(),
        without_overlap={},
    )
    page = Page(rendered(tmp_path, bare))
    assert page.texts_of("h2") == ["Overview", "Zero-shot classification"] and page.texts_of("h3") == ["Main results"]
    assert page.uris() == []


def test_every_link_leads_somewhere(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, undrawn(evaluation_result()), extras()))
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    links = [attrs["href"].removeprefix("#") for tag, attrs in page.tags if tag == "a"]
    assert links == ["overview", "zero_shot", "retrieval", "probe", "neighbours", "retrieved"]
    assert set(links) <= targets


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation\.json: no such file"):
        write_evaluation_report(tmp_path)
    with pytest.raises(InputError, match=r"tasks\.0: .*primary: f1 is none of the metrics"):
        rendered(tmp_path, with_task(undrawn(evaluation_result()), primary="f1"))
    confusion = undrawn(evaluation_result()).tasks[0].confusion
    assert confusion is not None
    ragged = confusion.model_copy(update={"counts": confusion.counts[:2]})
    with pytest.raises(InputError, match=r"zero_shot\.confusion: its counts do not fit its 3 classnames"):
        rendered(tmp_path, with_task(undrawn(evaluation_result()), confusion=ragged))
    assert not (tmp_path / "report.html").exists()


def drawings_of(page: Page) -> list[str]:
    """The light one of each chart, as SVG."""
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img" and "svg" in attrs["src"]]
    return [base64.b64decode(uri.partition(",")[2]).decode() for uri in images]


def test_shares_of_the_labels_and_images_of_a_class_have_charts_of_their_own(tmp_path: Path) -> None:
    shares = Curve(kind="efficiency", name="auroc", x=(0.01, 0.1, 1.0), y=(0.6, 0.7, 0.8))
    shots = Curve(kind="efficiency", name="auroc", x=(1, 4, 16), y=(0.5, 0.6, 0.7))
    page = Page(rendered(tmp_path, with_task(evaluation_result(), curves=(shots, shares))))
    by_share, by_shot = drawings_of(page)
    assert "labels used for training (%)" in by_share and ">100<" in by_share
    assert "labelled images of each class" in by_shot and ">16<" in by_shot


def test_six_curves_to_a_chart(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, evaluation_result(num_classes=7)))
    first, second = drawings_of(page)[:2]
    assert [f"nevus {code}" in first for code in range(7)] == [True] * 6 + [False]
    assert "nevus 6" in page.texts_of("figcaption") and "nevus 6" not in second  # a curve alone needs no legend


def test_an_empty_curve_has_no_chart(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, with_task(evaluation_result(), curves=(Curve(kind="roc", name="a", x=(), y=()),))))
    assert "ROC" not in page.texts_of("h3")
