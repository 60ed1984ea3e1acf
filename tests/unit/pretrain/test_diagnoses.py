"""Distances of diagnoses: from the samples' own paths, against a walk through the hierarchy."""

from __future__ import annotations

import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.schema import ASPECT_CODE, INDEX_DTYPE, NO_ASPECT_CODE, Aspect, text_hash
from pretrain.data.diagnoses import (
    DiagnosisTable,
    build_diagnosis_table,
    diagnosis_distances,
    distinct_diagnoses,
    hierarchy_distances,
)
from pretrain.data.manifest import ShardedDataset
from pretrain.data.texts import plan_texts
from tests.reference.cases import CAPTIONS, PATHS, diagnosis_table, index_rows
from tests.reference.loops import SoftTargets


def test_edges_between_nodes_with_two_parents_and_across_the_root() -> None:
    paths = [("a", "b", "d", "x"), ("a", "c", "d"), ("e",), ("a", "c", "f")]
    distance = hierarchy_distances(["x", "d", "e", "f", "a"], paths)
    assert distance.dtype == np.float32
    assert distance[:-1, :-1].tolist() == [
        [0, 1, 5, 3, 3],  # x: over d, and either parent
        [1, 0, 4, 2, 2],
        [5, 4, 0, 4, 2],  # e and a stand under the root
        [3, 2, 4, 0, 2],
        [3, 2, 2, 2, 0],
    ]
    assert np.isinf(distance[-1]).all() and np.isinf(distance[:, -1]).all()


def test_no_path_at_all_leaves_every_text_unknown() -> None:
    assert hierarchy_distances([], [(), ()]).tolist() == [[np.inf]]


@pytest.mark.parametrize("seed", range(5))
def test_random_hierarchies_equal_a_walk(seed: int) -> None:
    draw = random.Random(seed)
    paths = {f"text {n}": tuple(draw.sample("abcdefghij", draw.randint(1, 5))) for n in range(12)}
    walk = SoftTargets(alpha=1, temperature=1, paths=paths)
    names = list(dict.fromkeys(path[-1] for path in paths.values()))
    distance = hierarchy_distances(names, paths.values())
    for first, path in paths.items():
        for second, other in paths.items():
            assert distance[names.index(path[-1]), names.index(other[-1])] == walk.distance(first, second)


def test_the_table_of_a_prepared_split_says_what_its_samples_say(prepared_dir: Path) -> None:
    data = ShardedDataset(prepared_dir / "train")
    table = build_diagnosis_table(data)
    paths: dict[str, tuple[str, ...]] = {}
    for position in range(len(data)):
        sample = data.read_sample(position)
        for caption in sample.captions:
            if caption.aspect is Aspect.DIAGNOSIS:
                paths.setdefault(caption.text, sample.diagnosis_path)
    assert len(paths) > 2 and sorted(map(text_hash, paths)) == table.hash_T.tolist()
    walk = SoftTargets(alpha=1, temperature=1, paths=paths)
    node = {text: table.node_of(np.array([text_hash(text)], dtype=np.uint64))[0] for text in paths}
    for first in paths:
        for second in paths:
            known = bool(paths[first]) and bool(paths[second])
            expected = walk.distance(first, second) if known else np.inf
            assert table.distance_MM[node[first], node[second]] == expected


def test_a_batch_gets_its_rows_of_the_table() -> None:
    rows = index_rows(CAPTIONS)
    plan = plan_texts(rows["text_hash"], rows["text_aspect"], 2)
    table: DiagnosisTable = pickle.loads(pickle.dumps(diagnosis_table()))  # as a reader's process gets it
    walk = SoftTargets(alpha=1, temperature=1, paths=PATHS)
    diagnosis = [dict(reversed(image)).get("diagnosis") for image in CAPTIONS]
    text_of = {int(plan.text_NK[i, k]): text for i, image in enumerate(CAPTIONS) for k, (_, text) in enumerate(image)}
    for mine in (slice(0, 4), slice(4, 8)):
        batch = diagnosis_distances(table, plan, rows, mine)
        assert sorted(text_of[u] for u in batch.text_G.tolist()) == sorted(set(diagnosis) - {None})
        assert batch.distance_BG.dtype == torch.float32
        for own, distance_G in zip(diagnosis[mine], batch.distance_BG.tolist(), strict=True):
            for text, distance in zip((text_of[u] for u in batch.text_G.tolist()), distance_G, strict=True):
                known = own is not None and bool(PATHS[own]) and bool(PATHS[text])
                assert distance == (walk.distance(own, text) if own is not None and known else np.inf)


def test_a_batch_without_a_diagnosis_and_a_text_that_the_table_does_not_know() -> None:
    for captions, distances in (([[("caption", "a")]], [[]]), ([[("diagnosis", "never seen")]], [[np.inf]])):
        rows = index_rows(captions)
        plan = plan_texts(rows["text_hash"], rows["text_aspect"], 1)
        for table in (diagnosis_table(), diagnosis_table({})):
            batch = diagnosis_distances(table, plan, rows, slice(0, 1))
            assert batch.text_G.dtype == torch.int64 and batch.text_G.tolist() == [0] * len(distances[0])
            assert batch.distance_BG.dtype == torch.float32 and batch.distance_BG.tolist() == distances


def test_a_million_rows_take_seconds() -> None:
    """Measured: 0.1 s; the limit leaves room for a busy machine, not for a loop over rows."""
    random_rows = np.random.default_rng(0)
    index = np.zeros(1_000_000, dtype=INDEX_DTYPE)
    index["text_aspect"] = NO_ASPECT_CODE
    index["text_aspect"][::2, 1] = ASPECT_CODE[Aspect.DIAGNOSIS]
    index["text_hash"][:, 1] = random_rows.integers(0, 400, len(index)) * 7
    start = time.perf_counter()
    hashes, samples = distinct_diagnoses(index)
    assert time.perf_counter() - start < 3
    assert hashes.tolist() == [7 * n for n in range(400)]
    first = {int(index["text_hash"][row, 1]): row for row in range(20_000, -1, -2)}
    assert samples.tolist() == [first[int(h)] for h in hashes]
