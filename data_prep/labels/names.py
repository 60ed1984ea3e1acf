"""Names of diseases and signs as people write them: which spellings are one name, and what is a typing error.

Pure functions of strings; `ontology.py` and `concepts.py` decide with them which node or term is meant.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rapidfuzz.distance import OSA

How = Literal["exact", "synonym", "alias", "normalised", "fuzzy", "ambiguous", "unmatched"]


@dataclass(frozen=True)
class Match:
    """What a text names. `node` is None where `how` is "ambiguous" or "unmatched".

    `similarity` lies in [0, 1]: 1 for every match that is not fuzzy, 0 without a match. `candidates` are the nodes
    between which an ambiguous text does not decide (one, where other parts of the text name none), else empty.
    """

    node: str | None
    how: How
    similarity: float
    candidates: tuple[str, ...] = ()


UNMATCHED = Match(None, "unmatched", 0.0)
Lookup = Mapping[str, frozenset[str]]  # key of a name -> the nodes that have it

_BRITISH = {
    "naevus": "nevus",
    "naevi": "nevi",
    "haemangioma": "hemangioma",
    "haematoma": "hematoma",
    "seborrhoeic": "seborrheic",
    "oedema": "edema",
    "grey": "gray",
    "colour": "color",
}
#: Words without which a name is the same name.
_EMPTY_WORDS = frozenset({"of", "the", "and", "nos", "unspecified", "unknown"})

_CERTAINTY = (
    "suspected|suspicious for|suspicion of|probable|probably|possible|possibly|presumed|presumptive|likely|most likely|"
    "consistent with|compatible with|suggestive of|clinically|clinical|biopsy proven|histologically proven|"
    "histologically confirmed|confirmed|diagnosis of|diagnosed as|diagnosed with|case of|a case of|dx"
)
_SEVERITY = "mild|moderate|severe"
_BEFORE = re.compile(rf"^(?:(?:{_CERTAINTY}|{_SEVERITY}) )+(?=\w)")
_AFTER = re.compile(
    rf"(?<=\w)(?: (?:{_CERTAINTY}|{_SEVERITY}|nos|not otherwise specified|unspecified|photos?|pictures?|images?))+$"
)
#: A text with one of these speaks of a disease that is not there, or not now; it is taken as a whole or not at all.
_DENIAL = re.compile(
    r"\b(?:no|not|non|never|nor|without|negative|absent|exclude[sd]?|excluding|exclusion|ruled? out|r o|h o|history|"
    r"previous|former|status post|mimic\w*|resembl\w*|like|unlikely|doubtful)\b"
)

#: Between diagnoses. A slash or a comma may also be part of one name: whole texts are looked up first.
_BETWEEN = re.compile(r"[,;/|+&?]|\b(?:and|or|vs|versus)\b\.?", re.IGNORECASE)
_REMARK = re.compile(r"[(\[]([^()\[\]]*)[)\]]?")

#: Words that differ here are other words, however long they are: hypopigmentation, photodermatosis.
_PREFIXES = ("hyper", "hypo", "macro", "micro", "inter", "intra", "endo", "exo", "pre", "post", "sub", "supra", "anti")
_MIN_WORD_SIMILARITY = 0.8
_SUFFIXES = ("iasis", "itis", "osis", "lysis", "oma", "emia", "oid", "oides", "pathy", "plasia")


# ---------------------------------------------------------------------------------------------- equal names


def name_key(name: str) -> str:
    """Case, accents, hyphens, apostrophes and other punctuation do not tell names apart."""
    text = unicodedata.normalize("NFKD", name)
    text = "".join(c for c in text if not unicodedata.combining(c)).casefold()
    text = re.sub(r"['\u2018\u2019]", "", text)
    return " ".join(_BRITISH.get(word, word) for word in re.findall(r"\w+", text))


def loose_key(name: str) -> str:
    """`name_key` without possessives ("Bowen's") and with a last word in the plural made singular where that is safe.

    Safe are "-oses", "-omas", "nevi" and a plain "s" after a consonant: "psoriasis", "herpes", "lupus", "milia"
    and "rhus" stay as they are.
    """
    *words, last = name_key(re.sub(r"['\u2018\u2019]s\b", "", name)).split() or [""]
    if last == "nevi":
        last = "nevus"
    elif last.endswith("oses"):
        last = last[:-2] + "is"
    elif last.endswith("omas") or re.search(r"[b-df-hj-np-rtv-z]s$", last):
        last = last[:-1]
    return " ".join([*words, last])


def normalised_keys(name: str) -> tuple[str, ...]:
    """From the surest: `loose_key`; the same words in another order, without "of" and "nos"; without spaces."""
    loose = loose_key(name)
    bag = sorted(set(loose.split()) - _EMPTY_WORDS)
    return (loose, f"words {' '.join(bag)}" if bag else "", f"joined {loose.replace(' ', '')}" if loose else "")


def without_qualifiers(text: str) -> str:
    """The key of a text without how sure or how severe: "suspected psoriasis" -> "psoriasis"."""
    return _AFTER.sub("", _BEFORE.sub("", name_key(text)))


def denies(text: str) -> bool:
    """Whether a text says that a disease is absent, past or only resembled ("no melanoma", "psoriasis-like")."""
    return _DENIAL.search(name_key(text)) is not None


def parts_of(text: str) -> tuple[list[str], list[str]]:
    """Diagnoses of a text that may name several, and remarks in brackets: "acne, rosacea (mild)" -> 2 and 1.

    Parts that say nothing ("nos") are left out.
    """
    remarks = [part for remark in _REMARK.findall(text) for part in _BETWEEN.split(remark)]
    parts = _BETWEEN.split(_REMARK.sub(" ", text))
    return [p.strip() for p in parts if _says_something(p)], [r.strip() for r in remarks if _says_something(r)]


def _says_something(part: str) -> bool:
    return bool(set(name_key(part).split()) - _EMPTY_WORDS)


# ---------------------------------------------------------------------------------------------- nearly equal names


def name_similarity(label: Sequence[str], name: Sequence[str], vocabulary: Collection[str]) -> float:
    """How near the words of a label are to those of a name: 1 - edits / letters of the longer, in [0, 1].

    An edit is a letter too much, too few or wrong, or two letters swapped (optimal string alignment). Names of
    different diseases are often more alike than a name and its misspelling ("pityriasis rosea", "pityriasis rubra";
    "type 1", "type 2"), so this alone cannot tell them apart: each word of the label must also be the name's word at
    the same place, or may be a typing error of it (`_may_be_typo`). Otherwise 0; no word may be missing or added.
    """
    if len(label) != len(name):
        return 0.0
    if any(mine != its and not _may_be_typo(mine, its, vocabulary) for mine, its in zip(label, name, strict=True)):
        return 0.0
    return OSA.normalized_similarity(" ".join(label), " ".join(name))


def _may_be_typo(mine: str, its: str, vocabulary: Collection[str]) -> bool:
    """Whether `mine` can be a misspelt `its`.

    It cannot where it is itself in the vocabulary ("melasma" is not "melanoma"), has another first letter
    ("atypical"), a digit, another prefix or suffix that carries meaning (hypo-, -osis), or where more than a fifth of
    its letters differ ("perioral", "perianal"; any letter of "foot").
    """
    if mine in vocabulary or mine[0] != its[0]:
        return False
    if not (mine.isalpha() and its.isalpha()):
        return False
    for affixes, has in ((_PREFIXES, str.startswith), (_SUFFIXES, str.endswith)):
        mine_has, its_has = ({affix for affix in affixes if has(word, affix)} for word in (mine, its))
        if mine_has and its_has and not mine_has & its_has:
            return False
    return OSA.normalized_similarity(mine, its) >= _MIN_WORD_SIMILARITY


def most_similar(
    label: str, names: Mapping[int, Sequence[tuple[tuple[str, ...], str]]], vocabulary: Collection[str], least: float
) -> Match:
    """The node of the most similar name at or above `least`; ambiguous where two nodes are equally near.

    `names`: number of words -> (words of a name, its node), words as in `loose_key`.
    """
    best, nodes = least, set[str]()
    words = label.split()
    for name, node in names.get(len(words), ()):
        similarity = name_similarity(words, name, vocabulary)
        if similarity > best:
            best, nodes = similarity, {node}
        elif similarity == best:
            nodes.add(node)
    if not nodes:
        return UNMATCHED
    if len(nodes) > 1:
        return Match(None, "ambiguous", 0.0, tuple(sorted(nodes)))
    return Match(nodes.pop(), "fuzzy", best)


# ---------------------------------------------------------------------------------------------- look-ups


def lookup(pairs: Iterator[tuple[str, str]]) -> dict[str, frozenset[str]]:
    """(key, node) pairs to a look-up; empty keys are left out."""
    nodes: dict[str, set[str]] = {}
    for key, node in pairs:
        if key:
            nodes.setdefault(key, set()).add(node)
    return {key: frozenset(found) for key, found in nodes.items()}


def look_up(keys: Sequence[tuple[How, str, Lookup]]) -> Match:
    """The first look-up, from the surest, that has its key; ambiguous where several nodes share it there."""
    for how, key, table in keys:
        if nodes := table.get(key):
            if len(nodes) == 1:
                return Match(next(iter(nodes)), how, 1.0)
            return Match(None, "ambiguous", 0.0, tuple(sorted(nodes)))
    return UNMATCHED
