"""What a server's reply comes to: judged the same whether it was called or came in a batch's output file. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from data_prep.captions.tasks import Task

Item = TypeVar("Item")

CUT_OFF = "cut off at max_output_tokens"


class NotACompletionError(ValueError):
    """The reply is not of the protocol of `/v1/chat/completions`."""


@dataclass(frozen=True)
class Judged:
    """One reply. `failure` is None for an answer that can be used, else the reason; it quotes nothing of the reply
    beyond what `Task.why_unusable` gives."""

    raw: str | None
    finish_reason: str | None
    failure: str | None
    num_tokens_in: int | None = None  # None: the server does not say
    num_tokens_out: int | None = None


def judge(task: Task[Item], item: Item, completion: object) -> Judged:
    """Judge a reply, decoded from JSON, to the question about `item`.

    Raises NotACompletionError when it is no chat completion at all.
    """
    if not isinstance(completion, dict) or not isinstance(completion.get("choices"), list):
        raise NotACompletionError("not an answer of this protocol; does base_url end in /v1?")
    usage = completion.get("usage")
    counts = tuple(_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
    if not completion["choices"]:
        return Judged(None, None, "no choices in the answer", *counts)
    choice = completion["choices"][0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise NotACompletionError("not an answer of this protocol: a choice without a message")
    raw, refusal = _text(message.get("content")), _text(message.get("refusal"))
    finish_reason = _text(choice.get("finish_reason"))
    return Judged(refusal or raw, finish_reason, _failure(task, item, raw, refusal, finish_reason), *counts)


def _failure(
    task: Task[Item], item: Item, raw: str | None, refusal: str | None, finish_reason: str | None
) -> str | None:
    if refusal:
        return "refused by the model"
    if finish_reason == "content_filter":
        return "stopped by the content filter"
    if finish_reason == "length":
        return CUT_OFF
    if raw is None or not raw.strip():
        return "empty answer"
    return task.why_unusable(raw, item)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(usage: object, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else None
