"""The pure half of the language model's way: what it is asked, and what of its answer is kept."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.captions.decompose import Decomposition, Dropped
from data_prep.captions.grounding import why_ungrounded
from data_prep.captions.rules import says_nothing
from data_prep.errors import InputError
from data_prep.schema import MAX_SUBCAPTIONS, SUBCAPTION_ASPECTS, Aspect, Caption

ANSWER_SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "subcaptions": {
            "type": "array",
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
        raise InputError(f"decomposer.prompt: no prompt {name!r}; there are {', '.join(names)}")
    return (folder / f"{name}.md").read_text(encoding="utf-8")


def hash_prompt(prompt_text: str) -> str:
    """Hexadecimal SHA-256 of everything but the caption that the model is given."""
    return hashlib.sha256((prompt_text + json.dumps(ANSWER_SCHEMA, sort_keys=True)).encode()).hexdigest()


def format_prompt(caption: str, prompt_text: str) -> list[dict[str, str]]:
    """The messages for one caption. It is untrusted text, so it is passed as a JSON string, which it cannot leave."""
    return [
        {"role": "system", "content": prompt_text},
        {"role": "user", "content": json.dumps({"caption": caption}, ensure_ascii=False)},
    ]


def parse_answer(raw: str, caption: str) -> Decomposition | Unusable:
    """Check a model's answer against the schema, and each sub-caption against its caption.

    A violated schema makes the whole answer unusable; a sub-caption that is not grounded, repeated, too short, longer
    than the caption, or beyond `MAX_SUBCAPTIONS` is dropped with the reason.
    """
    try:
        answer = _AnswerModel.model_validate_json(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        if problem["type"] == "json_invalid":
            return Unusable("malformed JSON")
        return Unusable(f"schema violation at {'.'.join(map(str, problem['loc'])) or 'top level'}: {problem['msg']}")
    kept: list[Caption] = []
    dropped: list[Dropped] = []
    for item in answer.subcaptions:
        text = " ".join(item.text.split()).strip(" ,;:")
        reason = _why_dropped(item.aspect, text, caption, kept)
        if reason is None:
            kept.append(Caption(aspect=item.aspect, text=text))
        else:
            dropped.append(Dropped(item.text, item.aspect, reason))
    if not kept:
        return Unusable("all sub-captions dropped" if dropped else "no sub-captions", tuple(dropped))
    return Decomposition(tuple(kept), tuple(dropped), made_by="llm")


def _why_dropped(aspect: Aspect, text: str, caption: str, kept: list[Caption]) -> str | None:
    if aspect not in SUBCAPTION_ASPECTS:
        return "not an aspect of sub-captions"
    if not any(character.isalnum() for character in text):
        return "no words"
    if says_nothing(text) or _UNSTATED.search(text):
        return "says only that something is not known"
    if len(text.split()) < 2 and len(caption.split()) > 1:
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
