"""Pilots, budgets, pace and the estimate before: what a run may ask, and how fast."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.captions.asking import ask
from data_prep.captions.decompose import make_decomposer
from data_prep.captions.estimate import estimate, format_estimate
from data_prep.captions.ledger import Answer, Ledger
from data_prep.captions.limits import Budget, Pace
from data_prep.captions.llm import LLMSplitter
from data_prep.captions.report import main as report
from data_prep.captions.subcaptions import SubcaptionsTask
from data_prep.captions.tasks import request_key
from data_prep.config import LLMDecomposer, NoDecomposer
from data_prep.errors import InputError
from data_prep.schema import Aspect
from tests.integration.llm_server import Reply, answer, serve

#: a token of output costs a tenth of a cent, input nothing: an answer of the test server 0.005 dollars, at most 0.8
PRICES = {"tiny": {"input_usd": 0.0, "output_usd": 1000.0}}
CAPTIONS = [f"Scaly red plaque number {number} on the left elbow." for number in range(30)]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def config(url: str, **changes: object) -> LLMDecomposer:
    values: dict[str, object] = {"model": "tiny", "base_url": url, "concurrency": 4, "timeout_s": 5.0}
    return LLMDecomposer.model_validate(values | changes)


def script(caption: str) -> list[Reply]:
    return [answer(("morphology", caption.split(" on ")[0]), ("body_site", "on the left elbow"))]


# ---------------------------------------------------------------------------------------------- what is asked


def test_a_pilot_asks_so_many_and_says_what_is_left(tmp_path: Path) -> None:
    with serve(script) as server:
        decomposer = LLMSplitter(config(server.url), tmp_path / "l.sqlite")
        first = decomposer.prepare([*CAPTIONS, *CAPTIONS], limit=7)
        assert server.num_requests.total() == 7
        assert (first.num_distinct, first.num_answered, first.num_left, first.stopped_by) == (30, 7, 23, "limit")
        assert "stopped by limit with 23 left" in str(first)
        with pytest.raises(InputError, match="without limit"):
            decomposer.decompose(CAPTIONS[20])
        second = decomposer.prepare(CAPTIONS, limit=7)
        assert (second.num_already, second.num_left) == (7, 16)
        third = decomposer.prepare(CAPTIONS, limit=16)
        assert (third.num_left, third.stopped_by) == (0, None)
        assert set(server.num_requests.values()) == {1} and len(server.num_requests) == 30
    made = decomposer.decompose(CAPTIONS[0])
    date = made.subcaptions[0].origin.rpartition(":")[2]
    assert made.subcaptions[0].origin == f"{decomposer.name}:{date}" and len(date) == len("2026-01-02")


def test_short_captions_and_none_are_not_asked(tmp_path: Path) -> None:
    with serve(script) as server:
        decomposer = LLMSplitter(config(server.url), tmp_path / "l.sqlite")
        decomposer.prepare(
            ["Lichen planus.", "Discoid lupus erythematosus", "  Red   plaque on arm. ", "Red plaque on arm."]
        )
        assert dict(server.num_requests) == {"Red plaque on arm.": 1}  # of two that differ in spaces
    made = decomposer.decompose("Lichen planus.")
    assert [(sub.aspect, sub.text, sub.origin) for sub in made.subcaptions] == [
        (Aspect.IMPRESSION, "Lichen planus", "rules-1")
    ]
    assert (made.made_by, made.failure) == ("rules", None)
    none = make_decomposer(NoDecomposer(), tmp_path / "none.sqlite")
    assert (none.name, none.decompose(CAPTIONS[0]).subcaptions) == ("none", ())
    assert not (tmp_path / "none.sqlite").exists()


def test_sub_captions_must_fit_the_context(tmp_path: Path) -> None:
    def fits(text: str) -> bool:
        return len(text.split()) <= 4

    with serve(script) as server:
        decomposer = LLMSplitter(config(server.url), tmp_path / "l.sqlite", fits)
        decomposer.prepare(CAPTIONS[:1])
    made = decomposer.decompose(CAPTIONS[0])
    assert [sub.text for sub in made.subcaptions] == ["on the left elbow"]
    assert [dropped.reason for dropped in made.dropped] == ["too long: does not fit the context"]


def test_a_million_items_are_streamed(tmp_path: Path) -> None:
    """Items are taken as calls come free: never more than the calls in flight and one are ahead of the answers."""
    furthest = 0
    with serve(script) as server:

        def stream() -> Iterator[str]:
            nonlocal furthest
            for number, caption in enumerate(CAPTIONS):
                furthest = max(furthest, number - server.num_completed.total())
                yield caption

        with Ledger(tmp_path / "l.sqlite") as ledger:
            summary = ask(SubcaptionsTask(config(server.url)), stream(), ledger)
    assert summary.num_answered == 30 and furthest <= 4


def test_the_report_keeps_its_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = "\n".join(["filename,caption", *(f"{number}.jpg,{caption}" for number, caption in enumerate(CAPTIONS))])
    (tmp_path / "Derm1M_v2_pretrain.csv").write_text(table, encoding="utf-8")
    with serve(script) as server:
        decomposer = {"kind": "llm", "model": "tiny", "base_url": server.url}
        prepare = {"name": "x", "source": {"kind": "synthetic"}, "decomposer": decomposer, "out_dir": str(tmp_path)}
        (tmp_path / "config.yaml").write_text(json.dumps(prepare), encoding="utf-8")  # JSON is YAML
        options = ["--derm1m-dir", str(tmp_path), "--config", str(tmp_path / "config.yaml")]
        for num_known in (0, 30):
            assert report([*options, "--ledger", str(tmp_path / "kept.sqlite")]) == 0
            assert f"{num_known} known before" in capsys.readouterr().out
        assert server.num_requests.total() == 30


# ---------------------------------------------------------------------------------------------- money


def test_max_usd_stops_before_it_is_exceeded(tmp_path: Path) -> None:
    """Eleven answers at 0.005 dollars: a twelfth could cost 0.8, and 0.055 + 0.8 is more than 0.853."""
    with serve(script) as server:
        decomposer = LLMSplitter(config(server.url, prices=PRICES, max_usd=0.853), tmp_path / "l.sqlite")
        summary = decomposer.prepare(CAPTIONS)
        assert server.num_requests.total() == summary.num_answered == 11
        assert summary.usd == pytest.approx(0.055) and server.max_in_flight == 1
        assert (summary.stopped_by, summary.num_left) == ("max_usd", 19)
        more = decomposer.prepare(CAPTIONS, max_usd=100.0)
        assert (more.num_answered, more.num_left, server.num_requests.total()) == (19, 0, 30)
        assert server.max_in_flight > 1


def test_no_money_for_a_second_attempt_is_not_a_failure_for_good(tmp_path: Path) -> None:
    with serve(lambda _: [Reply("not JSON"), *script(CAPTIONS[0])]) as server:
        decomposer = LLMSplitter(config(server.url, prices=PRICES, max_usd=0.802), tmp_path / "l.sqlite")
        summary = decomposer.prepare(CAPTIONS[:1])
        assert (summary.num_unanswered, summary.stopped_by, server.num_requests.total()) == (1, "max_usd", 1)
        assert decomposer.prepare(CAPTIONS[:1], max_usd=1.0).num_answered == 1


def test_max_usd_needs_a_price(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a price of model 'tiny'"):
        LLMSplitter(config("http://127.0.0.1:9/v1", max_usd=1.0), tmp_path / "l.sqlite").prepare(CAPTIONS)


def test_budget_waits_for_what_is_in_flight() -> None:
    async def run() -> list[bool]:
        budget = Budget(1.0)
        assert await budget.reserve(0.7)
        waiting = asyncio.create_task(budget.reserve(0.6))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        budget.settle(0.7, 0.3)
        taken = await waiting
        budget.settle(0.6, 0.6)
        return [taken, await budget.reserve(0.2), await budget.reserve(0.05)]

    assert asyncio.run(run()) == [True, False, True]


# ---------------------------------------------------------------------------------------------- pace


def test_requests_per_minute_count_the_clients_own_retries(tmp_path: Path) -> None:
    """600 a minute: a request each 0.1 s, although eight captions are in flight and each is refused at first."""
    with serve(lambda caption: [Reply("slow down", 429), *script(caption)]) as server:
        settings = config(server.url, requests_per_minute=600, concurrency=8)
        summary = LLMSplitter(settings, tmp_path / "l.sqlite").prepare(CAPTIONS[:8])
    assert summary.num_answered == 8 and len(server.times_s) == 16
    times_s = sorted(server.times_s)
    assert times_s[-1] - times_s[0] >= 1.4
    # no window of half a second holds more than its five, and one that came late
    assert max(sum(start <= time_s < start + 0.5 for time_s in times_s) for start in times_s) <= 6


def test_tokens_per_minute(tmp_path: Path) -> None:
    """A question is counted with about 650 tokens and 800 of output: 0.145 s at 600,000 a minute."""
    with serve(script) as server:
        LLMSplitter(config(server.url, tokens_per_minute=600_000), tmp_path / "l.sqlite").prepare(CAPTIONS[:6])
    assert 0.5 <= max(server.times_s) - min(server.times_s) <= 5.0


def test_pace_serves_in_order_and_takes_amounts_above_a_minutes() -> None:
    async def run() -> list[float]:
        loop = asyncio.get_running_loop()
        start_s, pace, done = loop.time(), Pace(600.0), list[float]()  # ten a second

        async def take(amount: float) -> None:
            await pace.acquire(amount)
            done.append(amount)

        await asyncio.gather(*(take(amount) for amount in (3.0, 1.0, 2.0)))
        assert loop.time() - start_s == pytest.approx(0.4, abs=0.2)
        pace = Pace(60.0)
        await pace.acquire(1000.0)  # at once, and the next would wait for it
        assert loop.time() - start_s < 2.0
        return done

    assert asyncio.run(run()) == [3.0, 1.0, 2.0]


# ---------------------------------------------------------------------------------------------- estimate


def test_estimate_by_rule_of_thumb_spends_nothing(tmp_path: Path) -> None:
    options = config("http://127.0.0.1:9/v1", prices={"tiny": {"input_usd": 2.0, "output_usd": 10.0}}, concurrency=10)
    task = SubcaptionsTask(options)
    found = estimate(task, [*CAPTIONS, *CAPTIONS[:5]])
    num_bytes = sum(len(message["content"].encode()) for caption in CAPTIONS for message in task.messages(caption))
    assert (found.num_items, found.num_questions, found.num_to_ask) == (35, 30, 30)
    assert found.num_tokens_in == pytest.approx(num_bytes / 4, rel=0.05)
    assert found.num_tokens_out == 30 * 200 and "rule of thumb" in found.tokens_from
    assert found.usd == pytest.approx((2.0 * found.num_tokens_in + 10.0 * 6000) / 1e6)
    assert found.batch_usd == pytest.approx((found.usd or 0) / 2)
    assert found.hours == pytest.approx(30 * 3 / 10 / 3600) and "assumed" in found.hours_from
    slow = SubcaptionsTask(options.model_copy(update={"requests_per_minute": 2, "prices": {}}))
    assert estimate(slow, CAPTIONS).hours == pytest.approx(0.25)
    text = format_estimate(estimate(slow, CAPTIONS))
    assert "no price of tiny" in text and "2 requests per minute" in text and "nothing was asked" in text


def test_estimate_from_the_ledger(tmp_path: Path) -> None:
    with serve(script) as server:
        splitter = LLMSplitter(config(server.url), tmp_path / "l.sqlite")
        splitter.prepare(CAPTIONS, limit=20)
    twice_as_long = [caption + " " + "x" * len(json.dumps(splitter.task.messages(caption))) for caption in CAPTIONS]
    known = estimate(splitter.task, CAPTIONS, splitter.ledger)
    assert (known.num_answered, known.num_to_ask, known.num_paid_in) == (20, 10, 140)
    assert (known.num_tokens_in, known.num_tokens_out) == (70, 50)  # 7 and 5 an answer, as the server says
    assert "20 answers" in known.tokens_from and "measured" in known.hours_from and known.usd is None
    assert 130 <= estimate(splitter.task, twice_as_long[:10], splitter.ledger).num_tokens_in <= 160
    # ten that failed at twice the attempts count as well: (20 x 7 + 10 x 28) / 30 tokens a question, 4/3 calls
    for number in range(10):
        num_bytes = len("".join(message["content"] for message in splitter.task.messages(CAPTIONS[0])).encode())
        failed = Answer("failed", "no", None, 28, 10, 2, "malformed JSON", num_bytes_in=num_bytes)
        splitter.ledger.put(f"{number:064x}", splitter.task, failed)
    after = estimate(splitter.task, CAPTIONS, splitter.ledger)
    assert after.num_tokens_in == pytest.approx(140, abs=2) and after.num_tokens_out == 67
    assert "30 answers" in after.tokens_from
    key = request_key(splitter.task, splitter.task.identity(CAPTIONS[25]))
    splitter.ledger.put(key, splitter.task, Answer("unanswered", failure="HTTP 500"))
    assert estimate(splitter.task, CAPTIONS, splitter.ledger).num_to_ask == 10
