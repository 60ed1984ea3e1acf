"""How far apart the diagnoses of a global batch lie in the disease hierarchy, for soft targets.

The hierarchy is what the samples' own paths say of it, so it is there wherever the shards are. A table is built once
a run; the reader's processes look a batch up in it, a step ahead of the device.

Shapes: T distinct diagnosis texts of the data set, M nodes that they name; N images, K slots, B images of a rank,
G distinct diagnosis texts of a global batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path

from data_prep.schema import ASPECT_CODE, Aspect
from pretrain.data.batch import DiagnosisDistances
from pretrain.data.manifest import ShardedDataset
from pretrain.data.texts import TextPlan

_DIAGNOSIS = ASPECT_CODE[Aspect.DIAGNOSIS]


@dataclass(frozen=True)
class DiagnosisTable:
    """Which node of the hierarchy each diagnosis text names, and the distances of all those nodes."""

    hash_T: NDArray[np.uint64]  # ascending
    node_T: NDArray[np.int64]  # into the M nodes; -1 where the diagnosis has no path
    #: (M + 1, M + 1) float32, edges between two nodes; the last row and column, which -1 finds, hold inf
    distance_MM: NDArray[np.float32]

    def node_of(self, text_hash: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The node of each text; -1 where it has none or the table does not know it."""
        if len(self.hash_T) == 0:
            return np.full(text_hash.shape, -1, dtype=np.int64)
        position = np.searchsorted(self.hash_T, text_hash).clip(max=len(self.hash_T) - 1)
        return np.where(self.hash_T[position] == text_hash, self.node_T[position], -1)


def build_diagnosis_table(data: ShardedDataset) -> DiagnosisTable:
    """Reads one sample of each distinct diagnosis text, the first that holds it; damaged, its diagnosis has no path."""
    hash_T, sample_T = distinct_diagnoses(data.index)
    samples = [data.sound_sample(int(sample)) for sample in sample_T]
    paths = [() if sample is None else sample.diagnosis_path for sample in samples]
    names = {name: node for node, name in enumerate(dict.fromkeys(path[-1] for path in paths if path))}
    node_T = np.array([names[path[-1]] if path else -1 for path in paths], dtype=np.int64)
    return DiagnosisTable(hash_T, node_T, hierarchy_distances(list(names), paths))


def distinct_diagnoses(index: NDArray[np.void]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(hash_T ascending, sample_T): the diagnosis texts in rows of `INDEX_DTYPE`, and the first row of each."""
    row, slot = np.nonzero(index["text_aspect"] == _DIAGNOSIS)
    hash_T, first = np.unique(index["text_hash"][row, slot], return_index=True)
    return hash_T, row[first]


def hierarchy_distances(names: list[str], paths: Iterable[tuple[str, ...]]) -> NDArray[np.float32]:
    """(M + 1, M + 1) edges between the named nodes, in the undirected graph of all the paths; the last are inf.

    A path runs from general to specific; a virtual root stands above the first node of each. A node that two paths
    reach through different parents has an edge to both.
    """
    node_of = {name: node for node, name in enumerate(names)}
    edges = set()
    for path in paths:
        above = -1  # the root
        for name in path:
            node = node_of.setdefault(name, len(node_of))
            edges.add((above, node))
            above = node
    distance_MM = np.full((len(names) + 1, len(names) + 1), np.inf, dtype=np.float32)
    if edges:
        num_nodes = len(node_of) + 1
        start, end = (np.array(list(edges), dtype=np.int64) % num_nodes).T  # the root is the last node
        graph = coo_array((np.ones(len(edges)), (start, end)), shape=(num_nodes, num_nodes)).tocsr()
        distance = shortest_path(graph, directed=False, unweighted=True, indices=np.arange(len(names)))
        distance_MM[:-1, :-1] = distance[:, : len(names)]
    return distance_MM


def diagnosis_distances(
    table: DiagnosisTable, plan: TextPlan, rows_N: NDArray[np.void], mine: slice
) -> DiagnosisDistances:
    """Of this rank's images (`mine`, a slice of the N) to the distinct diagnosis texts of the global batch.

    Args:
        rows_N: the global batch's rows of the index (`INDEX_DTYPE`), rank-major.
    """
    is_diagnosis_NK = rows_N["text_aspect"] == _DIAGNOSIS
    image, slot = np.arange(len(rows_N)), is_diagnosis_NK.argmax(1)
    own_N = table.node_of(rows_N["text_hash"][image, slot])
    node_N = np.where(is_diagnosis_NK.any(1), own_N, -1)
    text_G, first = np.unique(plan.text_NK[is_diagnosis_NK], return_index=True)
    node_G = table.node_of(rows_N["text_hash"][is_diagnosis_NK][first])
    return DiagnosisDistances(
        text_G=torch.from_numpy(text_G),
        distance_BG=torch.from_numpy(table.distance_MM[node_N[mine, None], node_G]),
    )
