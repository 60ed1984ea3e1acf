"""The report and the page of samples: the right figures, nothing from elsewhere, nothing unescaped."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import InputError
from data_prep.pages.preparation import ReportFacts, TokenLengths, histogram, token_lengths, write_report
from data_prep.schema import HASH_DTYPE, Aspect, Caption, Demographics, Sample
from data_prep.shards.inspect import inspect
from data_prep.shards.manifest import write_manifest
from data_prep.shards.shard import write_shard

HOSTILE = "<script>alert('x')</script> \"quoted\" & {{ 7 * 7 }}"


class _Page(HTMLParser):
    """Tags, the links that would be fetched, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# ---------------------------------------------------------------------------------------------- report


def test_report_shows_every_part(tmp_path: Path) -> None:
    coverage = {
        "rows": {"all": 30, "exact": 20, "fuzzy": 3, "unmatched": 7},
        "labels": {"all": 4, "exact": 2, "fuzzy": 1, "unmatched": 1},
        "levels": {"1": 3, "4": 20},
        "fuzzy": {"psoriais": {"node": "Psoriasis", "similarity": 0.8889, "rows": 3}},
        "ambiguous": {},
        "unmatched": {HOSTILE: 7},
    }
    facts = ReportFacts(
        title="my_set",
        overview={"rows read": 12345, "decomposer": "rules-7"},
        samples_by_split={"train": 90, "val": 10},
        samples_by_source={"train": {"youtube": 60, "pubmed": 30}, "val": {"pubmed": 10}},
        samples_by_licence={"train": {"CC-BY-4.0": 90}, "val": {"CC-BY-4.0": 10}},
        samples_by_level={"train": {"0": 50, "4": 40}, "val": {"4": 10}},
        samples_by_diagnosis={"train": {f"disease {number:03d}": 1 for number in range(60)}, "val": {HOSTILE: 10}},
        captions_by_aspect={"train": {"caption": 90}, "val": {"caption": 10}},
        captions_by_origin={"train": {"caption by column:caption": 90}},
        token_lengths={"sub-captions": TokenLengths(5000, {10: 150, 77: 30, 78: 20})},
        tokenizer="clip",
        rejected_by_reason={"no such file": 17},
        duplicates={"pairs of near copies": 4},
        duplicates_page="duplicates.html",
        diagnoses=coverage,
        concepts={name: part for name, part in coverage.items() if name != "levels"},
        notes={"diagnosis not in the ontology": 33},
        warnings=[f"leakage kept {HOSTILE}"],
    )
    page = _Page(write_report(tmp_path, facts))
    for text in (
        *("my_set", "12,345", "youtube 60 0 60", "pubmed 30 10 40", "CC-BY-4.0 90 10 100", "no path 50 0 50"),
        *("disease 000 1 0 1", "36 more, together 36.", "caption by column:caption 90", "no such file 17"),
        *("10.0 % longer than the context", "200 of 5,000 texts measured", "pairs of near copies 4"),
        *("psoriais -> 'Psoriasis', similarity 0.889, 3 rows", "1: 3, 4: 20", "diagnosis not in the ontology 33"),
        f"leakage kept {HOSTILE}",
    ):
        assert text in page.text, text
    assert page.text.count(HOSTILE) == 4
    assert page.sources == ["duplicates.html"]
    assert not {"script", "iframe", "object", "link"} & set(page.tags)


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    page = _Page(write_report(tmp_path, ReportFacts(title="nothing")))
    assert page.text.endswith("Data preparation: nothing")
    assert "table" not in page.tags


# ---------------------------------------------------------------------------------------------- tokens


def words(text: str) -> int:
    return len(text.split())


def test_all_texts_are_measured_while_they_are_few() -> None:
    lengths = token_lengths([("a", "x y"), ("b", "x"), ("a", "x y"), ("a", "x " * 90)], words)
    assert lengths == {"a": TokenLengths(3, {2: 2, 90: 1}), "b": TokenLengths(1, {1: 1})}
    assert lengths["a"].num_over(77) == 1
    assert lengths["a"].num_over(90) == 0


def test_a_sample_is_measured_where_they_are_many() -> None:
    texts = [("long" if number % 4 == 0 else "short", "x " * (1 + number % 100)) for number in range(10_000)]
    calls: list[str] = []

    def count(text: str) -> int:
        calls.append(text)
        return words(text)

    lengths = token_lengths(iter(texts), count, max_texts=2000)
    assert len(calls) == 2000
    assert {kind: each.num_texts for kind, each in lengths.items()} == {"long": 2500, "short": 7500}
    assert lengths["long"].num_measured == pytest.approx(500, abs=80)
    assert lengths["short"].num_over(77) / lengths["short"].num_measured == pytest.approx(0.23, abs=0.04)
    assert token_lengths(iter(texts), words, max_texts=2000) == lengths


