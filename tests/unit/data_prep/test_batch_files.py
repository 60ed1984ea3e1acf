"""Files of requests, and answers out of files of results: no network."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.captions.asking import ask
from data_prep.captions.batch_api import BatchLimits, collect_files, run_batches, write_batches
from data_prep.captions.batch_state import BatchState, pending_questions
from data_prep.captions.describe import ReportTask, Undescribed
from data_prep.captions.estimate import estimate
from data_prep.captions.ledger import Answer, Ledger
from data_prep.captions.limits import PromptTokens, format_usd
from data_prep.captions.subcaptions import SubcaptionsTask
from data_prep.captions.tasks import request_body, request_key
from data_prep.config import LLMDecomposer, LLMDescriber, Price
from data_prep.errors import InputError

OPTIONS = LLMDecomposer(model="tiny", base_url="http://127.0.0.1:9/v1", api_key_env="UNSET_KEY")
TASK = SubcaptionsTask(OPTIONS)
CAPTIONS = [f"Scaly pink plaque number {number} on the left shin." for number in range(10)]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "answers.sqlite") as opened:
        yield opened


def key(caption: str) -> str:
    return request_key(TASK, TASK.identity(caption))


def request_lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("requests-*")
    }


def vllm_line(caption: str, content: str | None = None, **body_changes: Any) -> str:
    """As `vllm run-batch` writes it: more fields than OpenAI's."""
    answer = json.dumps({"subcaptions": [{"aspect": "morphology", "text": caption}]}) if content is None else content
    body = {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "tiny", "service_tier": None,
        "choices": [{
            "index": 0, "finish_reason": "stop", "stop_reason": None, "logprobs": None, "token_ids": None,
            "message": {"role": "assistant", "content": answer, "refusal": None, "reasoning": None, "tool_calls": []},
        }],
        "usage": {"prompt_tokens": 600, "total_tokens": 640, "completion_tokens": 40}, "prompt_logprobs": None,
    } | body_changes  # fmt: skip
    response = {"status_code": 200, "request_id": "vllm-batch-1", "body": body}
    return json.dumps({"id": "vllm-1", "custom_id": key(caption), "response": response, "error": None})


def vllm_error(caption: str, error: object) -> str:
    response = {"status_code": 400, "request_id": "vllm-batch-1", "body": None}
    return json.dumps({"id": "vllm-1", "custom_id": key(caption), "response": response, "error": error})


def test_requests_are_those_of_calls_and_split_by_number_and_bytes(tmp_path: Path, ledger: Ledger) -> None:
    ledger.put(key(CAPTIONS[3]), TASK, Answer("answered", raw="{}"))
    ledger.put(key(CAPTIONS[4]), TASK, Answer("unanswered", failure="HTTP 500"))
    folder = tmp_path / "batches"
    written = write_batches(TASK, CAPTIONS + CAPTIONS[:2], ledger, folder, limits=BatchLimits(max_requests=4))
    assert (written.num_files, written.num_written, written.num_already) == (3, 9, 1)
    assert (written.num_pending, written.num_repeated) == (0, 2) and "2 repeated" in str(written)
    lines = request_lines(folder)
    assert {name: len(requests) for name, requests in lines.items()} == {
        "requests-000.jsonl": 4, "requests-001.jsonl": 4, "requests-002.jsonl": 1,
    }  # fmt: skip
    expected = [caption for caption in CAPTIONS if caption != CAPTIONS[3]]
    assert [request for name in sorted(lines) for request in lines[name]] == [
        {"custom_id": key(c), "method": "POST", "url": "/v1/chat/completions", "body": request_body(TASK, c)}
        for c in expected
    ]
    again = write_batches(TASK, CAPTIONS, ledger, folder)
    assert (again.num_written, again.num_pending, again.num_repeated) == (0, 9, 0)

    num_bytes = len(json.dumps(lines["requests-000.jsonl"][0])) + 1
    by_bytes = write_batches(TASK, CAPTIONS, ledger, tmp_path / "b", limits=BatchLimits(max_bytes=2 * num_bytes + 10))
    assert by_bytes.num_files == 5
    assert all(path.stat().st_size <= 2 * num_bytes + 10 for path in (tmp_path / "b").glob("requests-*"))
    with pytest.raises(InputError, match="more than a file may have"):
        write_batches(TASK, CAPTIONS, ledger, tmp_path / "c", limits=BatchLimits(max_bytes=num_bytes - 10))
    by_tokens = write_batches(TASK, CAPTIONS, ledger, tmp_path / "d", limits=BatchLimits(max_tokens=1500))
    assert 3 <= by_tokens.num_files <= 9


