"""The HTML report: what an HTML parser finds in it, and that nothing in it can run or be fetched."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.evaluation.metrics.statistics import Estimate
from pretrain.evaluation.reports.run import (
    GalleryCaption,
    GalleryItem,
    MetricRow,
    ReportData,
    report_numbers,
    write_report,
)
from pretrain.train.curves import plot_losses
from tests.unit.evaluation.pages import ATTACK, SHOWN_ATTACK, Page


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 150, 120)).save(buffer, "JPEG")
    return buffer.getvalue()


def full_report(name: str = "nevus") -> ReportData:
    """Every section filled; `name` stands wherever a text of the data can."""
    curve = [(step, 3.0 / (1 + step)) for step in range(20)]
    return ReportData(
        title=f"Run {name}",
        subtitle=f"Synthetic images {name}",
        facts={f"Model {name}": f"ViT {name}"},
        stages_s={f"train {name}": 12.34},
        metrics=(
            MetricRow("balanced_accuracy", Estimate(0.75, 0.7, 0.8, 457), Estimate(0.2, 0.15, 0.25, 457), 0.125),
            MetricRow(f"median_rank {name}", Estimate(12.0, 9.0, 15.0, 457), is_share=False),
        ),
        losses={f"multi_aspect {name}": curve},
        per_class_recall={
            f"{name} 1": Estimate(0.9, 0.8, 0.95, 31),
            f"{name} 2": Estimate(math.nan, math.nan, math.nan, 0),
        },
        confusion=np.array([[28, 3], [0, 0]]),
        classnames=(f"{name} 1", f"{name} 2"),
        gallery=(
            GalleryItem(
                jpeg=jpeg(),
                diagnosis=f"{name} 1",
                captions=(GalleryCaption("caption", name), GalleryCaption(f"aspect {name}", f"brown {name}", 0.25)),
                predictions=((f"{name} 2", 0.6), (f"{name} 1", 0.4)),
            ),
        ),
        limits=(f"Few images of {name}.",),
    )


def rendered(tmp_path: Path, report: ReportData) -> str:
    path = tmp_path / "new folder" / "report.html"
    write_report(path, report)
    assert list(path.parent.iterdir()) == [path]
    return path.read_text(encoding="utf-8")


def test_texts_of_the_data_cannot_become_markup(tmp_path: Path) -> None:
    html = rendered(tmp_path, full_report(ATTACK))
    page = Page(html)
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == ["application/json"]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "<script>alert" not in html and "<img src=x" not in html
    assert page.texts_of("p").count(SHOWN_ATTACK) == 1  # the caption is there, as text
    plain, attacked = Page(rendered(tmp_path, full_report())), page
    assert [tag for tag, _ in attacked.tags if tag != "wbr"] == [tag for tag, _ in plain.tags if tag != "wbr"]


def test_page_is_self_contained_and_allows_no_script(tmp_path: Path) -> None:
    html = rendered(tmp_path, full_report())
    page = Page(html)
    assert len(page.uris()) == 1 + 2  # one example; a curve, light and dark
    assert all(uri.startswith(("data:image/jpeg;base64,", "data:image/svg+xml;base64,")) for uri in page.uris())
    assert not re.search(r"https?://|url\(|@import", html)
    metas = [attrs for tag, attrs in page.tags if tag == "meta"]
    assert any("default-src 'none'" in meta.get("content", "") and "script" not in meta["content"] for meta in metas)
    assert any(meta.get("name") == "viewport" for meta in metas)
    pictures = [base64.b64decode(uri.partition(",")[2]) for uri in page.uris()]
    assert jpeg() in pictures and sum(b"<svg" in picture for picture in pictures) == 2


def test_numbers_on_the_page(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, full_report()))
    cells = page.texts_of("td") + page.texts_of("span")
    assert {"0.750", "0.700 to 0.800", "0.200", "0.150 to 0.250", "0.125", "457"} <= set(cells)
    assert {"12.0", "9.0 to 15.0"} <= set(cells) and "12.000" not in cells
    assert "undefined" in cells  # recall of the class without images
    assert "12.3 s" in page.texts_of("dd")
    widths = [attrs["style"] for tag, attrs in page.tags if tag == "i" and "width" in attrs.get("style", "")]
    assert widths == ["width: 25.0%", "width: 60.0%", "width: 40.0%"]
    circles = [attrs["cx"] for tag, attrs in page.tags if tag == "circle"]
    assert circles == ["20.0%", "75.0%", "90.0%"]  # before, after, the recall that is defined


def test_embedded_json_holds_the_numbers(tmp_path: Path) -> None:
    report = replace(full_report(ATTACK), losses={"clip": [(0, 2.5), (10, math.nan), (20, math.inf)]})
    page = Page(rendered(tmp_path, report))
    numbers = json.loads("".join(page.texts_of("script")))
    assert numbers == report_numbers(report)
    assert numbers["metrics"]["balanced_accuracy"]["after"] == {"value": 0.75, "low": 0.7, "high": 0.8, "n": 457}
    assert numbers["losses"]["clip"] == [[0, 2.5], [10, None], [20, None]]
    assert numbers["per_class_recall"][f"{ATTACK} 2"] == {"value": None, "low": None, "high": None, "n": 0}
    assert numbers["confusion"] == [[28, 3], [0, 0]]
    assert page.texts_of("figcaption") == ["2 values are not finite: gaps."]


def test_long_curves_are_means_of_equal_runs() -> None:
    curve = [(step, float(step % 2)) for step in range(1000)]
    points = report_numbers(ReportData("t", losses={"clip": curve}))["losses"]["clip"]
    assert len(points) == 334  # runs of three
    assert points[0] == [1.0, pytest.approx(1 / 3)] and points[1] == [4.0, pytest.approx(2 / 3)]


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    assert rendered(tmp_path, full_report()) == rendered(tmp_path, full_report())


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, ReportData(title="Nothing yet")))
    assert page.texts_of("h1") == ["Nothing yet"] and page.texts_of("h2") == []
    only_after = replace(full_report(), metrics=(MetricRow("auroc", Estimate(0.8, 0.7, 0.9, 10), chance=0.5),))
    page = Page(rendered(tmp_path, only_after))
    assert "Results" in page.texts_of("h2") and "Before" not in page.texts_of("th")


def test_classnames_must_fit_the_confusion_matrix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"confusion is \(2, 2\), but there are 1 classnames"):
        write_report(tmp_path / "report.html", replace(full_report(), classnames=("nevus",)))


def test_a_hundred_classes(tmp_path: Path) -> None:
    names = tuple(f"disease {code}" for code in range(114))
    report = replace(full_report(), confusion=np.eye(114, dtype=np.int64), classnames=names)
    assert len(rendered(tmp_path, report)) < 1_500_000


def test_loss_curves_as_png(tmp_path: Path) -> None:
    curve = [(step, 1.0 / (1 + step)) for step in range(30)]
    sizes = {}
    for names in (("clip",), ("clip", "masked_latent"), ("a", "b", "c", "d")):
        path = tmp_path / "plots" / "loss_curves.png"
        plot_losses(dict.fromkeys(names, curve), path)
        with Image.open(path) as image:
            sizes[len(names)] = image.size
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert pixels[0].tolist() == [255, 255, 255]
        assert (pixels == [11, 110, 143]).all(axis=1).sum() > 300 * len(names)  # the line's colour: curves are drawn
    assert sizes == {1: (540, 360), 2: (1080, 360), 4: (1620, 720)}
