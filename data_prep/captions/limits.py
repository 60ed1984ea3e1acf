"""How fast to ask and for how much money: pace, budget, and the size of a question before it is asked.

aiolimiter was tried and not taken: its bucket lets a whole minute's allowance go at once and refills meanwhile (twice
the limit in the first minute, which a server that counts answers with 429), refuses an amount above its capacity, and
serves the smallest waiter first.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from data_prep.captions.tasks import Messages
from data_prep.config import LLMOptions, Price

_BYTES_PER_TOKEN = 4.0  # of English text, in the tokenizers of the last years
#: OpenAI's rule for images: so many tokens for the whole, and for each square of 512 px at high detail
_IMAGE_TOKENS, _TILE_TOKENS = 85, 170


class Pace:
    """Lets amounts through one after the other at a steady rate, first come, first served, without bursts."""

    def __init__(self, per_minute: float) -> None:
        self._per_s = per_minute / 60.0
        self._free_at_s = float("-inf")

    async def acquire(self, amount: float = 1.0) -> None:
        """Wait for the amount's turn. An amount above a minute's allowance waits, then holds the others back."""
        now_s = asyncio.get_running_loop().time()
        begin_s = max(self._free_at_s, now_s)
        self._free_at_s = begin_s + amount / self._per_s
        if begin_s > now_s:
            await asyncio.sleep(begin_s - now_s)


class Paces:
    """The two limits of a server's account, together."""

    def __init__(self, options: LLMOptions) -> None:
        self._requests = None if options.requests_per_minute is None else Pace(options.requests_per_minute)
        self._tokens = None if options.tokens_per_minute is None else Pace(options.tokens_per_minute)

    def __bool__(self) -> bool:
        return self._requests is not None or self._tokens is not None

    async def acquire(self, num_tokens: float) -> None:
        if self._tokens is not None:
            await self._tokens.acquire(num_tokens)
        if self._requests is not None:
            await self._requests.acquire()


class Budget:
    """Money that may be spent. What is in flight is reserved at the most it can cost, so the sum is never exceeded."""

    def __init__(self, max_usd: float | None) -> None:
        self._max_usd = float("inf") if max_usd is None else max_usd
        self._reserved_usd = 0.0
        self._num_in_flight = 0
        self._settled = asyncio.Event()
        self.spent_usd = 0.0

    async def reserve(self, usd: float) -> bool:
        """False if there is no money for it, and nothing in flight whose price could turn out lower than reserved."""
        while self.spent_usd + self._reserved_usd + usd > self._max_usd:
            if self._num_in_flight == 0:
                return False
            await self._settled.wait()
        self._reserved_usd += usd
        self._num_in_flight += 1
        return True

    def settle(self, reserved_usd: float, paid_usd: float) -> None:
        self._num_in_flight -= 1
        # exactly nothing, whatever the rounding of the sums
        self._reserved_usd = self._reserved_usd - reserved_usd if self._num_in_flight else 0.0
        self.spent_usd += paid_usd
        self._settled.set()
        self._settled = asyncio.Event()


def cost_usd(price: Price, num_tokens_in: float, num_tokens_out: float) -> float:
    return (num_tokens_in * price.input_usd + num_tokens_out * price.output_usd) / 1e6


def num_text_bytes(messages: Messages) -> int:
    """UTF-8 bytes of the messages' text, images left out."""
    return sum(len(part["text"].encode()) for part in _parts(messages) if part["type"] == "text")


def num_tokens_at_most(messages: Messages, schema_bytes: int = 0) -> int:
    """A bound: no tokenizer makes more tokens of a text than it has bytes."""
    return num_text_bytes(messages) + _num_image_tokens(messages) + schema_bytes + 16 * len(messages)


def num_tokens_estimated(messages: Messages) -> int:
    """Four bytes a token, and images by OpenAI's rule at the size that `describe` sends at most (one tile and more)."""
    return round(num_text_bytes(messages) / _BYTES_PER_TOKEN) + _num_image_tokens(messages) + 8 * len(messages)


def _num_image_tokens(messages: Messages) -> int:
    images = [part["image_url"] for part in _parts(messages) if part["type"] == "image_url"]
    # four tiles: a picture of up to 1024 px, whose size is not worth decoding for
    return sum(_IMAGE_TOKENS + (0 if image.get("detail") == "low" else 4 * _TILE_TOKENS) for image in images)


def _parts(messages: Messages) -> list[dict[str, Any]]:
    return [
        part
        for message in messages
        for part in (
            [{"type": "text", "text": message["content"]}]
            if isinstance(message["content"], str)
            else message["content"]
        )
    ]


def schema_num_bytes(schema: Any) -> int:
    """What the schema may add to a prompt: servers that guide decoding by it charge nothing, others show it."""
    return len(json.dumps(dict(schema)).encode())
