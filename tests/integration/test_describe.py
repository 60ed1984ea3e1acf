"""Reports of images by calls and by batches, against a real HTTP server."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.captions.batch_api import BatchLimits, run_batches
from data_prep.captions.describe import Undescribed, make_describer
from data_prep.captions.ledger import Ledger
from data_prep.captions.llm import LLMSplitter
from data_prep.config import LLMDecomposer, LLMDescriber
from data_prep.schema import Aspect, Caption
from tests.integration.batch_server import Line, serve_batches

REPORT = "A pink plaque with a sharp border and fine white scale lies on the forearm. The surrounding skin is light."


class Images:
    """JPEGs that count how often they are read."""

    def __init__(self, num: int) -> None:
        self.num_read: Counter[int] = Counter()
        generator = np.random.default_rng(0)
        self._jpegs = [self._encode(generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in range(num)]

    @staticmethod
    def _encode(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG")
        return buffer.getvalue()

    def item(self, number: int, diagnosis: str | None) -> Undescribed:
        def read() -> bytes:
            self.num_read[number] += 1
            return self._jpegs[number]

        return Undescribed(hashlib.sha256(self._jpegs[number]).hexdigest(), read, diagnosis)


def config(url: str, **changes: object) -> LLMDescriber:
    values = {"model": "tiny-vl", "base_url": url, "api_key_env": "UNSET_KEY", "image_px": 64, "max_retries": 1}
    return LLMDescriber.model_validate(values | changes)


def told(body: dict[str, Any]) -> str | None:
    diagnosis = json.loads(body["messages"][1]["content"][0]["text"])["diagnosis"]
    assert diagnosis is None or isinstance(diagnosis, str)
    return diagnosis


def report(body: dict[str, Any], number: int) -> Line:
    """Of melanoma nothing; of naevus at the second attempt."""
    if told(body) == "melanoma":
        return Line(json.dumps({"report": "I'm sorry, I can't help with that image of a lesion."}))
    if told(body) == "naevus" and number == 0:
        return Line(json.dumps({"report": "This image shows a naevus."}))
    return Line(json.dumps({"report": REPORT}))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("in_batches", [False, True], ids=["calls", "batches"])
def test_reports_their_origin_and_what_there_is_none_of(tmp_path: Path, in_batches: bool) -> None:
    images = Images(4)
    labels = ["eczema", "melanoma", "naevus", None]
    items = [images.item(number, label) for number, label in enumerate(labels)]
    items += [images.item(0, "eczema"), images.item(0, "psoriasis")]  # a copy, and a copy with another label
    ledger_path = tmp_path / "answers.sqlite"
    with serve_batches(report) as api:
        describer = make_describer(config(api.url), ledger_path)
        if in_batches:
            limits = BatchLimits(max_bytes=2 * 7000)
            run_batches(describer.task, lambda: items, describer.ledger, tmp_path / "b", limits=limits, interval_s=0.01)
            assert len(api.batches) > 3  # split by bytes
            bodies = [request["body"] for file_id in api.files for request in _requests(api.files[file_id])]
        else:
            summary = describer.prepare(items)
            assert (summary.num_answered, summary.num_failed) == (4, 1)
            bodies = [json.loads(body) for body, times in api.called.items() for _ in range(times)]
        assert Counter(map(told, bodies)) == {"eczema": 1, "psoriasis": 1, None: 1, "melanoma": 2, "naevus": 2}
        for body in bodies:
            assert body["response_format"]["json_schema"]["schema"]["required"] == ["report"]
            url = body["messages"][1]["content"][1]["image_url"]["url"]
            with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
                assert image.size == (64, 48)
        # asked before: no image is even read
        images.num_read.clear()
        describer.prepare(items)
        assert not images.num_read

    worker = make_describer(config(api.url), ledger_path)  # no server any more
    made = worker.report(items[0].image_sha256, "eczema")
    assert isinstance(made, Caption) and (made.aspect, made.text) == (Aspect.CAPTION, REPORT)
    kind, model, prompt, day = made.origin.split(":")
    assert (kind, model, prompt) == ("llm", "tiny-vl", worker.task.prompt_hash[:12]) and len(day) == 10
    assert worker.name == f"{kind}:{model}:{prompt}"
    assert isinstance(worker.report(items[2].image_sha256, "naevus"), Caption)
    assert worker.report(items[1].image_sha256, "melanoma") == "a refusal in words"
    assert worker.report(items[1].image_sha256, "eczema") == "the model was not asked for a report"
    content = b"".join(path.read_bytes() for path in tmp_path.glob("answers.sqlite*"))
    assert b"psoriasis" not in content and items[0].image_sha256.encode() not in content


def _requests(file: tuple[str, bytes]) -> list[dict[str, Any]]:
    name, content = file
    return [json.loads(line) for line in content.splitlines()] if "requests" in name else []


def test_a_label_that_is_withheld_never_leaves(tmp_path: Path) -> None:
    images = Images(2)
    items = [images.item(0, "melanoma"), images.item(1, "naevus"), images.item(0, "eczema")]
    with serve_batches(report) as api:
        describer = make_describer(config(api.url, give_diagnosis=False), tmp_path / "l.sqlite")
        describer.prepare(items)
        run_batches(describer.task, lambda: items, Ledger(tmp_path / "other.sqlite"), tmp_path / "b", interval_s=0.01)
        sent = [*api.called, *(content for name, content in api.files.values() if "requests" in name)]
    assert len(api.called) == 2 and len(sent) == 3
    assert not any(label in content for content in sent for label in (b"melanoma", b"naevus", b"eczema"))
    assert isinstance(describer.report(items[0].image_sha256, "anything"), Caption)


def test_a_report_is_split_into_findings(tmp_path: Path) -> None:
    findings = [
        ("morphology", "Pink plaque"),
        ("morphology", "Sharp border"),
        ("morphology", "Fine white scale"),
        ("body_site", "On the forearm"),
        ("morphology", "Surrounding skin is light"),
        ("morphology", "Blue nodule"),  # invented
    ]

    def answer(body: dict[str, Any], number: int) -> Line:
        if body["response_format"]["json_schema"]["name"] == "report":
            return report(body, number)
        assert "splits" not in body["messages"][0]["content"] and "findings" in body["messages"][0]["content"]
        return Line(json.dumps({"subcaptions": [{"aspect": aspect, "text": text} for aspect, text in findings]}))

    images = Images(1)
    item = images.item(0, "eczema")
    with serve_batches(answer) as api:
        describer = make_describer(config(api.url), tmp_path / "l.sqlite")
        describer.prepare([item])
        caption = describer.report(item.image_sha256, "eczema")
        assert isinstance(caption, Caption)
        decomposer = LLMSplitter(
            LLMDecomposer(model="tiny", base_url=api.url, api_key_env="UNSET_KEY", prompt="findings_v1"),
            tmp_path / "l.sqlite",
        )
        decomposer.prepare([caption.text])
    made = decomposer.decompose(caption.text)
    assert [(sub.aspect, sub.text) for sub in made.subcaptions] == findings[:-1]
    assert [dropped.text for dropped in made.dropped] == ["Blue nodule"]
