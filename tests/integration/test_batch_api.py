"""Batches against a real HTTP server: what goes wrong there, and a client that is killed between any two steps."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.captions.batch_api import BatchLimits, RunSummary, collect, poll, run_batches, submit, write_batches
from data_prep.captions.ledger import Ledger
from data_prep.captions.subcaptions import SubcaptionsTask
from data_prep.captions.tasks import request_key
from data_prep.config import LLMDecomposer, Price
from data_prep.errors import InputError
from tests.integration.batch_server import BatchApi, Fault, Line, Outcome, serve_batches

KEY = "sk-test-5b0a77e1-do-not-write"
REPOSITORY = Path(__file__).resolve().parents[2]
CAPTIONS = [f"Scaly pink plaque number {number} on the left shin." for number in range(12)]
LIMITS = BatchLimits(max_requests=4)  # three files


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_LLM_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "answers.sqlite") as opened:
        yield opened


def task(url: str, **changes: object) -> SubcaptionsTask:
    values = {"model": "tiny", "base_url": url, "api_key_env": "TEST_LLM_KEY", "max_retries": 2, "timeout_s": 10.0}
    return SubcaptionsTask(LLMDecomposer.model_validate(values | changes))


def run(made: SubcaptionsTask, ledger: Ledger, folder: Path, **changes: Any) -> RunSummary:
    return run_batches(made, lambda: iter(CAPTIONS), ledger, folder, limits=LIMITS, interval_s=0.01, **changes)


def caption_of(body: dict[str, Any]) -> str:
    return str(json.loads(body["messages"][-1]["content"])["caption"])


def good(body: dict[str, Any], number: int = 0) -> Line:
    return Line(json.dumps({"subcaptions": [{"aspect": "morphology", "text": caption_of(body)}]}))


def paid(api: BatchApi, made: SubcaptionsTask) -> dict[str, int]:
    """Caption -> answers that were made; captions that were never asked about are left out."""
    names = {request_key(made, made.identity(caption)): caption for caption in CAPTIONS}
    return {names[key]: number for key, number in api.paid.items()}


def statuses(ledger: Ledger, made: SubcaptionsTask) -> Counter[str]:
    return Counter(str(ledger.status(request_key(made, made.identity(caption)))) for caption in CAPTIONS)


def test_each_line_until_nothing_is_missing(tmp_path: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    first_lines = {
        CAPTIONS[0]: Line("not JSON"),
        CAPTIONS[1]: Line(None, refusal="I cannot help with that."),
        CAPTIONS[2]: Line(f"The server had an error with {KEY}.", status=500),
        CAPTIONS[3]: Line(missing=True),
        CAPTIONS[4]: Line(good({"messages": [{"content": json.dumps({"caption": CAPTIONS[4]})}]}).content, times=3),
        CAPTIONS[5]: Line('{"subcaptions": [{"aspect"', finish_reason="length"),
        CAPTIONS[6]: Line(json.dumps({"subcaptions": [{"aspect": "morphology", "text": "Blue nodule"}]})),
    }

    def answer(body: dict[str, Any], number: int) -> Line:
        caption = caption_of(body)
        if caption == CAPTIONS[1]:
            return first_lines[caption]  # always
        return first_lines[caption] if number == 0 and caption in first_lines else good(body)

    with serve_batches(answer, lambda number: Outcome(num_polls=2, foreign_line=number == 0)) as api:
        made = task(api.url)
        summary = run(made, ledger, tmp_path / "batches")
        twice = {CAPTIONS[i] for i in (0, 1, 2, 3, 5, 6)}
        assert paid(api, made) == {caption: 2 if caption in twice else 1 for caption in CAPTIONS}
        assert statuses(ledger, made) == {"answered": 11, "failed": 1}
        assert summary.stopped_by is None and summary.num_rounds == 2
        found = summary.collected
        assert (found.num_answered, found.num_failed, found.num_unanswered) == (11, 5, 2)
        assert (found.num_unknown, found.num_repeated, found.num_malformed) == (1, 2, 0)
        # 12 lines of the first round with a usage and 6 of the second, less one error and one that never came
        assert ledger.paid_tokens(made) == (16 * 700, 16 * 50)
        assert not list((tmp_path / "batches").glob("*.jsonl"))

        events = api.events.copy()
        assert run(made, ledger, tmp_path / "batches").num_rounds == 0
        assert api.events == events
        run(made, ledger, tmp_path / "batches", retry_failed=True)
        assert paid(api, made)[CAPTIONS[1]] == 3
        assert api.events["list"] == 0
    assert KEY not in caplog.text
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("outcome", "num_paid"),
    [
        (Outcome("expired", share_done=0.5), 12),
        (Outcome("expired", share_done=0.0), 12),
        (Outcome(output=False), 16),  # the answers that nobody gets to see are paid
    ],
    ids=["half-expired", "all-expired", "completed-without-output"],
)
def test_batches_that_end_without_all_answers(tmp_path: Path, ledger: Ledger, outcome: Outcome, num_paid: int) -> None:
    with serve_batches(good, lambda number: outcome if number == 1 else Outcome()) as api:
        made = task(api.url)
        summary = run(made, ledger, tmp_path / "batches")
        assert statuses(ledger, made) == {"answered": 12}
        assert sum(paid(api, made).values()) == num_paid
        assert len(api.batches) == 4 and summary.num_rounds == 2


def test_a_round_without_any_answer_ends_the_run(tmp_path: Path, ledger: Ledger) -> None:
    with serve_batches(lambda body, number: Line(f"bad image: {caption_of(body)}", status=400)) as api:
        made = task(api.url)
        summary = run(made, ledger, tmp_path / "batches")
        assert summary.stopped_by == "a whole round without an answer (HTTP 400)"
        assert len(api.batches) == 3 and statuses(ledger, made) == {"unanswered": 12}


def test_a_file_that_is_refused_is_reported_and_tried_again(tmp_path: Path, ledger: Ledger) -> None:
    error = {"code": "model_not_found", "message": f"{CAPTIONS[4]} for {KEY}", "line": 1}
    with serve_batches(good, lambda number: Outcome("failed", error=error) if number == 1 else Outcome()) as api:
        made = task(api.url)
        with pytest.raises(
            InputError, match=r"requests-001\.jsonl was refused: line 1: server error model_not_found "
        ) as e:
            run(made, ledger, tmp_path / "batches")
        assert KEY not in str(e.value) and CAPTIONS[4] not in str(e.value)
        with sqlite3.connect(tmp_path / "batches" / "batches.sqlite") as state:
            said = state.execute("SELECT server_said FROM files WHERE server_said IS NOT NULL").fetchall()
        assert said == [(f"model_not_found: {CAPTIONS[4]} for ***",)]
        assert statuses(ledger, made) == {"answered": 8, "None": 4}  # the others are not held up
        run(made, ledger, tmp_path / "batches")
        assert statuses(ledger, made) == {"answered": 12} and set(paid(api, made).values()) == {1}
        assert api.events["upload"] == 3


def test_a_cancelled_batch_is_not_asked_again_unbidden(tmp_path: Path, ledger: Ledger) -> None:
    outcome = Outcome("cancelled", share_done=0.5)
    with serve_batches(good, lambda number: outcome if number == 0 else Outcome()) as api:
        made = task(api.url)
        stopped_by = run(made, ledger, tmp_path / "batches").stopped_by
        assert stopped_by == "batch_0 was cancelled; run again to ask for the rest"
        assert statuses(ledger, made) == {"answered": 10, "unanswered": 2} and len(api.batches) == 3
        assert run(made, ledger, tmp_path / "batches").stopped_by is None
        assert statuses(ledger, made) == {"answered": 12} and set(paid(api, made).values()) == {1}


def test_a_queue_with_room_for_one_batch(tmp_path: Path, ledger: Ledger) -> None:
    with serve_batches(good, lambda _: Outcome(num_polls=3)) as api:
        api.in_queue_limit = 5
        made = task(api.url)
        write_batches(made, CAPTIONS, ledger, tmp_path / "batches", limits=LIMITS)
        assert run(made, ledger, tmp_path / "batches").num_rounds == 1
        assert statuses(ledger, made) == {"answered": 12} and set(paid(api, made).values()) == {1}
        assert api.events["upload"] == 3


def test_429_at_creation_leaves_the_rest_for_later(tmp_path: Path, ledger: Ledger) -> None:
    faults = [Fault("create", 2, 429, "Enqueued token limit reached", "token_limit_exceeded")]
    with serve_batches(good, lambda number: Outcome(num_polls=3 if number == 1 else 1), faults) as api:
        made, folder = task(api.url), tmp_path / "batches"
        write_batches(made, CAPTIONS, ledger, folder, limits=LIMITS)
        submitted = submit(made, folder)
        assert (submitted.num_submitted, submitted.num_waiting) == (2, 1)
        assert submitted.reason == "HTTP 429 token_limit_exceeded"
        assert submit(made, folder).num_submitted == 0 and api.events["create"] == 3  # none has ended since
        poll(made, folder, wait=False)
        assert poll(made, folder, wait=False).statuses == {"completed": 1, "in_progress": 1}
        assert collect(made, CAPTIONS, ledger, folder).num_answered == 4
        assert submit(made, folder).num_submitted == 1
        assert collect(made, CAPTIONS, ledger, folder).num_answered == 0
        assert poll(made, folder, interval_s=0.01).statuses == {"completed": 3}
        assert collect(made, CAPTIONS, ledger, folder).num_answered == 8
        assert set(paid(api, made).values()) == {1}
    faults = [Fault("create", 0, 429, "You exceeded your current quota", "insufficient_quota")]
    with serve_batches(good, faults=faults) as api:
        made, folder = task(api.url), tmp_path / "poor"
        with Ledger(tmp_path / "empty.sqlite") as empty, pytest.raises(InputError, match="HTTP 429 insufficient_quota"):
            run(made, empty, folder)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("upload", 1, 500),
        Fault("create", 1, None, done=True),  # the answer is lost
        Fault("create", 1, 500, done=True),
        Fault("create", 1, 503),
        Fault("retrieve", 1, None),
        Fault("content", 1, None, done=True),  # in the middle of the body
    ],
    ids=lambda fault: f"{fault.event}-{fault.status}-{fault.done}",
)
def test_a_server_that_stumbles(tmp_path: Path, ledger: Ledger, fault: Fault) -> None:
    with serve_batches(good, faults=[fault]) as api:
        made = task(api.url)
        assert run(made, ledger, tmp_path / "batches").num_rounds == 1
        assert statuses(ledger, made) == {"answered": 12}
        assert set(paid(api, made).values()) == {1} and len(api.batches) == 3


def test_key_refused_no_server_a_batch_that_is_gone(tmp_path: Path, ledger: Ledger) -> None:
    with serve_batches(good, faults=[Fault("upload", 0, 401, f"Incorrect key {KEY}")]) as api:
        made, folder = task(api.url), tmp_path / "batches"
        with pytest.raises(InputError, match=r"uploading requests-000\.jsonl: HTTP 401") as caught:
            run(made, ledger, folder)
        assert KEY not in str(caught.value) and "Incorrect" not in str(caught.value) and api.events["upload"] == 1
        assert submit(made, folder).num_submitted == 3
        api.batches.clear()
        with pytest.raises(InputError, match=r"batch_0 of requests-000.*HTTP 404"):
            poll(made, folder, interval_s=0.01)
    with pytest.raises(InputError, match="no answer; is the server up"):
        run(task("http://127.0.0.1:9/v1", max_retries=0), ledger, tmp_path / "other")


def test_pilot_and_budget(tmp_path: Path, ledger: Ledger) -> None:
    always_wrong = Line("not JSON")
    with serve_batches(lambda body, n: always_wrong if caption_of(body) == CAPTIONS[0] else good(body)) as api:
        made = task(api.url)
        run(made, ledger, tmp_path / "pilot", limit=3)
        assert paid(api, made) == {CAPTIONS[0]: 2, CAPTIONS[1]: 1, CAPTIONS[2]: 1}
        # an answer costs (700 + 50 * 10) / 1e6 / 2 = 0.0006 dollars; at most it could (bytes + 800 * 10) / 1e6 / 2
        price = {"tiny": Price(input_usd=1.0, output_usd=10.0)}
        priced = task(api.url, prices=price)
        stopped = run(priced, ledger, tmp_path / "rest", max_usd=0.009)
        assert stopped.stopped_by is not None and stopped.stopped_by.startswith("max_usd")
        num_paid = sum(paid(api, made).values()) - 4
        assert 1 < num_paid < 9 and num_paid * 0.0006 <= 0.009


BEGIN = """
import os, sys
from pathlib import Path
from tests.integration.test_batch_api import CAPTIONS, LIMITS, task
from data_prep.captions.batch_api import collect, run_batches, write_batches
from data_prep.captions.ledger import Ledger
made, folder, ledger = task(sys.argv[1]), Path(sys.argv[2]) / "batches", Ledger(Path(sys.argv[2]) / "answers.sqlite")
def dying():
    yield from CAPTIONS[:8]
    os.kill(os.getpid(), 9)
