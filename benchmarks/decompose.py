"""Decomposition against a local server, beside the bare openai client: `python -m benchmarks.decompose`.

A server in a process of its own answers each request after 200 ms. A: an asynchronous openai client in a loop, 64 in
flight, that throws the answers away. B: `data_prep.captions.asking.ask` with the same client settings and requests,
which also deduplicates, checks every answer against schema and caption, and commits it to a ledger. Both take turns.
The server counts: a request that came twice ends the benchmark with an error. The last line is one JSON object,
`vs_bare_client`: the median over the rounds of B's throughput by A's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import openai

from benchmarks.side_by_side import by_turns, median_ratio
from data_prep.captions.asking import ask
from data_prep.captions.ledger import Ledger
from data_prep.captions.subcaptions import SubcaptionsTask
from data_prep.captions.tasks import request_body
from data_prep.config import LLMDecomposer

# ---------------------------------------------------------------------------------------------- server


class _Connection(asyncio.Protocol):
    """HTTP/1.1 keep-alive, POST alone: enough for one client, and cheap beside it."""

    def __init__(self, latency_s: float, num_requests: Counter[str]) -> None:
        self._latency_s, self._num_requests = latency_s, num_requests
        self._received = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        num_bytes = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < num_bytes:
            return
        self._received = b""
        caption = json.loads(json.loads(body)["messages"][-1]["content"])["caption"]
        self._num_requests[caption] += 1
        asyncio.get_running_loop().call_later(self._latency_s, self._reply, caption)

    def _reply(self, caption: str) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        answer = {"subcaptions": [{"aspect": a, "text": t} for a, t in zip(_ASPECTS, caption.split(". "), strict=True)]}
        message = {"role": "assistant", "content": json.dumps(answer), "refusal": None}
        payload = json.dumps(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": "local",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
                "usage": {"prompt_tokens": 700, "completion_tokens": 110, "total_tokens": 810},
            }
        ).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        self._transport.write(head.encode() + payload)


def _run_server(latency_s: float, pipe: Connection) -> None:
    """Tells its port, then answers each message with what it was asked since the last one, until None comes."""
    num_requests: Counter[str] = Counter()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(latency_s, num_requests), "127.0.0.1", 0)
        done = asyncio.Event()

        def told() -> None:
            if pipe.recv() is None:
                done.set()
                return
            pipe.send(dict(num_requests))
            num_requests.clear()

        loop.add_reader(pipe.fileno(), told)
        pipe.send(server.sockets[0].getsockname()[1])
        await done.wait()

    asyncio.run(run())


@contextmanager
def _server(latency_s: float) -> Iterator[tuple[str, Connection]]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run_server, args=(latency_s, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1", ours
    finally:
        ours.send(None)
        process.join(5)
        process.kill()


# ---------------------------------------------------------------------------------------------- captions

_ASPECTS = ("morphology", "body_site", "demographics", "symptoms", "history", "management")
_PARTS = (
    ("Scaly red plaques with a raised border", "Tense clear blisters on inflamed skin", "A pearly papule with vessels"),
    ("On the extensor side of both forearms", "Around the left ankle and shin", "On the bridge of the nose"),
    ("The patient is a {n}-year-old woman", "Seen in a man of {n} years", "A retired farmer, {n} years old"),
    ("Intense itching at night and no fever", "Painful when touched", "Without pain or itching"),
    ("Slowly spreading for about {m} months", "After a course of antibiotics {m} weeks ago", "Present for {m} years"),
    ("Treated with topical steroids twice a day", "Excised and sent for histology", "Managed with emollients and rest"),
)


def make_captions(num_captions: int, seed: int) -> list[str]:
    """Distinct captions of about 40 words, the mean of Derm1M's, in six sentences."""
    draw = random.Random(seed)
    combinations = itertools.product(*_PARTS, range(1, 90), range(1, 60))
    captions = [
        ". ".join(parts).format(n=n, m=m)
        for *parts, n, m in itertools.islice(combinations, 0, None, 3_876_931 // (4 * num_captions))
    ]
    return draw.sample(captions, num_captions)


# ---------------------------------------------------------------------------------------------- A and B


def _bare(options: LLMDecomposer, captions: list[str]) -> float:
    """Requests a second of the client alone."""
    task = SubcaptionsTask(options)
    bodies = iter([request_body(task, caption) for caption in captions])

    async def run() -> None:
        async with openai.AsyncOpenAI(
            api_key="not-needed", base_url=options.base_url, timeout=options.timeout_s, max_retries=options.max_retries
        ) as client:

            async def work() -> None:
                for body in bodies:
                    completion = await client.chat.completions.create(**body)
                    assert completion.choices[0].message.content

            await asyncio.gather(*(work() for _ in range(options.concurrency)))

    start_s = time.perf_counter()
    asyncio.run(run())
    return len(captions) / (time.perf_counter() - start_s)


def _ours(options: LLMDecomposer, captions: list[str]) -> float:
    """Requests a second of `ask`, every answer checked and in the ledger."""
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        with Ledger(Path(folder) / "answers.sqlite") as ledger:
            summary = ask(SubcaptionsTask(options), captions, ledger)
        elapsed_s = time.perf_counter() - start_s
    if summary.num_answered != len(captions):
        raise RuntimeError(f"not all answers could be used: {summary}")
    return len(captions) / elapsed_s


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decompose", description=__doc__)
    parser.add_argument("--num-captions", type=int, default=1500, help="requests of each side in each round")
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency-s", type=float, default=0.2)
    arguments = parser.parse_args()
    os.environ.pop("OPENAI_API_KEY", None)
    os.environ["NO_PROXY"] = "127.0.0.1"
    with _server(arguments.latency_s) as (url, pipe):
        options = LLMDecomposer(model="local", base_url=url, concurrency=arguments.concurrency)
        seeds = itertools.count()

        def counted(side: Any) -> float:
            captions = make_captions(arguments.num_captions, next(seeds))
            rate: float = side(options, captions)
            pipe.send("count")
            num_requests: dict[str, int] = pipe.recv()
            if num_requests != dict.fromkeys(captions, 1):
                raise RuntimeError(f"{sum(num_requests.values())} requests for {len(captions)} captions")
            return rate

        by_turns(lambda: counted(_bare), lambda: counted(_ours), 1)  # imports, caches
        pairs = by_turns(lambda: counted(_bare), lambda: counted(_ours), arguments.num_rounds)
    print(f"{arguments.num_captions} requests, {arguments.concurrency} in flight, {arguments.latency_s:g} s each")
    print(f"at most {arguments.concurrency / arguments.latency_s:.0f} requests/s are possible")
    print("round  bare client    dermvlp  ratio   (requests/s)")
    for number, (bare, ours) in enumerate(pairs, start=1):
        print(f"{number:5} {bare:12.1f} {ours:10.1f} {ours / bare:6.3f}")
    print(json.dumps({"vs_bare_client": round(median_ratio(pairs), 3)}))


if __name__ == "__main__":
    main()
