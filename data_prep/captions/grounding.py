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
_CJK_STOPS = str.maketrans("\uff0c\u3002\uff1b\uff1a\uff01\uff1f\uff05\uff64", ",.;:!?%\u3001")
_LIST_MARK = "\u3001"  # between members of a list; in Japanese, between clauses too
#: Japanese: a clause that says that something is there ends here
_CLAUSE_END = re.compile("(?<=あり|ある|った|れる|める|めた|るが)\u3001")
#: Japanese negates behind what is negated
_NOT_BEFORE = re.compile("な(?:い|し|く|かった)|ませ?ん|(?:め|られ|せ)ず")
_PHRASES = r"rul(?:e|ed|es|ing)\s+out|rather\s+than|instead\s+of|否认|否認|排除|除外"
_TOKEN = re.compile(
    rf"{_PHRASES}|{_NOT_BEFORE.pattern}|\d+(?:[.,]\d+)*|[{_CJK}]|[^\W\d_{_CJK}]+(?:['\u2019][a-z]+)?|[.,;:!?%{_LIST_MARK}]",
    re.IGNORECASE,
)
_PHRASE = re.compile(_PHRASES)
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
        "free cannot non spared sparing spares exclude excludes excluded excluding unlikely",
        "无 無 没 沒 不 未 非 否",
    )
    for word in line.split()
)
#: "itching is absent"
_BACKWARD = frozenset(
    ["not", "never", "absent", "negative", "denied", "excluded", "ruled out", "unlikely", "排除", "除外"]
)
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
_REACH = 8  # words, of each member of a list
_MIN_CONTINUED = 6  # letters of a stem that another may continue
_UNITS = frozenset(
    word
    for line in (
        "minute min hour hr day week wk month year yr y mm cm inch mg g ml percent % centimeter centimetre",
        "millimeter millimetre 毫 厘 天 日 周 週 月 年 岁 歳 歲",
    )
    for word in line.split()
)
#: What may stand between a number and its unit: "3 to 5 mm", "10 consecutive days", "3 个月"
_BEFORE_UNIT = frozenset(
    word
    for line in ("to or and by x full whole consecutive further additional more about", "个 個 か ヶ ケ 箇 多 余")
    for word in line.split()
)
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
    units: frozenset[tuple[str, str]]  # number, its unit


def _is_negator(token: str) -> bool:
    return token in _NEGATORS or token.endswith(("n't", "n\u2019t")) or _PHRASE.fullmatch(token) is not None


def _negated_positions(tokens: list[str]) -> set[int]:
    """Positions that a negation reaches: the words after it up to a stop or a comma (unless the comma is inside a list
    that ends in "or"), and the words before "is absent", "is not". It reaches over the marks of a Chinese list.
    """
    reached: set[int] = set()
    for position, token in enumerate(tokens):
        behind_only = _NOT_BEFORE.fullmatch(token) is not None
        if _is_negator(token):
            left = _REACH
            for ahead in range(position + 1, len(tokens)):
                if tokens[ahead] == _LIST_MARK:
                    left = _REACH
                    continue
                if tokens[ahead] in _STOPS or left == 0:
                    break
                if tokens[ahead] == ",":
                    rest = tokens[ahead + 1 : position + 1 + 2 * _REACH]
                    end = next((i for i, word in enumerate(rest) if word in _STOPS), len(rest))
                    if not _LISTING & set(rest[:end]):
                        break
                reached.add(ahead)
                left -= 1
        if behind_only or token in _BACKWARD or token.endswith(("n't", "n\u2019t")):
            left = _REACH
            for behind in range(position - 1, -1, -1):
                if tokens[behind] == _LIST_MARK:
                    left = _REACH
                    continue
                if tokens[behind] in _STOPS or tokens[behind] in (",", "and") or left == 0:
                    break
                reached.add(behind)
                left -= 1
    return reached


def _unit(tokens: list[str], position: int) -> str | None:
    """Of the number at `position`: "5" in "3 to 5 mm" and "3" too."""
    for token in tokens[position + 1 : position + 6]:
        if token.removesuffix("s") in _UNITS:
            return token.removesuffix("s")
        if token not in _BEFORE_UNIT and not _NUMBER.match(token):
            return None
    return None


@lru_cache(maxsize=256)  # the caption is compared with each of its sub-captions
def _reduce(text: str) -> _Text:
    marked = _CLAUSE_END.sub(",", text.translate(_CJK_STOPS))
    tokens = [" ".join(token.lower().split()) for token in _TOKEN.findall(marked)]
    negated = _negated_positions(tokens)
    stems: set[tuple[str, bool]] = set()
    numbers: set[str] = set()
    units: set[tuple[str, str]] = set()
    for position, token in enumerate(tokens):
        if _NUMBER.match(token):
            numbers.add(token)
            if (unit := _unit(tokens, position)) is not None:
                units.add((token, unit))
        elif token[0].isalpha() and not (
            token in _FUNCTION_WORDS or _is_negator(token) or _NOT_BEFORE.fullmatch(token)
        ):
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
    for number, _ in sorted(claim.units - source.units):
        return f"not grounded: {number} has another unit in the caption, or none"
    for word, negated in sorted(claim.stems):
        polarities = {source_negated for source_negated in (False, True) if (word, source_negated) in source.stems}
        if len(word) >= _MIN_CONTINUED:
            polarities |= {source_negated for other, source_negated in source.stems if _alike(word, other)}
        if not polarities:
            return f"not grounded: {word!r} is not in the caption"
        if negated not in polarities:
            return f"negation {'invented' if negated else 'lost'}: {word!r}"
    return None