@pytest.mark.parametrize("context_length", [8, 64, 77, 256])
def test_bins_hold_every_length_and_break_at_the_context(context_length: int) -> None:
    lengths = TokenLengths(0, dict.fromkeys(range(1, 4 * context_length), 1))
    bins = histogram(lengths, context_length)
    assert sum(each.num for each in bins) == 4 * context_length - 1
    assert sum(each.num for each in bins if not each.is_over) == context_length
    ends = [int(each.label.split(" to ")[1]) for each in bins[:-1]]
    assert context_length in ends
    assert all(each.num == end - start for each, end, start in zip(bins, ends, [0, *ends], strict=False))


# ---------------------------------------------------------------------------------------------- samples


def _split(directory: Path, num: int) -> Path:
    directory.mkdir()
    rng = np.random.default_rng(0)

    def samples() -> list[tuple[Sample, bytes, np.void]]:
        made = []
        for number in range(num):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
            captions = (
                Caption(aspect=Aspect.CAPTION, text=f"Whole caption {number} {HOSTILE}", origin="column:caption"),
                Caption(aspect=Aspect.MORPHOLOGY, text=f"red {number}", origin="rules-7"),
                Caption(aspect=Aspect.MORPHOLOGY, text=f"scaly {number}", origin="rules-7"),
            )
            sample = Sample(
                key=f"set-{number:03d}",
                captions=captions,
                diagnosis="melanoma",
                diagnosis_path=("proliferations", "melanocytic"),
                concepts=("red", "scale"),
                body_site="arm",
                demographics=Demographics(age_years=90, sex="female", fitzpatrick=3),
                group="0123456789abcdef",
                dataset="set",
                source="youtube",
                licence="CC-BY-4.0",
            )
            made.append((sample, buffer.getvalue(), np.zeros((), dtype=HASH_DTYPE)[()]))
        return made

    records = [
        write_shard(directory / f"shard-{shard:06d}.tar", samples()[shard::2], inputs_digest="") for shard in range(2)
    ]
    write_manifest(
        directory,
        records,
        dataset="set",
        split="train",
        image_short_side=16,
        decomposer="rules-7",
        config_digest="",
        num_rejected=0,
    )
    return directory


def test_samples_are_shown_whole(tmp_path: Path) -> None:
    directory = _split(tmp_path / "train", 20)
    path = inspect(directory, 8, 0, tmp_path / "out" / "page.html")
    page = _Page(path)
    assert path == tmp_path / "out" / "page.html"
    assert page.tags.count("article") == 8
    assert not {"script", "iframe", "object", "link"} & set(page.tags)
    assert len(set(page.sources)) == 8
    for source in page.sources:
        header, content = source.split(",")
        assert header == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (16, 16)
    keys = re.findall(r"set-\d{3}", page.text)
    assert len(set(keys)) == 8
    number = int(keys[0].removeprefix("set-"))
    assert (
        f"{keys[0]} caption Whole caption {number} {HOSTILE} column:caption morphology red {number} rules-7 "
        f"scaly {number} rules-7 diagnosis melanoma path proliferations \u203a melanocytic concepts red, scale "
        "body site arm age 90 and more sex female Fitzpatrick type 3 source youtube licence CC-BY-4.0"
    ) in page.text
    assert "0123456789abcdef" not in path.read_text(encoding="utf-8")


def test_equal_seeds_show_equal_samples(tmp_path: Path) -> None:
    directory = _split(tmp_path / "train", 20)
    pages = [inspect(directory, 5, seed, tmp_path / "page.html").read_bytes() for seed in (1, 1, 2)]
    assert pages[0] == pages[1] != pages[2]


def test_a_small_split_is_shown_whole(tmp_path: Path) -> None:
    page = _Page(inspect(_split(tmp_path / "train", 4), 100, 0, tmp_path / "page.html"))
    assert page.tags.count("article") == 4
    assert "set, train: 4 of 4 samples" in page.text


def test_what_cannot_be_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no manifest here"):
        inspect(tmp_path, 4, 0, tmp_path / "page.html")
    directory = _split(tmp_path / "train", 4)
    with pytest.raises(InputError, match="--num 0"):
        inspect(directory, 0, 0, tmp_path / "page.html")
    (directory / "shard-000001.tar").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match=r"shard-000001\.tar: cannot be read"):
        inspect(directory, 4, 0, tmp_path / "page.html")
    np.save(directory / "index.npy", np.zeros(4))
    with pytest.raises(InputError, match="does not fit its manifest"):
        inspect(directory, 4, 0, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
