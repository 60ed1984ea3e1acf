"""The pure half of the language model's way: what it is asked, and what of its answer is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.resources import files

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from data_prep.captions.decompose import TOO_LONG, Decomposition, Dropped, fits_in_bytes
from data_prep.captions.grounding import num_words, why_ungrounded
from data_prep.captions.rules import says_nothing
from data_prep.captions.tasks import Messages
from data_prep.errors import InputError
from data_prep.schema import MAX_SUBCAPTIONS, SUBCAPTION_ASPECTS, Aspect, Caption

ANSWER_SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "subcaptions": {
            "type": "array",
            "maxItems": MAX_SUBCAPTIONS,
            "items": {
                "type": "object",
                "properties": {
                    "aspect": {"type": "string", "enum": [str(aspect) for aspect in SUBCAPTION_ASPECTS]},
                    "text": {"type": "string"},
                },
                "required": ["aspect", "text"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["subcaptions"],
    "additionalProperties": False,
}


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid")
    aspect: Aspect
    text: str


class _AnswerModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    subcaptions: list[_Item]


@dataclass(frozen=True)
class Unusable:
    """An answer without a usable sub-caption."""

    reason: str
    dropped: tuple[Dropped, ...] = ()


def read_prompt(name: str) -> str:
    """The text of `prompts/<name>.md`. Raises InputError for a name that is none of them."""
    folder = files(__package__) / "prompts"
    names = sorted(entry.name.removesuffix(".md") for entry in folder.iterdir() if entry.name.endswith(".md"))
    if name not in names:
        raise InputError(f"prompt: no prompt {name!r}; there are {', '.join(names)}")
    return (folder / f"{name}.md").read_text(encoding="utf-8")


def format_prompt(caption: str, prompt_text: str) -> Messages:
    """The messages for one caption. It is untrusted text, so it is passed as a JSON string, which it cannot leave."""
    return [
        {"role": "system", "content": prompt_text},
        {"role": "user", "content": json.dumps({"caption": caption}, ensure_ascii=False)},
    ]


def parse_answer(
    raw: str, caption: str, fits: Callable[[str], bool] = fits_in_bytes, origin: str = ""
) -> Decomposition | Unusable:
    """Check a model's answer against the schema, and each sub-caption against its caption.

    A violated schema makes the whole answer unusable; a sub-caption that is not grounded, repeated, too short, longer
    than the caption or the tokenizer's context (`fits`), or beyond `MAX_SUBCAPTIONS` is dropped with the reason.
    `origin`: of the captions made (`data_prep.schema.Caption.origin`).
    """
    try:
        answer = _AnswerModel.model_validate_json(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        if problem["type"] == "json_invalid":
            return Unusable("malformed JSON")
        return Unusable(schema_violation(problem, {"subcaptions", "aspect", "text"}))
    kept: list[Caption] = []
    dropped: list[Dropped] = []
    for item in answer.subcaptions:
        text = " ".join(item.text.split()).strip(" ,;:")
        reason = _why_dropped(item.aspect, text, caption, kept)
        if reason is None and not fits(text):
            reason = TOO_LONG
        if reason is None:
            kept.append(Caption(aspect=item.aspect, text=text, origin=origin))
        else:
            dropped.append(Dropped(item.text, item.aspect, reason))
    if not kept:
        return Unusable("all sub-captions dropped" if dropped else "no sub-captions", tuple(dropped))
    return Decomposition(tuple(kept), tuple(dropped), made_by="llm")


def schema_violation(problem: ErrorDetails, fields: Collection[str]) -> str:
    """Where and how an answer leaves its schema. A key of the model's own is not named: it may hold anything."""
    place = [str(part) if isinstance(part, int) or part in fields else "(another key)" for part in problem["loc"]]
    return f"schema violation at {'.'.join(place) or 'top level'}: {problem['msg']}"


def _why_dropped(aspect: Aspect, text: str, caption: str, kept: list[Caption]) -> str | None:
    if aspect not in SUBCAPTION_ASPECTS:
        return "not an aspect of sub-captions"
    if not any(character.isalnum() for character in text):
        return "no words"
    if says_nothing(text) or _UNSTATED.search(text):
        return "says only that something is not known"
    if num_words(text) < 2 and num_words(caption) > 1:
        return "a single word"
    if len(text) > len(caption) + 20:
        return "too long: longer than the caption"
    if text.casefold().rstrip(".") in {other.text.casefold().rstrip(".") for other in kept}:
        return "repeated"
    if len(kept) >= MAX_SUBCAPTIONS:
        return f"more than {MAX_SUBCAPTIONS} sub-captions"
    return why_ungrounded(text, caption)


_UNSTATED = re.compile(
    r"\bno\b[^.;]{0,40}\b(?:information|details?)\b|\bnot\s+(?:\w+\s+)?(?:mentioned|provided|specified|stated|reported|discussed|described|given)\b",
    re.IGNORECASE,
)
