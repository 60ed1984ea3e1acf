"""What is asked of a language model, apart from how: one `Task` for each kind of question, two ways to ask it.

    items -> Task (messages, schema, check) -> asking.py (calls in flight) or batch_api.py (files of requests) -> ledger

Both ways write the same requests and fill the same ledger, so one can go on where the other stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from data_prep.config import LLMOptions

Item = TypeVar("Item", contravariant=True)
Messages = list[dict[str, Any]]


class Task(Protocol[Item]):
    """Pure: formats a question and judges an answer; knows neither network nor files."""

    @property
    def name(self) -> str:
        """`subcaptions` or `report`: names the JSON schema and the rows of the ledger."""

    @property
    def options(self) -> LLMOptions: ...

    @property
    def prompt_hash(self) -> str:
        """Hexadecimal SHA-256 of everything but the item that the model is given: prompt file, schema, options."""

    @property
    def num_image_tokens(self) -> int:
        """The most that the images of one question take; 0 for a task without."""

    @property
    def schema(self) -> Mapping[str, object]:
        """Strict JSON schema of an answer."""

    def identity(self, item: Item) -> str:
        """Two items with the same identity are asked once. Never stored: the ledger holds its hash."""

    def messages(self, item: Item) -> Messages:
        """What the model is given for one item."""

    def why_unusable(self, raw: str, item: Item) -> str | None:
        """None for an answer that can be used, else the reason."""


def request_key(task: Task[Any], identity: str) -> str:
    """Hexadecimal SHA-256 of what determines an answer: model, prompt and item. Also the `custom_id` in batch files."""
    return hashlib.sha256("\x00".join((task.options.model, task.prompt_hash, identity)).encode()).hexdigest()


def request_body(task: Task[Item], item: Item) -> dict[str, Any]:
    """The JSON body of `/v1/chat/completions`: the same for a call and for a line of a batch file."""
    # OpenAI's newer models refuse max_tokens, most other servers know nothing else
    limit = "max_completion_tokens" if task.options.base_url is None else "max_tokens"
    return {
        "model": task.options.model,
        "messages": task.messages(item),
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": task.name, "strict": True, "schema": dict(task.schema)},
        },
        limit: task.options.max_output_tokens,
    }


def hash_prompt(prompt_text: str, schema: Mapping[str, object], *options: str) -> str:
    """The prompt hash of a task: change the prompt, the schema or an option that the model sees, and all is new."""
    return hashlib.sha256("\x00".join((prompt_text, json.dumps(schema, sort_keys=True), *options)).encode()).hexdigest()
