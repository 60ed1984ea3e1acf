"""Visual concepts of an image in the terms of a fixed list, such as the 64 that MAKE and Derm1M annotate with.

The list is JSON, {term: [synonym, ...]}. Nothing is guessed: a text is a term, a synonym of one term, or unknown.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import InputError
from data_prep.labels.names import UNMATCHED, Lookup, Match, look_up, lookup, name_key

#: Adjectives that the published list gives as synonyms of "streaks": they describe streaks there, but a border, a
#: shape or a distribution in the tables.
_NOT_SYNONYMS = frozenset({"regular", "irregular"})


@dataclass(frozen=True)
class Concepts:
    """Terms as the list spells them. Build it with `Concepts.load`."""

    terms: tuple[str, ...]
    _whole: Lookup
    _synonyms: Lookup
    _normalised: Lookup

    @classmethod
    def load(cls, path: str | Path) -> Concepts:
        """Raises InputError for a missing or malformed list."""
        synonyms = read_terms(Path(path))
        names = [
            (name, term)
            for term, given in synonyms.items()
            for name in (*_hidden_names(term), *given)
            if name_key(name) not in _NOT_SYNONYMS
        ]
        every = [*names, *((term, term) for term in synonyms)]
        return cls(
            tuple(synonyms),
            lookup((name_key(term), term) for term in synonyms),
            lookup((name_key(name), term) for name, term in names),
            lookup((_singular(name), term) for name, term in every),
        )

    def find(self, text: str) -> str | None:
        """The term that `text` names, or None where it names none, or several equally."""
        return self.look_up(text).node

    def look_up(self, text: str) -> Match:
        """As `find`, and how: a term itself, then a synonym, then either in the singular.

        A text that is a term is that term, even where another lists it as a synonym ("cyst" is no "nodule").
        """
        key, singular = name_key(text), _singular(text)
        match = look_up([("exact", key, self._whole), ("synonym", key, self._synonyms)])
        return look_up([("normalised", singular, self._normalised)]) if match == UNMATCHED else match


def _hidden_names(term: str) -> list[str]:
    """ "brown(hyperpigmentation)" -> brown, hyperpigmentation; "exophytic/fungating" -> exophytic, fungating."""
    names = [name for part in re.split(r"[/()]", term) if (name := part.strip())]
    return names if len(names) > 1 else []


def _singular(text: str) -> str:
    """The key with each word in the singular, by rules that need only agree between the list and the text."""
    return " ".join(_singular_word(word) for word in name_key(text).split())


def _singular_word(word: str) -> str:
    for plural, singular in (("comedones", "comedo"), ("ae", "a"), ("sses", "ss"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    return word[:-1] if re.search(r"[^suia]s$", word) or word.endswith("ias") else word


def read_terms(path: Path) -> dict[str, list[str]]:
    """The list as it stands, {term: synonyms}. Raises InputError for a missing or malformed one."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except OSError as error:
        raise InputError(f"{path}: cannot read the list of concepts ({error.strerror}); check concepts_path") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}; expected {{term: [synonym, ...]}}") from None
    if not isinstance(raw, dict) or not raw:
        raise InputError(f"{path}: expected a JSON object {{term: [synonym, ...]}} with at least one term")
    for term, synonyms in raw.items():
        if not isinstance(synonyms, list) or not all(isinstance(synonym, str) for synonym in synonyms):
            raise InputError(f"{path}: term {term!r}: expected a list of its synonyms")
        if not name_key(term):
            raise InputError(f"{path}: term {term!r} has no letters or digits; remove it or name it")
    return raw


def _unique(pairs: list[tuple[str, list[str]]], path: Path) -> dict[str, list[str]]:
    terms = dict(pairs)
    if len(terms) < len(pairs):
        raise InputError(f"{path}: a term is defined twice; merge the two lists of synonyms")
    return terms
