"""What a server, a killed process and a full disk do to a decomposition: nothing lost, nothing asked twice."""

from __future__ import annotations

import multiprocessing
import random
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from data_prep.captions.asking import AskSummary
from data_prep.captions.ledger import Answer, Ledger, merge_ledgers
from data_prep.captions.llm import LLMSplitter
from data_prep.captions.subcaptions import SubcaptionsTask
from data_prep.captions.tasks import request_key
from data_prep.config import LLMDecomposer
from data_prep.errors import InputError
from tests.integration.llm_server import LLMServer, Reply, answer, serve

CAPTION = "Pearly papule on the nose with fine vessels."
GOOD = answer(("morphology", "Pearly papule with fine vessels"), ("body_site", "On the nose"))
OTHERS = answer(("morphology", "Tense blisters"), ("body_site", "On both shins"))
CONCURRENCY = 4


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def config(url: str, **changes: object) -> LLMDecomposer:
    values: dict[str, object] = {"model": "tiny", "base_url": url, "concurrency": CONCURRENCY, "timeout_s": 5.0}
    return LLMDecomposer.model_validate(values | changes)


def numbered(number: int) -> str:
    return f"Scaly red plaque number {number} on the left elbow."


def reply_to(caption: str, delay_s: float = 0.0) -> Reply:
    """What `numbered` captions get."""
    good = answer(("morphology", caption.split(" on ")[0]), ("body_site", "on the left elbow"))
    return Reply(good.content, delay_s=delay_s)


def ask_one(first: Reply, ledger_path: Path, **changes: object) -> tuple[AskSummary, LLMServer, Answer]:
    with serve(lambda _: [first, GOOD]) as server:
        splitter = LLMSplitter(config(server.url, **changes), ledger_path)
        summary = splitter.prepare([CAPTION])
        found = splitter.ledger.get(request_key(splitter.task, CAPTION))
    assert found is not None
    return summary, server, found


# ---------------------------------------------------------------------------------------------- the server's faults


@pytest.mark.parametrize(
    ("first", "changes", "min_wait_s"),
    [
        pytest.param(Reply("slow down", 429, headers={"Retry-After": "1"}), {}, 1.0, id="429"),
        pytest.param(Reply("oops", 500), {}, 0.0, id="500"),
        pytest.param(Reply(GOOD.content, delay_s=1.5), {"timeout_s": 0.3}, 0.3, id="hangs"),
        pytest.param(Reply(GOOD.content, closes_after=40), {}, 0.0, id="closes mid-body"),
    ],
)
def test_the_client_asks_again(tmp_path: Path, first: Reply, changes: dict[str, object], min_wait_s: float) -> None:
    summary, server, found = ask_one(first, tmp_path / "l.sqlite", max_retries=1, **changes)
    assert (summary.num_answered, summary.num_failed, summary.num_unanswered) == (1, 0, 0)
    assert found.status == "answered" and found.num_attempts == 1 and found.raw_failures == ()
    assert server.num_requests[CAPTION] == 2
    assert server.times_s[1] - server.times_s[0] >= min_wait_s


@pytest.mark.parametrize(
    ("first", "failure"),
    [
        (OTHERS, "all sub-captions dropped"),
        (Reply("not JSON"), "malformed JSON"),
        (Reply(None), "empty answer"),
        (Reply(None, refusal="I cannot help."), "refused by the model"),
        (Reply(GOOD.content, finish_reason="content_filter"), "stopped by the content filter"),
        (Reply(GOOD.content, finish_reason="length"), "cut off at max_output_tokens"),
    ],
)
def test_an_answer_that_cannot_be_used_is_kept_counted_and_asked_again(
    tmp_path: Path, first: Reply, failure: str
) -> None:
    """The first case is another request's answer: nothing in it is grounded in this caption."""
    summary, server, found = ask_one(first, tmp_path / "l.sqlite")
    assert (summary.num_answered, dict(summary.unusable)) == (1, {failure: 1})
    assert found.status == "answered" and found.raw == GOOD.content
    assert found.raw_failures == ((failure, first.refusal or first.content),)
    assert (found.num_attempts, found.num_tokens_in, summary.num_tokens_out) == (2, 14, 10)
    limits = [body["max_tokens"] for body in server.bodies]
    assert limits == [800, 1600 if first.finish_reason == "length" else 800]


