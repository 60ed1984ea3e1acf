"""Files of requests, and answers out of files of results: no network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.captions.batch_api import BatchLimits, collect_files, write_batches
from data_prep.captions.batch_state import BatchState
from data_prep.captions.ledger import Answer, Ledger
from data_prep.captions.subcaptions import SubcaptionsTask
from data_prep.captions.tasks import request_body, request_key
from data_prep.config import LLMDecomposer, Price
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
    assert (written.num_files, written.num_written, written.num_already, written.num_pending) == (3, 9, 1, 2)
    lines = request_lines(folder)
    assert {name: len(requests) for name, requests in lines.items()} == {
        "requests-000.jsonl": 4, "requests-001.jsonl": 4, "requests-002.jsonl": 1,
    }  # fmt: skip
    expected = [caption for caption in CAPTIONS if caption != CAPTIONS[3]]
    assert [request for name in sorted(lines) for request in lines[name]] == [
        {"custom_id": key(c), "method": "POST", "url": "/v1/chat/completions", "body": request_body(TASK, c)}
        for c in expected
    ]
    assert write_batches(TASK, CAPTIONS, ledger, folder).num_written == 0

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
    with BatchState(tmp_path / "a", TASK), pytest.raises(InputError, match="another process"):
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
        vllm_error(CAPTIONS[5], "prompt is too long"),
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
    assert state(CAPTIONS[5])[:2] == ("unanswered", "HTTP 400: prompt is too long")
    assert state(CAPTIONS[6])[:2] == ("unanswered", "HTTP 400: bad image")
    assert state(CAPTIONS[7])[:2] == ("unanswered", "no line in the file of results")
    assert ledger.get(key(CAPTIONS[8])) is None  # of the other file, which is still to be run
    assert set(request_lines(folder)) == {"requests-001.jsonl"}
    assert ledger.paid_tokens(TASK) == (5 * 600, 5 * 40)

    # the same file again, and longer: what is known stays, what was missing is taken
    with results.open("a") as file:
        file.write("\n" + vllm_line(CAPTIONS[7]) + "\n")
    again = collect_files(TASK, CAPTIONS, ledger, folder, [results])
    assert (again.num_answered, again.num_failed) == (1, 0)
    assert state(CAPTIONS[2])[2] == 1

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
