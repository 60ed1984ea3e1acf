"""How fast to ask and for how much money: pace, budget, and the size of a question before it is asked.

aiolimiter was tried and not taken: its bucket lets a whole minute's allowance go at once and refills meanwhile (twice
the limit in the first minute, which a server that counts answers with 429), refuses an amount above its capacity, and
serves the smallest waiter first.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from data_prep.captions.ledger import Ledger
from data_prep.captions.tasks import Messages, Task
from data_prep.config import LLMOptions, Price
from data_prep.errors import InputError

_BYTES_PER_TOKEN = 4.0  # of English text, in the tokenizers of the last years
#: So many answers of the same task, model and prompt tell more than a rule of thumb.
MIN_ANSWERS = 20


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


def format_usd(usd: float) -> str:
    """Four digits that count, and never fewer than the cents: `0.001234`, `12.34`, `1234.56`."""
    num_decimals = 2 if usd == 0 else max(2, 3 - math.floor(math.log10(abs(usd))))
    return f"{usd:.{num_decimals}f}"


def checked_max_usd(options: LLMOptions, limit: int | None, max_usd: float | None) -> float | None:
    """The money that a run may spend: its own `max_usd`, else that of the options.

    Raises InputError for a `limit` or `max_usd` that is not positive, and for money without a price of the model.
    """
    if limit is not None and not limit >= 1:
        raise InputError(f"limit: {limit} is no number of questions; give 1 or more, or leave it out")
    if max_usd is not None and not 0 < max_usd < math.inf:
        raise InputError(f"max_usd: {max_usd} is no amount to spend; give a positive number, or leave it out")
    max_usd = options.max_usd if max_usd is None else max_usd
    if max_usd is not None and options.model not in options.prices:
        raise InputError(f"max_usd: needs a price of model {options.model!r}; add it to prices, or leave it out")
    return max_usd


def num_text_bytes(messages: Messages) -> int:
    """UTF-8 bytes of the messages' text, images left out."""
    return sum(len(part["text"].encode()) for part in _parts(messages) if part["type"] == "text")


class PromptTokens:
    """How many tokens the questions of a task take, before they are asked.

    Text by its bytes. What an image takes is the server's to decide: `Task.num_image_tokens`, until `MIN_ANSWERS`
    answers to the same task, model and prompt, in the ledger or of this run, have shown it.
    """

    def __init__(self, task: Task[Any], ledger: Ledger | None) -> None:
        self._image_tokens = task.num_image_tokens
        # what the schema may add: servers that guide decoding by it charge nothing, others show it to the model
        self._schema_bytes = len(json.dumps(dict(task.schema)).encode())
        usage = None if ledger is None else ledger.usage(task)
        self._num_seen, self._total, self._most = (
            (0, 0, 0) if usage is None else (usage.num_attempts, usage.num_tokens_in, usage.max_tokens_in)
        )

    def observe(self, num_tokens_in: int) -> None:
        """What one more question took, as the server says."""
        self._num_seen += 1
        self._total += num_tokens_in
        self._most = max(self._most, num_tokens_in)

    def at_most(self, messages: Messages) -> int:
        """No tokenizer makes more tokens of a text than it has bytes; with images, as much as any question took."""
        image_tokens = 0 if self._num_seen >= MIN_ANSWERS else self._image_tokens
        return max(num_text_bytes(messages) + image_tokens + self._schema_bytes + 16 * len(messages), self._most)

    def estimated(self, messages: Messages) -> int:
        """Four bytes a token; with images, the mean of what questions took."""
        if self._image_tokens and self._num_seen >= MIN_ANSWERS:
            return round(self._total / self._num_seen)
        return round(num_text_bytes(messages) / _BYTES_PER_TOKEN) + self._image_tokens + 8 * len(messages)


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