@pytest.mark.parametrize(
    "first",
    [
        Reply(GOOD.content, closes_after=40),
        Reply(body=b'{"choices": [{"index"', content_type="application/json"),
        Reply(body=b'{"choices": [7]}', content_type="application/json"),
        Reply(body=b"[]", content_type="application/json"),
        Reply(body=b'"\xff\xfe', content_type="application/json"),
    ],
)
def test_no_answer_of_the_protocol_is_asked_again_in_the_next_run(tmp_path: Path, first: Reply) -> None:
    with serve(lambda _: [first, GOOD]) as server:
        settings = config(server.url, max_retries=0)
        summary = LLMSplitter(settings, tmp_path / "l.sqlite").prepare([CAPTION])
        assert (summary.num_unanswered, server.num_requests[CAPTION]) == (1, 1)
        splitter = LLMSplitter(settings, tmp_path / "l.sqlite")
        made = splitter.decompose(CAPTION)
        assert made.made_by == "rules" and made.failure is not None
        again = LLMSplitter(settings, tmp_path / "l.sqlite").prepare([CAPTION])
        assert (again.num_answered, server.num_requests[CAPTION]) == (1, 2)
    assert splitter.decompose(CAPTION).made_by == "llm"


def test_a_cut_answer_gets_twice_the_room_once(tmp_path: Path) -> None:
    with serve(lambda _: [Reply('{"sub', finish_reason="length")]) as server:
        splitter = LLMSplitter(config(server.url, max_attempts=5, on_failure="reject"), tmp_path / "l.sqlite")
        assert splitter.prepare([CAPTION]).num_failed == 1
        assert [body["max_tokens"] for body in server.bodies] == [800, 1600]
    made = splitter.decompose(CAPTION)
    assert (made.subcaptions, made.failure) == ((), "cut off at max_output_tokens")


# ---------------------------------------------------------------------------------------------- SIGKILL, two runs