def test_a_writer_that_fails_leaves_whole_files_only(tmp_path: Path, ledger: Ledger) -> None:
    def items() -> Iterator[str]:
        yield from CAPTIONS[:7]
        raise RuntimeError("killed")

    folder = tmp_path / "batches"
    with pytest.raises(RuntimeError, match="killed"):
        write_batches(TASK, items(), ledger, folder, limits=BatchLimits(max_requests=3))
    (folder / "requests-007.jsonl").write_text("of a process that was killed before it could commit\n")
    assert write_batches(TASK, CAPTIONS, ledger, folder, limits=BatchLimits(max_requests=3)).num_written == 4
    ids = [request["custom_id"] for requests in request_lines(folder).values() for request in requests]
    assert sorted(ids) == sorted(map(key, CAPTIONS))


def test_limit_budget_and_a_folder_of_another_task(tmp_path: Path, ledger: Ledger) -> None:
    written = write_batches(TASK, CAPTIONS, ledger, tmp_path / "a", limit=3)
    assert (written.num_written, written.num_left, written.stopped_by) == (3, 7, "limit")
    with pytest.raises(InputError, match="needs a price"):
        write_batches(TASK, CAPTIONS, ledger, tmp_path / "b", max_usd=1.0)
    # output alone: 800 tokens a request, at 10 dollars a million and half the price 0.004 dollars
    price = {"tiny": Price(input_usd=0.0, output_usd=10.0)}
    priced = SubcaptionsTask(OPTIONS.model_copy(update={"prices": price, "max_usd": 0.0125}))
    written = write_batches(priced, CAPTIONS, ledger, tmp_path / "b")
    assert (written.num_written, written.num_left, written.stopped_by) == (3, 7, "max_usd")
    assert write_batches(priced, CAPTIONS, ledger, tmp_path / "b").num_written == 0  # what is out counts
    other = SubcaptionsTask(OPTIONS.model_copy(update={"model": "large"}))
    with pytest.raises(InputError, match=r"'tiny'.*give another folder"):
        write_batches(other, CAPTIONS, ledger, tmp_path / "a")
    with (
        BatchState(tmp_path / "a", TASK),
        pytest.raises(InputError, match="a command that works on these batches is running"),
    ):
        write_batches(TASK, CAPTIONS, ledger, tmp_path / "a")
    with pytest.raises(InputError, match="write them first"):
        collect_files(TASK, CAPTIONS, ledger, tmp_path / "none", [])


