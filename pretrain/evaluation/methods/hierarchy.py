"""How wrong is a wrong diagnosis: right at level 1, 2, ... of a hierarchy, and steps between the two nodes.

Level 1 is the most general. Shapes: N images, C classes, L levels.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.labels.names import loose_key
from data_prep.labels.ontology import ROOT, Ontology

MAX_LEVELS = 5
_SEPARATOR = "\x1f"  # no name has it


@dataclass(frozen=True)
class Hierarchy:
    """Nodes with their parents; those of level 1 have none. `find` gives the node that a class name names, or None."""

    parents: Mapping[str, tuple[str, ...]]
    find: Callable[[str], str | None]


@dataclass(frozen=True)
class HierarchyScores:
    """What a prediction of one class is worth where another is true; [true, predicted]."""

    right_LCC: NDArray[np.float64]  # 1 or 0; NaN where the true node lies above the level
    distance_CC: NDArray[np.int64]

    @property
    def num_levels(self) -> int:
        return len(self.right_LCC)


# ---------------------------------------------------------------------------------------------- where it comes from


def load_hierarchy(path: Path) -> Hierarchy:
    """From either form of file:

    - Derm1M's ontology, {"root": [node, ...], node: [child, ...], ...}: a node may have several parents, a name list
      synonyms. Class names are matched as `Ontology.match` does.
    - Fitzpatrick17k's, {group: {group: {label: images}}}, nested to any depth: a tree whose nodes are known by their
      path, since a label may be named as the group above it ("malignant melanoma"). Class names are matched to leaves
      first; one that several leaves have names none.

    Raises InputError for a missing or malformed file.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the hierarchy ({error.strerror}); check the task's ontology") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if isinstance(raw, dict) and ROOT in raw:
        return _of_ontology(Ontology.load(path))
    if not isinstance(raw, dict) or not raw:
        raise InputError(f"{path}: expected {{node: [child, ...]}} with a 'root', or groups nested in one another")
    return hierarchy_of_paths(_nested_paths(raw, (), path))


def hierarchy_of_paths(paths: Iterable[Sequence[str]]) -> Hierarchy:
    """A tree of paths, each from general to specific. A node is its path, so no path contradicts another."""
    parents: dict[str, tuple[str, ...]] = {}
    ends: dict[str, set[str]] = {}
    for path in paths:
        for depth in range(1, len(path) + 1):
            parents[node_of_path(path[:depth])] = (node_of_path(path[: depth - 1]),) if depth > 1 else ()
        if path:
            ends.setdefault(loose_key(path[-1]), set()).add(node_of_path(path))
    inner: dict[str, set[str]] = {}
    for node in parents:
        inner.setdefault(loose_key(node.rsplit(_SEPARATOR, 1)[-1]), set()).add(node)

    def find(name: str) -> str | None:
        key = loose_key(name)
        nodes = ends.get(key) or inner.get(key, set())
        return next(iter(nodes)) if len(nodes) == 1 else None

    return Hierarchy(parents, find)


def node_of_path(path: Sequence[str]) -> str:
    return _SEPARATOR.join(path)


def commonest_paths(labels: Sequence[str | None], paths: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Label -> the path that most of its rows carry; of equally common ones the first in the alphabet."""
    counts: dict[str, Counter[tuple[str, ...]]] = {}
    for label, path in zip(labels, paths, strict=True):
        if label is not None and path:
            counts.setdefault(label, Counter())[tuple(path)] += 1
    return {label: min(found, key=lambda path: (-found[path], path)) for label, found in counts.items()}


def _of_ontology(ontology: Ontology) -> Hierarchy:
    parents: dict[str, list[str]] = {node: [] for node in ontology.children if node != ROOT}
    for node, children in ontology.children.items():
        for child in dict.fromkeys(children) if node != ROOT else ():
            parents[child].append(node)
    # a node that lies below the root and below another node as well has level 1; the root is no node to share
    top = set(ontology.children[ROOT])
    return Hierarchy({node: tuple(above) if node not in top else () for node, above in parents.items()}, ontology.match)


def _nested_paths(raw: Mapping[str, Any], above: tuple[str, ...], path: Path) -> list[tuple[str, ...]]:
    paths = []
    for name, below in raw.items():
        if isinstance(below, dict) and below:
            paths += _nested_paths(below, (*above, name), path)
        elif below is None or isinstance(below, int | float):
            paths.append((*above, name))
        else:
            raise InputError(f"{path}: {name!r}: expected a group {{name: ...}} or the number of images of a label")
    return paths


# ---------------------------------------------------------------------------------------------- scores


def hierarchy_scores(hierarchy: Hierarchy, nodes: Sequence[str]) -> HierarchyScores:
    """Of every pair of classes, given as their nodes (C).

    A node's level is its shortest way from the top. The prediction is right at a level where it has the same ancestors
    there as the truth, itself counted; so a node with two parents is not right by agreeing with one of them. A true
    node above the level is not scored there, a predicted one is wrong.

    The distance is the least number of steps up from one node to a common ancestor and down to the other; the root,
    above level 1, is common to all.
    """
    up = [_steps_up(hierarchy.parents, node) for node in nodes]
    level = _levels(hierarchy.parents)
    num_levels = min(MAX_LEVELS, max(level[node] for node in nodes))
    right_LCC = np.full((num_levels, len(nodes), len(nodes)), np.nan)
    for number in range(num_levels):
        ancestors = [frozenset(node for node in steps if level[node] == number + 1) for steps in up]
        for true, above in enumerate(ancestors):
            if above:
                right_LCC[number, true] = [above == other for other in ancestors]
    distance_CC = np.zeros((len(nodes), len(nodes)), dtype=np.int64)
    for true, mine in enumerate(up):
        for predicted, theirs in enumerate(up):
            distance_CC[true, predicted] = min(mine[node] + theirs[node] for node in mine.keys() & theirs.keys())
    return HierarchyScores(right_LCC, distance_CC)


def levels_that_add_nothing(scores: HierarchyScores) -> tuple[int, ...]:
    """Levels that tell no two of the classes apart that the level above does not; of level 1, no two at all.

    A true class that ends above the level is not scored there, and counts for neither.
    """
    num_classes = len(scores.distance_CC)
    above_CC = np.ones((num_classes, num_classes))
    found = []
    for level, right_CC in enumerate(scores.right_LCC, 1):
        if not ((right_CC == 0) & (above_CC == 1)).any():
            found.append(level)
        above_CC = right_CC
    return tuple(found)


def nodes_with_several_parents(hierarchy: Hierarchy, nodes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Of these nodes and all above them, those with more than one parent -> the parents; sorted by name."""
    every = {above for node in nodes for above in _steps_up(hierarchy.parents, node)}
    return {node: parents for node in sorted(every) if len(parents := hierarchy.parents.get(node, ())) > 1}


def _steps_up(parents: Mapping[str, tuple[str, ...]], node: str) -> dict[str, int]:
    """Each ancestor, the node itself and the root -> the fewest steps to it."""
    steps = {node: 0}
    layer = [node]
    while layer:
        above = [parent for name in layer for parent in parents.get(name, ()) or ((ROOT,) if name != ROOT else ())]
        layer = [name for name in dict.fromkeys(above) if name not in steps]
        steps |= dict.fromkeys(layer, max(steps.values()) + 1)
    return steps


def _levels(parents: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Node -> nodes on the shortest way down to it; 0 for the root."""
    return {ROOT: 0} | {node: _steps_up(parents, node)[ROOT] for node in parents}
