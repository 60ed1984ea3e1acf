"""What the two ways of asking share about a server: its address, the key, and what may be told of its errors.

A server's own words may quote the question, so they are kept where the answers are (`Answer.raw` in the ledger,
`server_said` in a folder of batches) and never shown: messages, logs and reasons hold a status and a known code.
"""

from __future__ import annotations

import os

from data_prep.config import LLMOptions
from data_prep.errors import InputError

OPENAI_URL = "https://api.openai.com/v1"

#: Codes that OpenAI's API documents and others have taken over; any other text in that place is not shown.
_KNOWN_CODES = frozenset(
    code
    for line in (
        "invalid_api_key model_not_found insufficient_quota billing_hard_limit_reached rate_limit_exceeded",
        "token_limit_exceeded context_length_exceeded content_policy_violation invalid_image unsupported_parameter",
        "invalid_request_error invalid_json_line duplicate_custom_id mismatched_model invalid_model empty_file",
        "too_many_tasks server_error batch_expired unsupported_value invalid_url invalid_method missing_required_field",
    )
    for code in line.split()
)


def read_api_key(options: LLMOptions) -> str:
    """From the environment variable that the configuration names. A server of one's own may need none."""
    key = os.environ.get(options.api_key_env, "").strip()
    if key:
        return key
    if options.base_url is None:
        raise InputError(
            f"api_key_env: the environment variable {options.api_key_env} is not set; export it, or give base_url"
        )
    return "not-needed"


def hide_key(text: str, options: LLMOptions) -> str:
    """Servers repeat the key they refuse, sometimes."""
    key = os.environ.get(options.api_key_env, "").strip()
    return text.replace(key, "***") if key else text


def failure_of(status: object, code: object) -> str:
    """A fixed phrase for a server's error: `HTTP 400 context_length_exceeded`, `HTTP 500`, `server error`."""
    shown = f"HTTP {status}" if isinstance(status, int) else "server error"
    return f"{shown} {code}" if isinstance(code, str) and code in _KNOWN_CODES else shown