"""
RUN = BEGIN + "run_batches(made, lambda: CAPTIONS, ledger, folder, limits=LIMITS, interval_s=0.01)"
WRITE = BEGIN + "write_batches(made, dying(), ledger, folder, limits=LIMITS)"
COLLECT = BEGIN + "collect(made, dying(), ledger, folder)"


def start(script: str, url: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, url, str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def run_and_be_killed(api: BatchApi, folder: Path, moment: tuple[str, int, str]) -> None:
    with api.lock:  # the server waits until it knows whom to kill
        process = start(RUN, api.url, folder)
        api.pid, api.kill = process.pid, moment
    assert process.wait(timeout=60) == -9


def test_killed_at_every_step_and_resumed(tmp_path: Path) -> None:
    """One preparation, killed before and after the server has done what it was asked, at each kind of step."""

    def answer(body: dict[str, Any], number: int) -> Line:
        unusable = number == 0 and caption_of(body) in CAPTIONS[:2]
        return Line("not JSON") if unusable else good(body)

    moments = [
        ("upload", 0, "before"), ("upload", 1, "after"), ("create", 0, "before"), ("create", 1, "after"),
        ("create", 2, "after"), ("retrieve", 1, "after"), ("content", 0, "after"), ("content", 1, "after"),
        ("content", 3, "before"), ("create", 4, "after"),
    ]  # fmt: skip
    with serve_batches(answer, lambda number: Outcome("expired", share_done=0.5) if number == 2 else Outcome()) as api:
        made = task(api.url)
        for moment in moments:
            run_and_be_killed(api, tmp_path, moment)
        with Ledger(tmp_path / "answers.sqlite") as ledger:
            run(made, ledger, tmp_path / "batches")
            assert statuses(ledger, made) == {"answered": 12}
            assert paid(api, made) == {caption: 2 if caption in CAPTIONS[:2] else 1 for caption in CAPTIONS}
            assert ledger.paid_tokens(made) == (14 * 700, 14 * 50)
        assert len(api.batches) == 4
        assert len({batch.body["input_file_id"] for batch in api.batches.values()}) == 4


def test_killed_while_requests_are_written_and_answers_taken(tmp_path: Path) -> None:
    with serve_batches(lambda body, number: Line("not JSON") if number == 0 else good(body)) as api:
        made, folder = task(api.url), tmp_path / "batches"
        assert start(WRITE, api.url, tmp_path).wait(timeout=60) == -9
        with Ledger(tmp_path / "answers.sqlite") as ledger:
            assert 4 <= write_batches(made, CAPTIONS, ledger, folder).num_written <= 8
            submit(made, folder)
            poll(made, folder, interval_s=0.01)
            assert set(paid(api, made).values()) == {1}
        # the ledger gets answers of batches whose collection the state does not know to have begun
        assert start(COLLECT, api.url, tmp_path).wait(timeout=60) == -9
        with Ledger(tmp_path / "answers.sqlite") as ledger:
            assert statuses(ledger, made) == {"failed": 8, "None": 4}
            assert collect(made, CAPTIONS, ledger, folder).num_failed == 12
            answers = [ledger.get(request_key(made, made.identity(caption))) for caption in CAPTIONS]
            assert {answer.num_attempts for answer in answers if answer is not None} == {1}
            assert ledger.paid_tokens(made) == (12 * 700, 12 * 50)
            assert run(made, ledger, folder).num_rounds == 1
            assert statuses(ledger, made) == {"answered": 12} and set(paid(api, made).values()) == {2}
