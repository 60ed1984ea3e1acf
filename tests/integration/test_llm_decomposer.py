"""The language model's way, against a real HTTP server."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.captions.decompose import make_decomposer
from data_prep.captions.llm import LLMSplitter
from data_prep.captions.tasks import request_key
from data_prep.config import LLMDecomposer, RulesDecomposer
from data_prep.errors import InputError
from tests.integration.llm_server import Reply, answer, serve

KEY = "sk-test-3fd81c77-do-not-write"
REPOSITORY = Path(__file__).resolve().parents[2]

GOOD = "Scaly red plaque on the left elbow of a 52-year-old man, without itching."
LIMITED = "Tense blisters on both shins of an elderly woman."
BROKEN = "Pearly papule on the nose with fine vessels."
MALFORMED = "Grouped vesicles on the lip, painful for two days."
CUT = "Brown macule on the back, stable for ten years."
REFUSED = "Ulcer on the glans in a 30-year-old man."
EMPTY = "Thick yellow toenails, treated with terbinafine."
INVENTED = "Annular patch on the trunk with a raised border."
NO_SCHEMA = "White patches on the hands since childhood."
SLOW = "Crusted erosions around the mouth of a child."

FINE = {
    GOOD: answer(
        ("morphology", "Scaly red plaque"),
        ("body_site", "On the left elbow"),
        ("demographics", "A 52-year-old man"),
        ("symptoms", "Without itching"),
        ("symptoms", "Itching plaque"),  # negation lost: to be dropped
    ),
    LIMITED: answer(("morphology", "Tense blisters"), ("body_site", "On both shins")),
    BROKEN: answer(("morphology", "Pearly papule with fine vessels"), ("body_site", "On the nose")),
    SLOW: answer(("morphology", "Crusted erosions"), ("body_site", "Around the mouth")),
}
SCRIPT: dict[str, Sequence[Reply]] = {
    GOOD: [FINE[GOOD]],
    LIMITED: [Reply("slow down", 429, headers={"Retry-After": "0"}), FINE[LIMITED]],
    BROKEN: [Reply("oops", 500, headers={"Retry-After": "0"}), FINE[BROKEN]],
    MALFORMED: [Reply('{"subcaptions": [')],
    CUT: [Reply('{"subcaptions": [{"aspect": "morph', finish_reason="length")],
    REFUSED: [Reply(None, refusal="I cannot help with that.")],
    EMPTY: [Reply("")],
    INVENTED: [answer(("morphology", "Purple nodules"), ("history", "For 3 weeks"))],
    NO_SCHEMA: [answer(("severity", "White patches on the hands"))],
    SLOW: [Reply(FINE[SLOW].content, delay_s=0.3)],
}
UNUSABLE = {
    MALFORMED: "malformed JSON",
    CUT: "cut off at max_output_tokens",
    REFUSED: "refused by the model",
    EMPTY: "empty answer",
    INVENTED: "all sub-captions dropped",
    NO_SCHEMA: "schema violation",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_LLM_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def config(url: str | None, **changes: object) -> LLMDecomposer:
    values: dict[str, object] = {
        "model": "tiny",
        "base_url": url,
        "api_key_env": "TEST_LLM_KEY",
        "concurrency": 4,
        "max_retries": 2,
        "timeout_s": 5.0,
    }
    return LLMDecomposer.model_validate(values | changes)


def ledger_bytes(ledger_path: Path) -> bytes:
    return b"".join(path.read_bytes() for path in ledger_path.parent.glob(ledger_path.name + "*"))


def test_each_outcome_its_requests_and_no_second_asking(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ledger_path = tmp_path / "captions.sqlite"
    with serve(SCRIPT.__getitem__) as server:
        decomposer = LLMSplitter(config(server.url), ledger_path)
        decomposer.prepare([*SCRIPT, GOOD, *SCRIPT])  # each one three or two times
        expected = dict.fromkeys((GOOD, SLOW), 1) | dict.fromkeys((LIMITED, BROKEN, *UNUSABLE), 2)
        assert dict(server.num_requests) == expected
        assert server.max_in_flight > 1
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        assert server.bodies[0]["response_format"]["json_schema"]["strict"] is True
        assert server.bodies[0]["max_tokens"] == 800

        LLMSplitter(config(server.url), ledger_path).prepare(SCRIPT)
        assert dict(server.num_requests) == expected
        LLMSplitter(config(server.url), ledger_path).prepare(SCRIPT, retry_failed=True)
        assert {c for c in SCRIPT if server.num_requests[c] > expected[c]} == set(UNUSABLE)

    # another object, no server any more: what a worker process does
    worker = LLMSplitter(config(server.url), ledger_path)
    for caption, reply in FINE.items():
        made = worker.decompose(caption)
        assert (made.made_by, made.failure) == ("llm", None)
        wanted = [(item["aspect"], item["text"]) for item in json.loads(reply.content or "")["subcaptions"]]
        assert [(sub.aspect, sub.text) for sub in made.subcaptions] == wanted[: len(made.subcaptions)]
    assert [dropped.reason for dropped in worker.decompose(GOOD).dropped] == ["negation lost: 'itch'"]
    rules = make_decomposer(RulesDecomposer(), ledger_path)
    for caption, reason in UNUSABLE.items():
        made = worker.decompose(caption)
        assert made.made_by == "rules" and made.subcaptions == rules.decompose(caption).subcaptions
        assert made.failure is not None and made.failure.startswith(reason)
    assert len(worker.decompose(INVENTED).dropped) == 2
    skipping = LLMSplitter(config(server.url, on_failure="keep_whole"), ledger_path).decompose(CUT)
    assert (skipping.subcaptions, skipping.made_by, skipping.failure) == ((), "llm", UNUSABLE[CUT])

    rows = (
        sqlite3.connect(ledger_path).execute("SELECT status, raw, num_tokens_in, num_attempts FROM answers").fetchall()
    )
    assert sorted(row[0] for row in rows) == ["answered"] * 4 + ["failed"] * 6
    assert ("failed", SCRIPT[CUT][0].content, 14, 2) in rows
    assert KEY.encode() not in ledger_bytes(ledger_path) and GOOD.encode() not in ledger_bytes(ledger_path)
    assert KEY not in caplog.text and len(caplog.records) > 0


def test_second_attempt_that_can_be_used_is_taken(tmp_path: Path) -> None:
    with serve(lambda _: [Reply("not json"), FINE[GOOD]]) as server:
        decomposer = LLMSplitter(config(server.url), tmp_path / "l.sqlite")
        decomposer.prepare([GOOD])
        assert server.num_requests[GOOD] == 2
    assert decomposer.decompose(GOOD).made_by == "llm"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refused_key_or_model_stops_at_once(tmp_path: Path, status: int) -> None:
    captions = [f"Red patch number {number}" for number in range(200)]
    with serve(lambda _: [Reply(f"Incorrect key {KEY}", status)]) as server:
        with pytest.raises(InputError, match=f"HTTP {status} for model 'tiny'") as caught:
            LLMSplitter(config(server.url), tmp_path / "l.sqlite").prepare(captions)
        assert server.num_requests.total() <= 4  # those in flight
    assert KEY not in str(caught.value) and "Incorrect" not in str(caught.value) and caught.value.__cause__ is None
    with sqlite3.connect(tmp_path / "l.sqlite") as connection:
        assert "Incorrect key ***" in connection.execute("SELECT raw FROM answers").fetchone()[0]


def test_no_server_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/v1: cannot connect"):
        LLMSplitter(config("http://127.0.0.1:9/v1", max_retries=0), tmp_path / "l.sqlite").prepare([GOOD])
    monkeypatch.delenv("TEST_LLM_KEY")
    with pytest.raises(InputError, match="TEST_LLM_KEY is not set"):
        LLMSplitter(config(None), tmp_path / "l.sqlite").prepare([GOOD])
    with serve(SCRIPT.__getitem__) as server:
        LLMSplitter(config(server.url), tmp_path / "l.sqlite").prepare([GOOD])
        assert server.headers[0]["authorization"] == "Bearer not-needed"


def test_unanswered_captions_are_served_and_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    retry = {"Retry-After": "0"}
    replies = {
        GOOD: [Reply(FINE[GOOD].content, delay_s=1.0), FINE[GOOD]],
        LIMITED: [Reply("slow down", 429, headers=retry), FINE[LIMITED]],
        BROKEN: [Reply(f"bad request of {KEY}: {BROKEN}", 400), FINE[BROKEN]],
        SLOW: [Reply(body=b"<html>hello</html>"), FINE[SLOW]],
    }
    settings = {"max_retries": 0, "timeout_s": 0.4}
    with serve(replies.__getitem__) as server:
        first = LLMSplitter(config(server.url, **settings), tmp_path / "l.sqlite")
        first.prepare(replies)
        failures = {caption: first.decompose(caption).failure or "" for caption in replies}
        assert "0.4 s" in failures[GOOD] and "429" in failures[LIMITED] and "HTTP 400" in failures[BROKEN]
        assert "base_url" in failures[SLOW] and KEY not in str(failures)
        # the server's words, which may quote the question, are in the ledger alone
        assert (failures[LIMITED], failures[BROKEN]) == ("HTTP 429", "HTTP 400")
        kept = first.ledger.get(request_key(first.task, BROKEN))
        assert kept is not None and kept.raw is not None and f"bad request of ***: {BROKEN}" in kept.raw
        assert "bad request" not in caplog.text and BROKEN not in caplog.text
        assert {first.decompose(caption).made_by for caption in replies} == {"rules"}
        assert "4 questions got no answer" in caplog.text
        second = LLMSplitter(config(server.url, **settings), tmp_path / "l.sqlite")
        second.prepare(replies)
        assert {second.decompose(caption).made_by for caption in replies} == {"llm"}
        assert set(server.num_requests.values()) == {2}


def test_a_server_that_is_down_ends_the_run(tmp_path: Path) -> None:
    captions = [f"Red patch number {number}" for number in range(300)]
    with serve(lambda _: [Reply("overloaded", 503)]) as server:
        with pytest.raises(InputError, match=r"calls in a row without an answer.*HTTP 503; .*unanswered"):
            LLMSplitter(config(server.url, max_retries=0), tmp_path / "l.sqlite").prepare(captions)
        assert 16 <= server.num_requests.total() <= 20


def test_a_caption_never_asked_and_a_foreign_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the preparation again"):
        LLMSplitter(config("http://127.0.0.1:9/v1"), tmp_path / "l.sqlite").decompose(GOOD)
    (tmp_path / "text").write_text("not a database, but long enough to be looked at\n" * 40)
    with pytest.raises(InputError, match="cannot be used as ledger"):
        LLMSplitter(config("http://127.0.0.1:9/v1"), tmp_path / "text").decompose(GOOD)
    with pytest.raises(InputError, match="no prompt"):
        LLMSplitter(config(None, prompt="../../config"), tmp_path / "l.sqlite")


PREPARE = """
import sys
from pathlib import Path
from data_prep.captions.llm import LLMSplitter
from data_prep.config import LLMDecomposer
config = LLMDecomposer(model="tiny", base_url=sys.argv[1], api_key_env="TEST_LLM_KEY", concurrency=4)
LLMSplitter(config, Path(sys.argv[2])).prepare(f"Red patch number {number}" for number in range(60))
"""


def test_killed_in_the_middle_then_resumed(tmp_path: Path) -> None:
    captions = [f"Red patch number {number}" for number in range(60)]
    ledger_path = tmp_path / "l.sqlite"
    with serve(lambda caption: [Reply(answer(("morphology", caption)).content, delay_s=0.1)]) as server:
        command = [sys.executable, "-c", PREPARE, server.url, str(ledger_path)]
        process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        deadline_s = time.monotonic() + 30
        while server.num_completed.total() < 20 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        time.sleep(0.2)  # replies to the dead run out
        with sqlite3.connect(ledger_path) as connection:
            num_kept = connection.execute("SELECT count(*) FROM answers WHERE status = 'answered'").fetchone()[0]
        asked_before = server.num_requests.copy()
        assert 20 - 4 <= num_kept < 60
        assert asked_before.total() - num_kept <= 2 * 4  # answered and in flight at the kill

        decomposer = LLMSplitter(config(server.url), ledger_path)
        decomposer.prepare(captions)
        asked_after = server.num_requests - asked_before
        assert asked_after.total() == 60 - num_kept and set(asked_after.values()) == {1}
    assert {decomposer.decompose(caption).made_by for caption in captions} == {"llm"}