def run_decomposition(url: str, ledger_path: Path, num_captions: int) -> None:
    """The body of a process of its own."""
    LLMSplitter(config(url), ledger_path).prepare(numbered(number) for number in range(num_captions))


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., multiprocessing.process.BaseProcess]]:
    """Processes forked from one that has imported everything, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.captions.llm", __name__])
    processes: list[multiprocessing.process.BaseProcess] = []

    def start_one(*arguments: object) -> multiprocessing.process.BaseProcess:
        processes.append(context.Process(target=run_decomposition, args=arguments))
        processes[-1].start()
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()
        process.join()


def answered_keys(ledger_path: Path) -> set[str]:
    if not ledger_path.exists():
        return set()
    with sqlite3.connect(ledger_path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone():
            return set()
        return {key for (key,) in connection.execute("SELECT request_key FROM answers WHERE status = 'answered'")}


def test_sigkill_at_twenty_moments(tmp_path: Path, start: Callable[..., multiprocessing.process.BaseProcess]) -> None:
    """A kill costs the calls in flight, at most `CONCURRENCY`; what was committed is never asked again."""
    draw = random.Random(20)
    captions = [numbered(number) for number in range(600)]
    ledger_path = tmp_path / "l.sqlite"
    with serve(lambda caption: [reply_to(caption, 0.02)]) as server:
        task = SubcaptionsTask(config(server.url))
        keys = {request_key(task, caption): caption for caption in captions}
        num_kills = 0
        while num_kills < 20:
            before, kept_before = server.num_requests.copy(), answered_keys(ledger_path)
            process = start(server.url, ledger_path, len(captions))
            deadline_s, num_wanted = time.monotonic() + 30, before.total() + draw.randrange(0, 30)
            while server.num_requests.total() < num_wanted and time.monotonic() < deadline_s:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.03))
            process.kill()
            process.join()
            assert process.exitcode == -9
            num_kills += 1
            time.sleep(0.06)  # replies to the dead run out
            asked, kept = server.num_requests - before, answered_keys(ledger_path)
            assert not {keys[key] for key in kept_before} & set(asked), "asked although committed"
            assert kept >= kept_before
            assert asked.total() - len(kept - kept_before) <= CONCURRENCY
        assert 20 < len(kept) < len(captions)

        process = start(server.url, ledger_path, len(captions))
        process.join(60)
        assert process.exitcode == 0
        assert answered_keys(ledger_path) == set(keys)
        assert server.num_requests.total() <= len(captions) + 20 * CONCURRENCY
    decomposer = LLMSplitter(config(server.url), ledger_path)
    assert {decomposer.decompose(caption).made_by for caption in captions} == {"llm"}


def test_two_runs_at_once(tmp_path: Path, start: Callable[..., multiprocessing.process.BaseProcess]) -> None:
    """The second is refused while it would pay for the same questions; reading is always allowed."""
    ledger_path = tmp_path / "l.sqlite"
    with serve(lambda caption: [reply_to(caption, 0.05)]) as server:
        process = start(server.url, ledger_path, 200)
        while server.num_completed.total() < 8:
            time.sleep(0.01)
        with pytest.raises(InputError, match=r"a run that asks with l\.sqlite is running already"):
            LLMSplitter(config(server.url), ledger_path).prepare([numbered(number) for number in range(200)])
        process.kill()
        process.join()
        summary = LLMSplitter(config(server.url), ledger_path).prepare([numbered(n) for n in range(20)])
        assert summary.num_answered + summary.num_already == 20
    assert LLMSplitter(config(server.url), ledger_path).decompose(numbered(3)).made_by == "llm"


# ---------------------------------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # the ledger may still be open


def test_full_disk(small_disk: Path) -> None:
    captions = [numbered(number) for number in range(300)]
    ledger_path = small_disk / "l.sqlite"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(500_000))

    def script(caption: str) -> Sequence[Reply]:
        content = reply_to(caption).content or ""
        return [Reply(content + " " * 4000)]

    with serve(script) as server:
        with pytest.raises(InputError, match=r"l\.sqlite: the ledger .* full; make space .* \d+ answered") as caught:
            LLMSplitter(config(server.url), ledger_path).prepare(captions)
        assert caught.value.__cause__ is None
        kept, num_asked = answered_keys(ledger_path), server.num_requests.total()
        assert 10 < len(kept) < 300 and num_asked - len(kept) <= CONCURRENCY
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
        decomposer = LLMSplitter(config(server.url), ledger_path)
        decomposer.prepare(captions)
        assert server.num_requests.total() == num_asked + 300 - len(kept)
    assert {decomposer.decompose(caption).made_by for caption in captions} == {"llm"}


# ---------------------------------------------------------------------------------------------- parts of a job array


def test_ledgers_of_parts_become_one(tmp_path: Path) -> None:
    task = SubcaptionsTask(config("http://127.0.0.1:9/v1"))
    parts = [tmp_path / f"part-{number}.sqlite" for number in range(2)]
    rows = (
        [("a", Answer("answered", "A", answered_on="2026-01-02")), ("b", Answer("failed", "B0", failure="empty"))],
        [("b", Answer("answered", "B1", num_tokens_in=5)), ("c", Answer("unanswered", failure="HTTP 500"))],
    )
    for part, answers in zip(parts, rows, strict=True):
        with Ledger(part) as ledger:
            for key, given in answers:
                ledger.put(key, task, given)
    target = tmp_path / "all.sqlite"
    with Ledger(target) as ledger:
        ledger.put("c", task, Answer("failed", "C", failure="empty answer", raw_failures=(("malformed JSON", "{"),)))
    for _ in range(2):  # a second time changes nothing
        merge_ledgers(target, [*parts, target])
        with Ledger(target) as ledger:
            a, b, c = (ledger.get(key) for key in "abc")
            assert a is not None and (a.raw, a.answered_on) == ("A", "2026-01-02")
            assert b is not None and (b.status, b.raw) == ("answered", "B1") and len(b.answered_on) == 10
            assert c is not None and c.status == "failed" and c.raw_failures == (("malformed JSON", "{"),)
            assert ledger.paid_tokens(task) == (5, 0)
    with pytest.raises(InputError, match=r"part-9\.sqlite: no such ledger"):
        merge_ledgers(target, [tmp_path / "part-9.sqlite"])