def test_results_of_vllm(tmp_path: Path, ledger: Ledger) -> None:
    folder, results = tmp_path / "batches", tmp_path / "results-000.jsonl"
    write_batches(TASK, CAPTIONS, ledger, folder, limits=BatchLimits(max_requests=8))
    lines = [
        vllm_error(CAPTIONS[1], "out of memory"),
        vllm_line(CAPTIONS[1]),  # repeated: an answer is worth more than an error
        vllm_line(CAPTIONS[0]),
        vllm_line(CAPTIONS[0], "not JSON"),  # repeated: the first counts
        vllm_line(CAPTIONS[2], "not JSON"),
        vllm_line(CAPTIONS[3], vllm_line(CAPTIONS[4])),  # the schema of something else
        vllm_line(CAPTIONS[4], choices=[{"finish_reason": "length", "message": {"content": '{"subcap'}}]),
        vllm_error(CAPTIONS[5], f"prompt is too long: {CAPTIONS[5]}"),
        vllm_error(CAPTIONS[6], {"error": {"message": "bad image", "type": "BadRequestError", "code": 400}}),
        vllm_line("Never asked about by anybody."),
        '{"custom_id": "cut of',
    ]
    results.write_text("\n".join(lines))
    summary = collect_files(TASK, CAPTIONS, ledger, folder, [results])
    assert (summary.num_answered, summary.num_failed, summary.num_unanswered) == (2, 3, 3)  # of the first file
    assert (summary.num_repeated, summary.num_unknown, summary.num_malformed) == (2, 1, 1)

    def state(caption: str) -> tuple[str, str | None, int]:
        answer = ledger.get(key(caption))
        assert answer is not None
        return answer.status, answer.failure, answer.num_attempts

    assert state(CAPTIONS[0]) == state(CAPTIONS[1]) == ("answered", None, 1)
    assert state(CAPTIONS[2]) == ("failed", "malformed JSON", 1)
    assert state(CAPTIONS[4]) == ("failed", "cut off at max_output_tokens", 1)
    assert state(CAPTIONS[5])[:2] == state(CAPTIONS[6])[:2] == ("unanswered", "HTTP 400")
    said = [(ledger.get(key(CAPTIONS[i])) or Answer("failed")).raw for i in (5, 6)]
    assert said == [f"prompt is too long: {CAPTIONS[5]}", "bad image"]
    assert CAPTIONS[5] not in str(summary)
    assert state(CAPTIONS[7])[:2] == ("unanswered", "no line in the file of results")
    assert ledger.get(key(CAPTIONS[8])) is None  # of the other file, which is still to be run
    assert set(request_lines(folder)) == {"requests-001.jsonl"}
    assert ledger.paid_tokens(TASK) == (5 * 600, 5 * 40)

    # the same file again, and longer: what is known stays, what was missing is taken
    with results.open("a") as file:
        file.write("\n" + vllm_line(CAPTIONS[7]) + "\n")
    again = collect_files(TASK, CAPTIONS, ledger, folder, [results])
    assert (again.num_answered, again.num_failed, again.num_unknown) == (1, 0, 1)
    assert again.num_known == 7 and "7 lines already collected" in str(again)
    assert state(CAPTIONS[2])[2] == 1

    with BatchState(folder, TASK) as opened:
        assert pending_questions(folder) == opened.num_pending() == 2  # of the other file; it need not be closed

    # what failed, was cut off or got no answer is written again, once; with twice the room where it was cut off
    assert write_batches(TASK, CAPTIONS, ledger, folder).num_written == 5
    rewritten = {request["custom_id"]: request["body"] for request in request_lines(folder)["requests-002.jsonl"]}
    assert set(rewritten) == {key(CAPTIONS[i]) for i in (2, 3, 4, 5, 6)}
    assert rewritten[key(CAPTIONS[4])]["max_tokens"] == 2 * rewritten[key(CAPTIONS[3])]["max_tokens"]
    second = tmp_path / "results-002.jsonl"
    second.write_text("\n".join([vllm_line(CAPTIONS[2], "no"), *(vllm_line(CAPTIONS[i]) for i in (3, 4, 5, 6, 8, 9))]))
    collect_files(TASK, CAPTIONS, ledger, folder, [second])
    assert state(CAPTIONS[2]) == ("failed", "malformed JSON", 2)
    assert (ledger.get(key(CAPTIONS[2])) or Answer("failed")).raw_failures == (("malformed JSON", "not JSON"),)
    retried = ledger.get(key(CAPTIONS[2]))
    assert retried is not None and (retried.num_tokens_in, retried.num_tokens_out) == (1200, 80)  # of both attempts
    assert ledger.paid_tokens(TASK) == (13 * 600, 13 * 40)
    assert ledger.usage(TASK).max_tokens_in == 600
    assert state(CAPTIONS[3]) == ("answered", None, 2) and state(CAPTIONS[5]) == ("answered", None, 1)
    assert write_batches(TASK, CAPTIONS, ledger, folder).num_written == 0
    assert request_lines(folder) == {}
    assert write_batches(TASK, CAPTIONS, ledger, folder, retry_failed=True).num_written == 1


def test_answers_whose_items_are_not_given_stay_to_be_had(tmp_path: Path, ledger: Ledger) -> None:
    folder, results = tmp_path / "batches", tmp_path / "results.jsonl"
    write_batches(TASK, CAPTIONS[:4], ledger, folder)
    results.write_text("\n".join(map(vllm_line, CAPTIONS[:4])))
    first = collect_files(TASK, CAPTIONS[:3], ledger, folder, [results])
    assert (first.num_answered, first.num_without_item) == (3, 1)
    assert list(request_lines(folder)) == ["requests-000.jsonl"]
    assert collect_files(TASK, CAPTIONS[:4], ledger, folder, [results]).num_answered == 1
    assert request_lines(folder) == {}
    with pytest.raises(InputError, match=r"no\.jsonl: cannot be read"):
        collect_files(TASK, CAPTIONS, ledger, folder, [tmp_path / "no.jsonl"])


