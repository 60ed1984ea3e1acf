"""The lexicon of clinical terms (`lexicon.yaml`) and the aspect it gives to a clause."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

import yaml

from data_prep.schema import SUBCAPTION_ASPECTS, Aspect

STRENGTHS = {"cue": 4.0, "name": 2.5, "term": 2.0, "hint": 1.0}
_IGNORE = "ignore"
_TOKEN = re.compile(r"[^\W\d_]+(?:['\u2019][a-z]+)?|\d+")

Weights = tuple[tuple[Aspect, float], ...]


@dataclass(frozen=True)
class Lexicon:
    words: dict[str, Weights]  # an empty entry: the word counts for nothing
    beginnings: dict[str, Weights]
    endings: dict[str, Weights]
    phrases: dict[str, tuple[tuple[tuple[str, ...], Weights], ...]]  # first word -> other words, longest first
    patterns: tuple[tuple[re.Pattern[str], Aspect], ...]


@cache
def load_lexicon() -> Lexicon:
    """`lexicon.yaml`, compiled for look-up by token."""
    raw = yaml.safe_load((files(__package__) / "lexicon.yaml").read_text(encoding="utf-8"))
    words: dict[str, dict[Aspect, float]] = {word: {} for word in raw.pop(_IGNORE)["cue"]}
    beginnings: dict[str, dict[Aspect, float]] = {}
    endings: dict[str, dict[Aspect, float]] = {}
    phrases: dict[tuple[str, ...], dict[Aspect, float]] = {}
    patterns: list[tuple[re.Pattern[str], Aspect]] = []
    for name, lists in raw.items():
        aspect = Aspect(name)
        patterns += [(re.compile(pattern), aspect) for pattern in lists.get("patterns", [])]
        for strength, weight in STRENGTHS.items():
            for term in lists.get(strength, []):
                parts = tuple(term.split())
                if len(parts) > 1:
                    entry = phrases.setdefault(parts, {})
                elif term.startswith("*"):
                    entry = endings.setdefault(term[1:], {})
                elif term.endswith("*"):
                    entry = beginnings.setdefault(term[:-1], {})
                else:
                    entry = words.setdefault(term, {})
                entry[aspect] = max(weight, entry.get(aspect, 0.0))
    by_first: dict[str, list[tuple[tuple[str, ...], Weights]]] = {}
    for parts, entry in sorted(phrases.items(), key=lambda item: -len(item[0])):
        by_first.setdefault(parts[0], []).append((parts[1:], tuple(entry.items())))
    return Lexicon(
        words={word: tuple(entry.items()) for word, entry in words.items()},
        beginnings={word: tuple(entry.items()) for word, entry in beginnings.items()},
        endings={word: tuple(entry.items()) for word, entry in endings.items()},
        phrases={first: tuple(entries) for first, entries in by_first.items()},
        patterns=tuple(patterns),
    )


@lru_cache(maxsize=65536)
def _word_weights(token: str) -> Weights:
    lexicon = load_lexicon()
    if token in lexicon.words:
        return lexicon.words[token]
    for length in range(len(token), 2, -1):
        if token[:length] in lexicon.beginnings:
            return lexicon.beginnings[token[:length]]
    for start in range(1, len(token) - 2):
        if token[start:] in lexicon.endings:
            return lexicon.endings[token[start:]]
    return ()


def _matches(tokens: list[str], start: int, parts: tuple[str, ...]) -> bool:
    if start + len(parts) > len(tokens):
        return False
    return all(
        token.startswith(part[:-1]) if part.endswith("*") else token == part
        for token, part in zip(tokens[start : start + len(parts)], parts, strict=True)
    )


def _hits(tokens: list[str]) -> Iterator[tuple[int, Weights]]:
    """Position and weights of every term; a phrase hides the words inside it."""
    phrases = load_lexicon().phrases
    position = 0
    while position < len(tokens):
        for rest, weights in phrases.get(tokens[position], ()):
            if _matches(tokens, position + 1, rest):
                yield position, weights
                position += 1 + len(rest)
                break
        else:
            weights = _word_weights(tokens[position])
            if weights:
                yield position, weights
            position += 1


@lru_cache(maxsize=4096)
def score(text: str) -> tuple[Aspect, float]:
    """The aspect with the greatest weight of terms, and that weight; (OTHER, 0) if there are none.

    Repeated evidence counts half each time, so a list of diseases does not outvote one cue; earlier terms count up to a
    quarter more, because a clause begins with what it is about. A site beside anything else is where that thing is.
    """
    lowered = text.lower()
    tokens = _TOKEN.findall(lowered)
    evidence: dict[Aspect, list[float]] = {}
    for position, weights in _hits(tokens):
        early = 1.25 - 0.25 * position / len(tokens)
        for aspect, weight in weights:
            evidence.setdefault(aspect, []).append(weight * early)
    for pattern, aspect in load_lexicon().patterns:
        if pattern.search(lowered):
            evidence.setdefault(aspect, []).append(STRENGTHS["cue"])
    named_elsewhere = any(
        max(weights) >= STRENGTHS["term"] for aspect, weights in evidence.items() if aspect is not Aspect.BODY_SITE
    )
    best, best_total = Aspect.OTHER, 0.0
    for aspect in SUBCAPTION_ASPECTS:
        found = sorted(evidence.get(aspect, ()), reverse=True)
        total = sum(weight * 0.5**rank for rank, weight in enumerate(found))
        if aspect is Aspect.BODY_SITE and named_elsewhere:
            total *= 0.6
        if total > best_total:
            best, best_total = aspect, total
    return best, best_total


def label(text: str) -> Aspect:
    """What a clause speaks of, by the lexicon; OTHER if it holds no clinical term."""
    return score(text)[0]
