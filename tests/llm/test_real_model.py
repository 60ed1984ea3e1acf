"""Fifty real captions of Derm1M decomposed by a real small model, in a run that is killed half-way: `make test-llm`.

A model of 135 million parameters answers in the schema, because the server's grammar makes it, and understands little:
it repeats the prompt's example and puts whole captions under one aspect. So most of what it says must be dropped, and
what is kept must be the caption's own. The figures say how our checks fare, not how a useful model does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.captions.decompose import Decomposition, make_decomposer
from data_prep.captions.ledger import Ledger
from data_prep.captions.report import read_captions
from data_prep.captions.subcaptions import SubcaptionsTask, worth_asking
from data_prep.captions.tasks import request_body, request_key
from data_prep.config import LLMDecomposer, RulesDecomposer
from data_prep.schema import MAX_SUBCAPTIONS
from tests.llm.installation import CannotInstallError, Server, install, serve

pytestmark = pytest.mark.llm

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_CAPTIONS = 50
CONCURRENCY = 2
ASK = """
import json, sys
from pathlib import Path
from data_prep.captions.decompose import make_decomposer
from data_prep.config import LLMDecomposer
given = json.load(sys.stdin)
make_decomposer(LLMDecomposer.model_validate(given["config"]), Path(given["ledger_path"])).prepare(given["captions"])
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    try:
        installation = install()
    except CannotInstallError as error:
        if os.environ.get("CI"):  # whose registries are not ours to mend
            pytest.skip(str(error))
        pytest.fail(str(error), pytrace=False)
    with serve(installation, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """Fifty distinct ones, evenly over the tables."""
    if "DERMVLP_DATA" not in os.environ:
        pytest.skip("DERMVLP_DATA is unset: no real captions")
    real = read_captions(Path(os.environ["DERMVLP_DATA"]) / "derm1m-sample")
    distinct = list({" ".join(caption.split()): caption for caption in real if worth_asking(caption)}.values())
    return distinct[:: len(distinct) // NUM_CAPTIONS][:NUM_CAPTIONS]


def config_for(server: Server) -> LLMDecomposer:
    # one attempt: the server decodes greedily, so a second answer would be the first
    return LLMDecomposer(
        model=server.model,
        base_url=server.url,
        api_key_env="DERMVLP_TEST_KEY",
        concurrency=CONCURRENCY,
        max_output_tokens=320,
        timeout_s=180.0,
        max_attempts=1,
    )


def post(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=180) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_the_server_keeps_to_schema_and_limit_and_counts_tokens(server: Server) -> None:
    task = SubcaptionsTask(config_for(server))
    body = request_body(task, "Scaly plaques on both elbows, itching for a month.")
    whole = post(server, body)
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert set(json.loads(whole["choices"][0]["message"]["content"])) == {"subcaptions"}
    assert whole["usage"]["prompt_tokens"] > 300 and 10 < whole["usage"]["completion_tokens"] < 320
    assert post(server, body)["choices"] == whole["choices"]
    short = post(server, body | {"max_tokens": 7})
    assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 7)
    assert whole["choices"][0]["message"]["content"].startswith(short["choices"][0]["message"]["content"])
    for change, status in (({"model": "another"}, 404), ({"messages": []}, 400), ({"max_tokens": 10**6}, 400)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(server, body | change)
        assert refused.value.code == status and "message" in json.load(refused.value)["error"]


def test_fifty_captions_with_a_kill_half_way(server: Server, captions: list[str], tmp_path: Path) -> None:
    assert len(captions) == NUM_CAPTIONS
    config, ledger_path = config_for(server), tmp_path / "ledger.sqlite"
    task = SubcaptionsTask(config)
    asked_as = {question_sha256(task, caption): caption for caption in captions}
    start_s, num_before = time.perf_counter(), len(server.events())

    run_until_killed(server, config, ledger_path, captions, num_before + NUM_CAPTIONS)  # asked + answered: half of both
    with Ledger(ledger_path) as ledger:
        known = {caption for caption in captions if ledger.get(request_key(task, task.identity(caption)))}
    assert NUM_CAPTIONS // 4 < len(known) < NUM_CAPTIONS
    num_at_kill = len(server.events())

    decomposer = make_decomposer(config, ledger_path)
    summary = decomposer.prepare(captions)
    assert summary is not None and (summary.num_distinct, summary.num_already) == (NUM_CAPTIONS, len(known))
    assert summary.num_unanswered == summary.num_left == 0
    asked_again = count_asked(server.events()[num_at_kill:], asked_as)
    assert asked_again == Counter(caption for caption in captions if caption not in known)
    asked = count_asked(server.events()[num_before:], asked_as)
    assert set(asked) == set(captions) and asked.total() - NUM_CAPTIONS <= CONCURRENCY  # those in flight at the kill
    again = make_decomposer(config, ledger_path).prepare(captions)
    assert again is not None and (again.num_answered + again.num_failed + again.num_unanswered, again.num_already) == (
        0,
        NUM_CAPTIONS,
    )
    elapsed_s = time.perf_counter() - start_s

    decompositions = {caption: decomposer.decompose(caption) for caption in captions}
    with Ledger(ledger_path) as ledger:
        answers = {caption: ledger.get(request_key(task, task.identity(caption))) for caption in captions}
        tokens = ledger.paid_tokens(task)
    print_outcome(decompositions, tokens, elapsed_s)

    assert {answer.status for answer in answers.values() if answer} <= {"answered", "failed"} and all(answers.values())
    by_rules = make_decomposer(RulesDecomposer(), ledger_path)
    for caption, made in decompositions.items():
        answer = answers[caption]
        assert answer is not None and answer.raw and answer.num_tokens_out > 0
        assert (made.made_by == "llm") == (answer.status == "answered") == (made.failure is None)
        if made.failure is not None:  # the grammar leaves these two reasons alone
            assert made.failure.startswith(("all sub-captions dropped", "no sub-captions", "cut off")), made.failure
            assert made.subcaptions == by_rules.decompose(caption).subcaptions
        assert len(made.subcaptions) <= MAX_SUBCAPTIONS
        for sub in made.subcaptions:
            assert not (strange := strange_words(sub.text, caption)), f"{strange} kept, not in: {caption}"
            assert sub.origin.startswith(f"llm:{server.model}:" if made.made_by == "llm" else "rules-")
    # the check is put to the test only if the model both says something of the caption and invents
    assert sum(made.made_by == "llm" for made in decompositions.values()) >= 3
    assert sum(drop.kind == "not grounded" for made in decompositions.values() for drop in made.dropped) >= 10


def count_asked(events: Sequence[dict[str, Any]], asked_as: dict[str, str]) -> Counter[str]:
    """How often the server was asked about each caption. `asked_as`: what it logs -> caption."""
    asked = (asked_as.get(event["sha256"]) for event in events if event["event"] == "asked")
    return Counter(caption for caption in asked if caption is not None)


def question_sha256(task: SubcaptionsTask, caption: str) -> str:
    """As the server logs it."""
    return hashlib.sha256(task.messages(caption)[-1]["content"].encode()).hexdigest()


def run_until_killed(
    server: Server, config: LLMDecomposer, ledger_path: Path, captions: Sequence[str], num_events: int
) -> None:
    """Ask in another process and SIGKILL it when the server has logged so many events; returns when the server is idle,
    so that nothing of the killed run is logged later."""
    given = {"config": config.model_dump(mode="json"), "ledger_path": str(ledger_path), "captions": list(captions)}
    run = subprocess.Popen([sys.executable, "-c", ASK], stdin=subprocess.PIPE, cwd=REPOSITORY)
    assert run.stdin is not None
    run.stdin.write(json.dumps(given).encode())
    run.stdin.close()
    while len(server.events()) < num_events:
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    post(server, {"model": server.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1})


_LONG_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]{5,}")
_CARRIES_NOTHING = re.compile(
    "about|being|cannot|could|might|never|neither|others?|should|their|there|these|those|under|where|which|while|"
    "without|would"
)


def strange_words(text: str, caption: str) -> list[str]:
    """Numbers that the caption does not hold, and words of five letters and more none of whose kin (four first letters
    in common) it holds: coarser than the decomposer's own check, and apart from it."""
    have = {word.lower() for word in re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+", caption)}
    kin = have | {word[:4] for word in have if not word[0].isdigit()}
    words = [word.lower() for word in _LONG_WORD.findall(text)]
    return [word for word in words if not (kin & {word, word[:4]} or _CARRIES_NOTHING.fullmatch(word))]


def print_outcome(decompositions: dict[str, Decomposition], tokens: tuple[int, int], elapsed_s: float) -> None:
    failures: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for number, (caption, made) in enumerate(decompositions.items(), 1):
        outcome = "by the model" if made.failure is None else f"by the rules, because: {made.failure}"
        print(f"\n{number:2} {caption}\n   {outcome}")
        for sub in made.subcaptions:
            print(f"   + {sub.aspect:13} {sub.text}")
        for drop in made.dropped:
            print(f"   - {drop.aspect:13} {drop.text}\n     {'':13} {drop.reason}")
        failures.update([made.failure] if made.failure else [])
        reasons.update(drop.kind for drop in made.dropped)
        kept[made.made_by] += len(made.subcaptions)
    num_failed = failures.total()
    print(f"\n{len(decompositions)} captions: {len(decompositions) - num_failed} answered, {num_failed} failed")
    for title, counts in (("failed", failures), ("sub-captions kept, by", kept), ("sub-captions dropped", reasons)):
        for name, count in counts.most_common():
            print(f"{title:22} {count:4}  {name}")
    print(f"{'tokens':22} {tokens[0]} in, {tokens[1]} out\n{'seconds':22} {elapsed_s:.0f}", flush=True)
