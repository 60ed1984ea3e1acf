"""What asking would take, before anything is spent: questions, tokens, dollars, hours. Nobody is asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from data_prep.captions.ledger import Ledger
from data_prep.captions.limits import MIN_ANSWERS, PromptTokens, cost_usd, format_usd, num_text_bytes
from data_prep.captions.tasks import Task, request_key
from data_prep.config import LLMOptions

Item = TypeVar("Item")

_ASSUMED_LATENCY_S = 3.0
#: of `max_output_tokens`, where nothing was measured; rather too much, a caption of 40 words needs about 150 of 800
_ASSUMED_SHARE_OF_OUTPUT = 0.25
#: Questions whose length is measured: the first ones, then one in so many, by hash. Formatting costs time, most of all
#: where there is an image in it, and a mean does not need a million.
_NUM_MEASURED, _MEASURED_ONE_IN = 2_000, 50


@dataclass(frozen=True)
class Estimate:
    """Of one task over some items. Tokens and dollars are for what is still to be asked, with attempts as measured."""

    task: str
    model: str
    num_items: int
    num_questions: int  # distinct
    num_answered: int  # with a final answer in the ledger
    num_to_ask: int
    num_tokens_in: int
    num_tokens_out: int
    tokens_from: str  # how they were come by
    usd: float | None  # None: the configuration has no price of the model
    batch_usd: float | None
    hours: float
    hours_from: str  # what bounds the speed
    num_paid_in: int  # tokens this task and model have taken so far, in the ledger
    num_paid_out: int


def estimate(task: Task[Item], items: Iterable[Item], ledger: Ledger | None = None) -> Estimate:
    """Count what `ask` would ask about `items`, and what that takes.

    `ledger`: None where there is none yet. `items` is streamed, as in `ask`; only a sample of the questions is
    formatted, to measure its length.
    """
    seen: set[int] = set()
    sizes = PromptTokens(task, ledger)
    num_items = num_to_ask = num_measured = num_bytes = num_guessed_in = 0
    for item in items:
        num_items += 1
        key = request_key(task, task.identity(item))
        if (short_key := int(key[:16], 16)) in seen:
            continue
        seen.add(short_key)
        if ledger is not None and ledger.status(key) in ("answered", "failed"):
            continue
        num_to_ask += 1
        if num_measured < _NUM_MEASURED or short_key % _MEASURED_ONE_IN == 0:
            messages = task.messages(item)
            num_measured += 1
            num_bytes += num_text_bytes(messages)
            num_guessed_in += sizes.estimated(messages)
    num_in, num_out, latency_s, tokens_from, latency_from = _per_question(
        task, ledger, num_bytes / max(1, num_measured), num_guessed_in / max(1, num_measured)
    )
    tokens_in, tokens_out = round(num_in * num_to_ask), round(num_out * num_to_ask)
    price = task.options.prices.get(task.options.model)
    usd = None if price is None else cost_usd(price, tokens_in, tokens_out)
    hours, hours_from = _hours(task.options, num_to_ask, tokens_in, latency_s, latency_from)
    paid_in, paid_out = (0, 0) if ledger is None else ledger.paid_tokens(task)
    return Estimate(
        task=task.name,
        model=task.options.model,
        num_items=num_items,
        num_questions=len(seen),
        num_answered=len(seen) - num_to_ask,
        num_to_ask=num_to_ask,
        num_tokens_in=tokens_in,
        num_tokens_out=tokens_out,
        tokens_from=tokens_from,
        usd=usd,
        batch_usd=None if usd is None else usd * (1 - task.options.batch_discount),
        hours=hours,
        hours_from=hours_from,
        num_paid_in=paid_in,
        num_paid_out=paid_out,
    )


def _per_question(
    task: Task[Any], ledger: Ledger | None, num_bytes: float, num_guessed_in: float
) -> tuple[float, float, float, str, str]:
    """Mean input tokens, output tokens and time (s, all attempts) of a question, and where these come from."""
    usage = None if ledger is None else ledger.usage(task)
    if usage is None or usage.num_answers < MIN_ANSWERS:
        image = f"an image {task.num_image_tokens}, " if task.num_image_tokens else ""
        assumed = f"a rule of thumb (4 bytes a token, {image}answers of a quarter of max_output_tokens, no schema)"
        num_out = _ASSUMED_SHARE_OF_OUTPUT * task.options.max_output_tokens
        return num_guessed_in, num_out, _ASSUMED_LATENCY_S, assumed, "assumed"
    # images are not in the bytes: then the question's text does not tell its tokens, and the mean does
    measured = f"{usage.num_answers} answers in the ledger, unusable ones and repeated attempts included"
    per_answer_in, per_answer_out = usage.num_tokens_in / usage.num_answers, usage.num_tokens_out / usage.num_answers
    scaled = num_bytes * usage.num_attempts / usage.num_bytes_in
    latency_s, latency_from = usage.mean_latency_s, "measured"
    if latency_s is None:
        latency_s, latency_from = _ASSUMED_LATENCY_S, "assumed"
    attempts = usage.num_attempts / usage.num_answers
    return per_answer_in * scaled, per_answer_out, latency_s * attempts, measured, latency_from


def _hours(
    options: LLMOptions, num_to_ask: int, num_tokens_in: int, latency_s: float, latency_from: str
) -> tuple[float, str]:
    """The longest of what the three limits need, and which it is."""
    reserved = num_tokens_in + num_to_ask * options.max_output_tokens  # as Paces counts
    needs = {
        f"concurrency {options.concurrency} at {latency_s:.2g} s a question ({latency_from})": num_to_ask
        * latency_s
        / options.concurrency
        / 3600,
    }
    if options.requests_per_minute is not None:
        needs[f"{options.requests_per_minute} requests per minute"] = num_to_ask / options.requests_per_minute / 60
    if options.tokens_per_minute is not None:
        needs[f"{options.tokens_per_minute} tokens per minute"] = reserved / options.tokens_per_minute / 60
    bound = max(needs, key=lambda name: needs[name])
    return needs[bound], bound


def format_estimate(estimate: Estimate) -> str:
    """A few lines for people."""
    if estimate.usd is None or estimate.batch_usd is None:
        money = f"not known: the configuration's prices hold no price of {estimate.model}"
    else:
        money = f"{format_usd(estimate.usd)}; as a batch {format_usd(estimate.batch_usd)}"
    lines = {
        "questions": f"{estimate.num_questions} distinct of {estimate.num_items}",
        "already answered": f"{estimate.num_answered}",
        "to ask": f"{estimate.num_to_ask}",
        "tokens": f"{estimate.num_tokens_in} in, {estimate.num_tokens_out} out, by {estimate.tokens_from}",
        "dollars": money,
        "hours": f"{estimate.hours:.3g}, bound by {estimate.hours_from}",
        "taken before": f"{estimate.num_paid_in} tokens in, {estimate.num_paid_out} out",
    }
    head = f"{estimate.task} by {estimate.model} (an estimate; nothing was asked or spent)"
    return "\n".join([head, *(f"  {name:18}{value}" for name, value in lines.items())])