def test_a_file_of_something_else_is_no_results(tmp_path: Path, ledger: Ledger) -> None:
    folder, wrong = tmp_path / "batches", tmp_path / "captions.csv"
    write_batches(TASK, CAPTIONS[:2], ledger, folder)
    wrong.write_text("image,caption\n1.jpg,Red plaque\n")
    for path in (wrong, folder / "requests-000.jsonl"):
        with pytest.raises(InputError, match=f"{path.name}: no line of it is a result"):
            collect_files(TASK, CAPTIONS, ledger, folder, [path])
    assert pending_questions(folder) == 2 and ledger.status(key(CAPTIONS[0])) is None


def test_pending_questions_of_no_folder_and_of_no_state(tmp_path: Path) -> None:
    assert pending_questions(tmp_path / "none") == 0 and not (tmp_path / "none").exists()
    (tmp_path / "batches.sqlite").write_text("not a database, but long enough to be looked at\n" * 40)
    with pytest.raises(InputError, match=r"batches\.sqlite: cannot be read"):
        pending_questions(tmp_path)


@pytest.mark.parametrize("max_usd", [math.nan, -1.0, 0.0, math.inf])
def test_money_and_limits_that_are_none(tmp_path: Path, ledger: Ledger, max_usd: float) -> None:
    priced = SubcaptionsTask(OPTIONS.model_copy(update={"prices": {"tiny": Price(input_usd=1.0, output_usd=1.0)}}))
    for step in (
        lambda **how: write_batches(priced, CAPTIONS, ledger, tmp_path / "b", **how),
        lambda **how: run_batches(priced, lambda: CAPTIONS, ledger, tmp_path / "b", **how),
        lambda **how: ask(priced, CAPTIONS, ledger, **how),
    ):
        with pytest.raises(InputError, match=r"max_usd: .* is no amount to spend"):
            step(max_usd=max_usd)
        with pytest.raises(InputError, match=r"limit: .* is no number of questions"):
            step(limit=-3)
    assert not (tmp_path / "b").exists()


def image_task(**changes: Any) -> ReportTask:
    values = {"model": "vl", "base_url": "http://127.0.0.1:9/v1", "prices": {"vl": {"input_usd": 1.0, "output_usd": 0}}}
    return ReportTask(LLMDescriber.model_validate(values | {"batch_discount": 0.0, "image_px": 64} | changes))


def images(num: int) -> list[Undescribed]:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, format="JPEG")
    return [Undescribed(f"{number:064x}", buffer.getvalue, "eczema") for number in range(num)]


def test_what_an_image_can_take_bounds_the_money_until_answers_tell(tmp_path: Path, ledger: Ledger) -> None:
    """At a dollar a million tokens, 0.05 dollars are 50,000 tokens: four questions of 9,000 for the image alone."""
    made, items = image_task(max_usd=0.05), images(60)
    assert write_batches(made, items, ledger, tmp_path / "first").num_written == 4
    assert write_batches(image_task(max_usd=0.05, image_tokens=20_000), items, ledger, tmp_path / "o").num_written == 2
    messages = made.messages(items[0])
    assert PromptTokens(made, ledger).at_most(messages) > 9000 and PromptTokens(made, ledger).estimated(messages) > 9000
    assert estimate(made, items, ledger).num_tokens_in > 60 * 9000
    for number, item in enumerate(items[:20]):  # two attempts each: 6,000 tokens a prompt, once 6,500
        num_in = 13_000 if number == 7 else 12_000
        answer = Answer("answered", "{}", None, num_in, 0, num_attempts=2, num_bytes_in=1500)
        ledger.put(request_key(made, made.identity(item)), made, answer)
    assert PromptTokens(made, ledger).at_most(messages) == 6500
    assert PromptTokens(made, ledger).estimated(messages) == 6025
    assert write_batches(made, items, ledger, tmp_path / "second").num_written == 7


def test_money_is_printed_with_the_digits_that_count() -> None:
    amounts = {
        0.0: "0.00",
        0.000123456: "0.0001235",
        0.05: "0.05000",
        1.5: "1.500",
        12.345: "12.35",
        123456.7: "123456.70",
    }
    assert {usd: format_usd(usd) for usd in amounts} == amounts
