"""Disease hierarchy: which node a label names, what is general above it, and the sentences made from both.

The published file (Derm1M, Yan et al., ICCV 2025) maps each node to its children, beginning at "root". A node's name
may list synonyms ("Nail diseases, nail disease"), and a node may have several parents: "melanocytic" lies under
"benign" and under "malignant". Nothing here guesses: what may mean two nodes is ambiguous and matches neither.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.labels.names import (
    UNMATCHED,
    How,
    Lookup,
    Match,
    denies,
    look_up,
    lookup,
    loose_key,
    most_similar,
    name_key,
    normalised_keys,
    parts_of,
    without_qualifiers,
)

ROOT = "root"

#: Everyday names of exactly one node that the published file does not list. Only equivalent names belong here:
#: a broader one ("vascular lesion") or a narrower one ("solar lentigo") would put images under a false node.
_ALIASES = {
    "nevus": "Melanocytic nevus",
    "mole": "Melanocytic nevus",
    "plaque psoriasis": "Psoriasis (plaque)",
    "acrochordon": "Skin tag",
    "shingles": "Herpes zoster",
    "chickenpox": "Varicella",
    "ringworm of the body": "Tinea corporis",
    "athlete's foot": "Tinea pedis",
    "infantile hemangioma": "Strawberry birthmarks",
    "psoriasis vulgaris": "Psoriasis (plaque)",
    "moles": "Melanocytic nevus",
    "nevocytic nevus": "Melanocytic nevus",
    "bcc": "Basal cell carcinoma",
    "scc": "Squamous cell carcinoma",
    "hives": "Urticaria",
    "herpes simplex": "Herpes simplex virus",
    "fifth disease": "Parvovirus B19 infection",
    "fixed eruption": "Fixed drug eruption",
    "lichen simplex": "Lichen simplex chronicus, ",
    "androgenic alopecia": "Androgenetic alopecia",
    "dyshidrotic eczema": "Dyshidrosiform eczema",
    "pompholyx": "Dyshidrosiform eczema",
    "epidermal cyst": "Epidermoid cyst",
    "verruca plana": "Flat wart",
    "striae distensae": "Striae",
}

#: Nodes whose name lists different diseases as if they were synonyms. They can be matched, but their own name is
#: left out of the path: a lentigo must not be said to be a melasma.
_SEVERAL_DISEASES = frozenset(
    {"Melasma, Lentigo", "Ecthyma, ecthyma gangrenosum", "Lentigo maligna melanoma, Lentigo maligna"}
)

_NO_NAME = {"", "nos"}  # what a comma leaves behind in "Chronic dermatitis, NOS" and "Lichen simplex chronicus, "
_CACHE_SIZE = 100_000  # distinct labels kept


# ---------------------------------------------------------------------------------------------- names


def _synonyms(node: str) -> list[str]:
    node = re.sub(r'\s*\(from "[^"]*"\)', "", node)  # a remark on the spreadsheet the name came from
    return [name for part in node.split(",") if (name := " ".join(part.split())).casefold() not in _NO_NAME]


def _display(node: str) -> str:
    """The first synonym, lower-cased: "Actinic solar damage(pigmentation)" -> "actinic solar damage (pigmentation)"."""
    return re.sub(r"(?<=\w)\(", " (", _synonyms(node)[0]).casefold()


@dataclass(frozen=True)
class _Names:
    """Look-ups of all names of all nodes."""

    whole: Lookup  # a node's full text
    synonyms: Lookup
    aliases: Lookup
    normalised: Lookup
    by_num_words: Mapping[int, tuple[tuple[tuple[str, ...], str], ...]]  # for `most_similar`
    vocabulary: frozenset[str]  # words of all names

    @classmethod
    def of(cls, nodes: Sequence[str]) -> _Names:
        names = [(name, node) for node in nodes for name in _synonyms(node)]
        aliases = [(name, node) for name, node in _ALIASES.items() if node in nodes]
        every = dict.fromkeys([*names, *aliases, *((node, node) for node in nodes)])
        loose = dict.fromkeys((tuple(loose_key(name).split()), node) for name, node in every)
        return cls(
            lookup((name_key(node), node) for node in nodes),
            lookup((name_key(name), node) for name, node in names),
            lookup((name_key(name), node) for name, node in aliases),
            lookup((key, node) for name, node in every for key in normalised_keys(name)),
            {n: tuple(entry for entry in loose if len(entry[0]) == n) for n in {len(words) for words, _ in loose}},
            frozenset(word for name, _ in every for key in (name_key(name), loose_key(name)) for word in key.split()),
        )

    def find(self, text: str) -> Match:
        key = name_key(text)
        tables: list[tuple[How, str, Lookup]] = [
            ("exact", key, self.whole),
            ("synonym", key, self.synonyms),
            ("alias", key, self.aliases),
        ]
        return look_up([*tables, *(("normalised", key, self.normalised) for key in normalised_keys(text))])


# ---------------------------------------------------------------------------------------------- hierarchy


@dataclass(frozen=True)
class Ontology:
    """Nodes are named by their full text in the file. Build it with `Ontology.load`."""

    children: Mapping[str, tuple[str, ...]]
    _paths: Mapping[str, tuple[str, ...]]  # node -> the nodes on every path to it, from general to specific
    _levels: Mapping[str, int]
    _names: _Names
    _found: dict[tuple[str, float], Match] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, path: str | Path) -> Ontology:
        """Read `{"root": [...], node: [child, ...], ...}`.

        Raises InputError for a missing or malformed file, a child that is nowhere defined, a node that "root" does
        not reach, and a cycle.
        """
        children = _read(Path(path))
        parents = _parents(children, Path(path))
        try:
            order = list(TopologicalSorter(parents).static_order())
        except CycleError as error:
            cycle = " -> ".join(repr(node) for node in error.args[1])
            raise InputError(f"{path}: the hierarchy has a cycle: {cycle}; remove one of its child entries") from None
        # dominators of a graph without cycles: a node, and whatever all its parents have above them
        above: dict[str, frozenset[str]] = {}
        for node in order:
            lists = [above[parent] for parent in parents[node]]
            above[node] = frozenset({node}) | (frozenset.intersection(*lists) if lists else frozenset())
        # dominators of a node form a chain, so the number of their own dominators sorts them
        paths = {node: tuple(sorted(above[node] - {ROOT}, key=lambda n: len(above[n]))) for node in order}
        levels = {ROOT: 0}
        for node in order[1:]:
            levels[node] = 1 + min(levels[parent] for parent in parents[node])
        return cls(children, paths, levels, _Names.of([node for node in children if node != ROOT]))

    def match(self, label: str) -> str | None:
        """The node that `label` names, or None.

        Tried in order: a node's full name, one of its synonyms, the alias table, then other spellings
        (`normalised_keys`). A name that two nodes share equally matches neither.
        """
        return self._names.find(label).node

    def find(self, label: str, min_similarity: float) -> Match:
        """The node that a free-text diagnosis names.

        First as `match`; then without words of certainty and severity ("suspected"); then the most similar name, if
        its `name_similarity` is at least `min_similarity` in (0, 1], 1 meaning none; then part by part, where the text
        names several diagnoses. Several are ambiguous, unless each lies on every path to the most specific of them,
        which is meant then. A part that names no node leaves the text ambiguous, too, but for a remark in brackets.
        Answers are kept: a few thousand labels stand in a million rows.
        """
        if (match := self._found.get((label, min_similarity))) is None:
            if len(self._found) >= _CACHE_SIZE:
                self._found.clear()
            match = self._found[label, min_similarity] = self._find(label, min_similarity)
        return match

    def _find(self, label: str, min_similarity: float) -> Match:
        match = self._find_one(label, min_similarity)
        if match.how != "unmatched" or denies(label):
            return match
        parts, remarks = parts_of(label)
        if len(parts) + len(remarks) < 2:
            return match
        matches = [self._find_one(part, min_similarity) for part in parts]
        if all(found.how == "unmatched" for found in matches):
            return UNMATCHED
        remarked = [found for remark in remarks if (found := self._find_one(remark, min_similarity)).how != "unmatched"]
        return self._most_specific([*matches, *remarked])

    def _find_one(self, text: str, min_similarity: float) -> Match:
        """A text that names one diagnosis."""
        match = self._names.find(text)
        if match.how != "unmatched":
            return match
        bare = without_qualifiers(text)
        match = self._names.find(bare)
        if match.node is not None:
            return replace(match, how="normalised")
        if match.how == "unmatched" and min_similarity < 1:
            names = self._names
            return most_similar(loose_key(bare), names.by_num_words, names.vocabulary, min_similarity)
        return match

    def _most_specific(self, matches: Sequence[Match]) -> Match:
        nodes = {match.node for match in matches if match.node is not None}
        last = max(sorted(nodes), key=lambda node: len(self._paths[node]), default=None)
        if last is None or any(match.node is None or match.node not in self._paths[last] for match in matches):
            return Match(None, "ambiguous", 0.0, tuple(sorted(nodes.union(*(match.candidates for match in matches)))))
        similarity = min(match.similarity for match in matches)
        return Match(last, "fuzzy" if any(match.how == "fuzzy" for match in matches) else "normalised", similarity)

    def level(self, node: str) -> int:
        """How many nodes stand on the shortest path from the root to `node`, itself included; 1 below the root."""
        return self._levels[node]

    def path(self, node: str) -> tuple[str, ...]:
        """Nodes on every path from the root to `node`, from general to specific, as lower-cased first synonyms.

        With several parents only what they agree on is said: a melanoma is never called benign. Raises KeyError
        where `node` is not one that `match` returned.
        """
        return tuple(_display(name) for name in self._paths[node] if name not in _SEVERAL_DISEASES)

    def canonical_path(self, path: Sequence[str]) -> tuple[str, ...]:
        """A path written by a source, with each node once and under its first synonym.

        Sources that join a path with commas repeat nodes that have synonyms ("ulcers", "ulcer", "erosion of skin").
        A part that names no node is kept as it is.
        """
        names: list[str] = []
        for part in path:
            node = self.match(part)
            name = part if node is None or node in _SEVERAL_DISEASES else _display(node)
            if name not in names:
                names.append(name)
        return tuple(names)


def _read(path: Path) -> dict[str, tuple[str, ...]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise InputError(f"{path}: the node {key!r} is defined twice; merge the two lists of children")
            seen[key] = value
        return seen

    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise InputError(f"{path}: cannot read the ontology ({error.strerror}); check ontology_path") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}; expected {{node: [child, ...]}} with a 'root'") from None
    if not isinstance(raw, dict) or ROOT not in raw:
        raise InputError(f"{path}: expected a JSON object {{node: [child, ...]}} with a node 'root'")
    for node, names in raw.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: node {node!r}: expected a list of names of its children")
        if node != ROOT and not _synonyms(node):
            raise InputError(f"{path}: node {node!r} has no name; remove it or name it")
    return {node: tuple(names) for node, names in raw.items()}


def _parents(children: Mapping[str, tuple[str, ...]], path: Path) -> dict[str, set[str]]:
    parents: dict[str, set[str]] = {node: set() for node in children}
    for node, names in children.items():
        for name in names:
            if name not in parents:
                raise InputError(
                    f"{path}: {name!r}, a child of {node!r}, is not defined; add it with [] as its children"
                )
            parents[name].add(node)
    orphans = [node for node, above in parents.items() if not above and node != ROOT]
    if orphans:
        raise InputError(f"{path}: {orphans[0]!r} is no node's child; list it under its parent or under 'root'")
    return parents


# ---------------------------------------------------------------------------------------------- sentences


def diagnosis_caption(diagnosis: str, path: Sequence[str] = ()) -> str:
    """ "This is a skin image diagnosed as proliferations, melanocytic, melanoma." (the form MAKE publishes).

    `diagnosis` always stands last. It replaces the last node of `path` where that is a longer form of it
    ("melanocytic nevus" for "nevus"); otherwise it follows the path. Without a path the label stands alone.
    """
    if path and set(loose_key(diagnosis).split()) <= set(loose_key(path[-1]).split()):
        path = path[:-1]
    return f"This is a skin image diagnosed as {', '.join([*path, diagnosis])}."


def concepts_caption(concepts: Sequence[str]) -> str | None:
    """ "This skin image shows erythema, scale."; None where no concept is known."""
    return f"This skin image shows {', '.join(concepts)}." if concepts else None
