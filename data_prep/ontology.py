"""Disease hierarchy: which node a label names, what is general above it, and the sentences made from both.

The published file (Derm1M, Yan et al., ICCV 2025) maps each node to its children, beginning at "root". A node's name
may list synonyms ("Nail diseases, nail disease"), and a node may have several parents: "melanocytic" lies under
"benign" and under "malignant". Nothing here guesses: a label matches a name or it does not.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from data_prep.errors import InputError

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
}

#: Nodes whose name lists different diseases as if they were synonyms. They can be matched, but their own name is
#: left out of the path: a lentigo must not be said to be a melasma.
_SEVERAL_DISEASES = frozenset(
    {"Melasma, Lentigo", "Ecthyma, ecthyma gangrenosum", "Lentigo maligna melanoma, Lentigo maligna"}
)

_BRITISH = {"naevus": "nevus", "naevi": "nevi", "haemangioma": "hemangioma", "seborrhoeic": "seborrheic"}
_NO_NAME = {"", "nos"}  # what a comma leaves behind in "Chronic dermatitis, NOS" and "Lichen simplex chronicus, "


# ---------------------------------------------------------------------------------------------- names


def _key(name: str) -> str:
    """Case, accents, hyphens, apostrophes and other punctuation do not tell names apart."""
    text = unicodedata.normalize("NFKD", name)
    text = "".join(c for c in text if not unicodedata.combining(c)).casefold()
    text = re.sub(r"['\u2018\u2019]", "", text)
    return " ".join(_BRITISH.get(word, word) for word in re.findall(r"\w+", text))


def _loose_key(name: str) -> str:
    """`_key` without possessives ("Bowen's") and with a last word in the plural made singular where that is safe.

    Safe are "-oses", "-omas", "nevi" and a plain "s" after a consonant: "psoriasis", "herpes", "lupus", "milia"
    and "rhus" stay as they are.
    """
    *words, last = _key(re.sub(r"['\u2018\u2019]s\b", "", name)).split() or [""]
    if last == "nevi":
        last = "nevus"
    elif last.endswith("oses"):
        last = last[:-2] + "is"
    elif last.endswith("omas") or re.search(r"[b-df-hj-np-rtv-z]s$", last):
        last = last[:-1]
    return " ".join([*words, last])


def _synonyms(node: str) -> list[str]:
    node = re.sub(r'\s*\(from "[^"]*"\)', "", node)  # a remark on the spreadsheet the name came from
    return [name for part in node.split(",") if (name := " ".join(part.split())).casefold() not in _NO_NAME]


def _display(node: str) -> str:
    """The first synonym, lower-cased: "Actinic solar damage(pigmentation)" -> "actinic solar damage (pigmentation)"."""
    return re.sub(r"(?<=\w)\(", " (", _synonyms(node)[0]).casefold()


def _index(children: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], ...]:
    """Lookups from the surest to the least sure; a key that two nodes claim in the same lookup is in neither."""
    whole: dict[str, set[str]] = {}
    synonyms: dict[str, set[str]] = {}
    loose: dict[str, set[str]] = {}
    for node in children:
        if node == ROOT:
            continue
        whole.setdefault(_key(node), set()).add(node)
        for name in _synonyms(node):
            synonyms.setdefault(_key(name), set()).add(node)
            loose.setdefault(_loose_key(name), set()).add(node)
    aliases: dict[str, set[str]] = {}
    for name, node in _ALIASES.items():
        if node in children:
            aliases[_key(name)] = {node}
            loose.setdefault(_loose_key(name), set()).add(node)
    lookups = (whole, synonyms, aliases, loose)
    return tuple({key: next(iter(nodes)) for key, nodes in lookup.items() if len(nodes) == 1} for lookup in lookups)


# ---------------------------------------------------------------------------------------------- hierarchy


@dataclass(frozen=True)
class Ontology:
    """Nodes are named by their full text in the file. Build it with `Ontology.load`."""

    children: Mapping[str, tuple[str, ...]]
    _paths: Mapping[str, tuple[str, ...]]  # node -> the nodes on every path to it, from general to specific
    _lookups: tuple[Mapping[str, str], ...]

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
        return cls(children, paths, _index(children))

    def match(self, label: str) -> str | None:
        """The node that `label` names, or None.

        Tried in order: a node's full name, one of its synonyms, the alias table, then a form without possessive
        and plural. A name that two nodes share equally matches neither.
        """
        key, loose = _key(label), _loose_key(label)
        if not key:
            return None
        *sure, least_sure = self._lookups
        return next((lookup[key] for lookup in sure if key in lookup), least_sure.get(loose))

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
    if path and set(_loose_key(diagnosis).split()) <= set(_loose_key(path[-1]).split()):
        path = path[:-1]
    return f"This is a skin image diagnosed as {', '.join([*path, diagnosis])}."


def concepts_caption(concepts: Sequence[str]) -> str | None:
    """ "This skin image shows erythema, scale."; None where no concept is known."""
    return f"This skin image shows {', '.join(concepts)}." if concepts else None
