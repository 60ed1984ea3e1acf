"""Questions of a preparation over job arrays, batches and later runs: asked once, within the money."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.ask import AskOptions, ask_all, batch, print_estimates
from data_prep.config import PrepareConfig
from data_prep.errors import InputError
from data_prep.job import Job
from data_prep.pool import Part
from data_prep.prepare import prepare
from tests.integration.llm_server import LLMServer, answer, serve
from tests.integration.tables import plain_rows, samples, table_config, write_table

NUM_ROWS = 24


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LLMServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(lambda caption: [answer(("body_site", "On the arm"))]) as running:
        yield running


def planned(folder: Path, server: LLMServer, **options: Any) -> PrepareConfig:
    write_table(folder, plain_rows(NUM_ROWS))
    decomposer = {"kind": "llm", "model": "tiny", "base_url": server.url, "max_retries": 0, **options}
    config = table_config(folder, decomposer=decomposer, samples_per_shard=6)
    for stage in ("scan", "plan"):
        prepare(config, stage=stage)
    return config


def test_what_some_part_asked_no_later_job_asks_again(tmp_path: Path, server: LLMServer) -> None:
    config = planned(tmp_path, server)
    for index in range(3):
        ask_all(Job(config, Part(index, 4)), AskOptions())  # the fourth part died
    with pytest.raises(InputError, match=r"answers of an array of another size, .*; run the stage plan first"):
        ask_all(Job(config, Part(0, 2)), AskOptions())
    prepare(config, stage="plan")
    ask_all(Job(config, Part(0, 2)), AskOptions())  # the array was made anew, with other parts
    assert 0 < len(server.num_requests) < NUM_ROWS
    prepare(config)
    ask_all(Job(config), AskOptions())
    assert server.num_requests.total() == len(server.num_requests) == NUM_ROWS
    assert all(sample.subcaptions[0].origin.startswith("llm:tiny:") for sample in samples(tmp_path / "out" / "train"))


def test_a_part_that_is_still_asking_loses_nothing_to_a_gathering(tmp_path: Path, server: LLMServer) -> None:
    config = planned(tmp_path, server)
    part = Job(config, Part(0, 2))
    ask_all(part, AskOptions(limit=3))
    summary = ask_all(Job(config), AskOptions(limit=4))[0]  # gathers
    assert (summary.num_already, summary.num_answered) == (3, 4)
    ask_all(part, AskOptions())
    ask_all(Job(config), AskOptions())
    assert server.num_requests.total() == len(server.num_requests) == NUM_ROWS


def test_questions_in_batches_are_not_asked_beside_them(
    tmp_path: Path, server: LLMServer, capsys: pytest.CaptureFixture[str]
) -> None:
    config = planned(tmp_path, server)
    batch(Job(config), "write", "subcaptions", AskOptions(), [])
    print_estimates(Job(config))
    assert f"{NUM_ROWS} are under way in batches" in capsys.readouterr().out
    for ask in (lambda: prepare(config), lambda: ask_all(Job(config, Part(0, 2)), AskOptions())):
        with pytest.raises(InputError, match=f"{NUM_ROWS} questions are under way in batches and would be paid twice"):
            ask()
    assert not server.num_requests
    other = config.model_copy(update={"decomposer": config.decomposer.model_copy(update={"model": "other"})})
    batch(Job(other), "write", "subcaptions", AskOptions(), [])  # another model has a folder of its own
    assert len(list((tmp_path / "out" / "work" / "batches").iterdir())) == 2


def test_max_usd_bounds_all_runs_and_parts_together(tmp_path: Path, server: LLMServer) -> None:
    # a dollar a token of output: an answer of the server takes 5, at most 64
    prices = {"tiny": {"input_usd": 0.0, "output_usd": 1e6}}
    config = planned(tmp_path, server, prices=prices, max_usd=180.0, concurrency=1, max_output_tokens=64)
    for _ in range(3):
        for index in range(2):
            ask_all(Job(config, Part(index, 2)), AskOptions())
    spent = 5 * server.num_requests.total()
    assert 20 <= spent < NUM_ROWS * 5
    with pytest.raises(InputError, match=r"stopped by max_usd with \d+ questions left"):
        prepare(config.model_copy(update={"decomposer": config.decomposer.model_copy(update={"max_usd": spent + 1.0})}))
    assert 5 * server.num_requests.total() == spent


def test_rates_are_shared_by_the_parts(tmp_path: Path, server: LLMServer) -> None:
    config = planned(tmp_path, server, requests_per_minute=100, tokens_per_minute=1)
    options = Job(config, Part(1, 8)).asking_tools.config.decomposer
    assert options.kind == "llm" and (options.requests_per_minute, options.tokens_per_minute) == (12, 1)
    options = Job(config).asking_tools.config.decomposer
    assert options.kind == "llm" and options.requests_per_minute == 100


def test_another_policy_for_failures_makes_the_shards_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    nonsense = answer(("body_site", "on the moon"))
    fine = answer(("body_site", "On the arm"))
    with serve(lambda caption: [nonsense if "number 3 " in caption else fine]) as server:
        config = planned(tmp_path, server, on_failure="keep_whole", max_attempts=1)
        assert prepare(config)["train"].num_samples == NUM_ROWS
        ledger = (tmp_path / "out" / "caption_failures.csv").read_text(encoding="utf-8").splitlines()
        assert [line.split(",")[:3] for line in ledger[1:]] == [["t.csv", "4", "caption"]]
        rejecting = config.model_copy(
            update={"decomposer": config.decomposer.model_copy(update={"on_failure": "reject"})}
        )
        assert prepare(rejecting)["train"].num_samples == NUM_ROWS - 1
        assert "t.csv,4,caption,not split by the model" in (tmp_path / "out" / "rejected.csv").read_text(
            encoding="utf-8"
        )
        assert not (tmp_path / "out" / "caption_failures.csv").exists()
        assert server.num_requests.total() == NUM_ROWS
