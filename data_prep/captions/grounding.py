"""Whether a model's sub-caption says only what its caption says.

A small model invents findings, copies its prompt's example, and loses the "no" of "no itching". The check is lexical:
every content word must occur in the caption, under the same negation, and every number exactly. A sub-caption in other
words is dropped with them, which costs some good ones and keeps invented findings out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

#: Chinese and Japanese, which have no spaces: each character stands for a word
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CJK_STOPS = str.maketrans("\uff0c\u3001\u3002\uff1b\uff1a\uff01\uff1f", ",,.;:!?")
_TOKEN = re.compile(rf"\d+(?:[.,]\d+)*|[{_CJK}]|[^\W\d_{_CJK}]+(?:['\u2019][a-z]+)?|[.,;:!?]")
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_NUMBER = re.compile(r"\d")

_FUNCTION_WORDS = frozenset(
    word
    for line in (
        "a an the and or but nor so yet of in on at to for from by with into onto over under as than then that this",
        "these those there here it its he she they them their his her him i we you your our who whom whose which what",
        "when where while because if also both either is are was were be been being am has have had having do does",
        "did done can could may might must shall should will would s t very such each any some other others about",
    )
    for word in line.split()
)
_NEGATORS = frozenset(
    word
    for line in (
        "no not without never none neither nor denies denied deny denying lacks lack lacking absence absent negative",
        "free cannot non spared sparing spares excluded unlikely \u65e0 \u6ca1 \u4e0d \u672a \u975e",
    )
    for word in line.split()
)
_BACKWARD = frozenset(["not", "never", "absent", "negative", "denied", "excluded", "unlikely"])  # "itching is absent"
#: where the reach of a negation ends
_STOPS = frozenset(".;:!?") | {
    "but",
    "however",
    "although",
    "though",
    "while",
    "except",
    "which",
    "who",
    "with",
    "that",
}
_LISTING = frozenset(["or", "nor"])
_REACH = 8  # words
_MIN_CONTINUED = 6  # letters of a stem that another may continue
_UNITS = frozenset(["hour", "day", "week", "month", "year", "mm", "cm", "mg", "ml", "percent"])
#: longest first, where one ends in another
_ENDINGS = (
    *("ments", "ment", "ations", "ation", "ions", "ion", "ings", "ing", "ies", "ied", "es", "ed", "ar", "ous", "ly"),
    *("y", "s", "e"),
)


def num_words(text: str) -> int:
    """Words between spaces; in Chinese and Japanese, characters."""
    return len(_WORD.findall(text))


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A word without its commonest English endings: enough for papules/papular, itching/itchy, treated/treatment."""
    word = word.lower().replace("\u2019", "'")
    word = re.sub(r"'s?$", "", word)
    if word.endswith("n't"):
        return "not"
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


@dataclass(frozen=True)
class _Text:
    """What a text holds, reduced for comparison."""

    stems: frozenset[tuple[str, bool]]  # content word, whether negated
    numbers: frozenset[str]
    units: frozenset[tuple[str, str]]  # number, unit soon after it


def _is_negator(token: str) -> bool:
    return token in _NEGATORS or token.endswith(("n't", "n\u2019t"))


def _negated_positions(tokens: list[str]) -> set[int]:
    """Positions that a negation reaches: the words after it up to a stop or a comma (unless the comma is inside a list
    that ends in "or"), and the words before "is absent", "is not".
    """
    reached: set[int] = set()
    for position, token in enumerate(tokens):
        if not _is_negator(token):
            continue
        for ahead in range(position + 1, min(len(tokens), position + 1 + _REACH)):
            if tokens[ahead] in _STOPS:
                break
            if tokens[ahead] == ",":
                rest = tokens[ahead + 1 : position + 1 + 2 * _REACH]
                end = next((i for i, word in enumerate(rest) if word in _STOPS), len(rest))
                if not _LISTING & set(rest[:end]):
                    break
            reached.add(ahead)
        if token in _BACKWARD or token.endswith(("n't", "n\u2019t")):
            for behind in range(position - 1, max(-1, position - 1 - _REACH), -1):
                if tokens[behind] in _STOPS or tokens[behind] in (",", "and"):
                    break
                reached.add(behind)
    return reached


@lru_cache(maxsize=256)  # the caption is compared with each of its sub-captions
def _reduce(text: str) -> _Text:
    tokens = [token.lower() for token in _TOKEN.findall(text.translate(_CJK_STOPS))]
    negated = _negated_positions(tokens)
    stems: set[tuple[str, bool]] = set()
    numbers: set[str] = set()
    units: set[tuple[str, str]] = set()
    for position, token in enumerate(tokens):
        if _NUMBER.match(token):
            numbers.add(token)
            units |= {(token, stem(word)) for word in tokens[position + 1 : position + 5]}
        elif token[0].isalpha() and token not in _FUNCTION_WORDS and not _is_negator(token):
            stems.add((stem(token), position in negated))
    return _Text(frozenset(stems), frozenset(numbers), frozenset(units))


def _alike(first: str, second: str) -> bool:
    """Equal stems, or one continuing the other ("erythem", "erythemat"), but never into its opposite ("painless")."""
    if first == second:
        return True
    short, long = sorted((first, second), key=len)
    return (
        len(short) >= _MIN_CONTINUED
        and long.startswith(short)
        and "less" not in long[len(short) :]
        and "free" not in long[len(short) :]
    )


def why_ungrounded(text: str, caption: str) -> str | None:
    """None if `text` says nothing that `caption` does not, else the reason."""
    claim, source = _reduce(text), _reduce(caption)
    missing = sorted(claim.numbers - source.numbers)
    if missing:
        return f"not grounded: number {missing[0]} is not in the caption"
    for number, unit in sorted(claim.units):
        source_units = {word for other, word in source.units if other == number} & _UNITS
        if unit in _UNITS and source_units and unit not in source_units:
            return f"not grounded: {number} has another unit in the caption"
    for word, negated in sorted(claim.stems):
        polarities = {source_negated for source_negated in (False, True) if (word, source_negated) in source.stems}
        if len(word) >= _MIN_CONTINUED:
            polarities |= {source_negated for other, source_negated in source.stems if _alike(word, other)}
        if not polarities:
            return f"not grounded: {word!r} is not in the caption"
        if negated not in polarities:
            return f"negation {'invented' if negated else 'lost'}: {word!r}"
    return None
