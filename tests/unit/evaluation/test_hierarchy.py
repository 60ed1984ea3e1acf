"""Hierarchical scores against brute force, over a small graph, Derm1M's ontology and Fitzpatrick17k's tree."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.labels.ontology import Ontology
from pretrain.evaluation.config import HierarchyTask, ZeroShotTask
from pretrain.evaluation.methods.hierarchy import (
    Hierarchy,
    commonest_paths,
    hierarchy_of_paths,
    hierarchy_scores,
    levels_that_add_nothing,
    load_hierarchy,
    nodes_with_several_parents,
)
from pretrain.evaluation.tasks import hierarchy as task
from pretrain.evaluation.tasks import zero_shot
from tests.unit.evaluation.open_clip_set import CLASSNAMES, make_input, make_rows

needs_data = pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is unset: no real hierarchies")
DATA = Path(os.environ.get("DERMVLP_DATA", ""))

#: d has two parents, of two branches; e lies below it
GRAPH = {
    "root": ["tumour", "inflammation"],
    "tumour": ["benign", "malignant"],
    "benign": ["melanocytic", "keratosis"],
    "malignant": ["melanocytic", "carcinoma"],
    "melanocytic": ["nevus", "melanoma"],
    "inflammation": ["eczema"],
    "keratosis": [],
    "carcinoma": [],
    "nevus": [],
    "melanoma": [],
    "eczema": [],
}
TREE = {
    "benign": {"benign dermal": {"keloid": 3, "milia": 5}, "benign melanocyte": {"nevus": 2}},
    "malignant": {"malignant melanoma": {"malignant melanoma": 4, "lentigo maligna": 1}},
    "non-neoplastic": {"inflammatory": {"psoriasis": 9, "tinea": 2}},
}


@pytest.fixture
def graph(tmp_path: Path) -> Hierarchy:
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    return load_hierarchy(tmp_path / "graph.json")


@pytest.fixture
def tree(tmp_path: Path) -> Hierarchy:
    (tmp_path / "tree.json").write_text(json.dumps(TREE))
    return load_hierarchy(tmp_path / "tree.json")


class BruteForce:
    """By writing down every way from a node to the root."""

    def __init__(self, children: Mapping[str, list[str]]) -> None:
        self._parents = {node: [name for name, below in children.items() if node in below] for node in children}
        self._ways = {node: self._all_ways_up(node) for node in children}

    def _all_ways_up(self, node: str) -> list[list[str]]:
        return [[node, *way] for parent in self._parents[node] for way in self._all_ways_up(parent)] or [[node]]

    def distance(self, one: str, other: str) -> int:
        return min(
            mine.index(node) + theirs.index(node)
            for mine, theirs in product(self._ways[one], self._ways[other])
            for node in mine
            if node in theirs
        )

    def ancestors(self, node: str, level: int) -> set[str]:
        """Those at `level` on any way; a node's level is the length of its shortest way."""
        found = {name for way in self._ways[node] for name in way}
        return {name for name in found if min(map(len, self._ways[name])) - 1 == level}

    def check(self, hierarchy: Hierarchy, nodes: list[str]) -> None:
        scores = hierarchy_scores(hierarchy, nodes)
        for (i, true), (j, predicted) in product(enumerate(nodes), repeat=2):
            assert scores.distance_CC[i, j] == self.distance(true, predicted), (true, predicted)
            for number in range(scores.num_levels):
                expected = self.ancestors(true, number + 1)
                is_right = expected == self.ancestors(predicted, number + 1)
                found = scores.right_LCC[number, i, j]
                assert np.isnan(found) if not expected else found == is_right, (number + 1, true, predicted)


def test_graph_with_two_parents(graph: Hierarchy) -> None:
    nodes = [name for name in GRAPH if name != "root"]
    BruteForce(GRAPH).check(graph, nodes)
    scores = hierarchy_scores(graph, ["melanoma", "nevus", "carcinoma", "keratosis", "eczema"])
    assert scores.distance_CC[0].tolist() == [0, 2, 3, 3, 6]  # carcinoma shares "malignant", keratosis "benign"
    # level 2 of a melanoma is benign and malignant: a carcinoma agrees with one of them, which does not do
    assert scores.right_LCC[:, 0].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    # a carcinoma has no level 4
    assert np.isnan(scores.right_LCC[3, 2]).all() and scores.right_LCC[2, 2].tolist() == [0, 0, 1, 0, 0]


def test_levels_that_tell_no_more_classes_apart(graph: Hierarchy) -> None:
    def found(*nodes: str) -> tuple[int, ...]:
        return levels_that_add_nothing(hierarchy_scores(graph, nodes))

    # level 2 of both is benign and malignant, level 3 the node below these; the root is no level
    assert found("melanoma", "nevus", "eczema") == (2, 3)
    assert found("melanoma", "nevus") == (1, 2, 3)
    # a keratosis is told from a carcinoma at level 2; both end before level 4, where melanoma is told from nevus
    assert found("melanoma", "nevus", "carcinoma", "keratosis", "eczema") == (3,)
    # level 3 is scored for the carcinoma alone, and it was told apart before
    assert found("carcinoma", "eczema") == (2, 3)


def test_nodes_with_several_parents_are_found_above_the_classes(graph: Hierarchy, tree: Hierarchy) -> None:
    assert nodes_with_several_parents(graph, ["melanoma", "eczema"]) == {"melanocytic": ("benign", "malignant")}
    assert nodes_with_several_parents(graph, ["melanocytic"]) == {"melanocytic": ("benign", "malignant")}
    assert nodes_with_several_parents(graph, ["carcinoma", "eczema"]) == {}
    assert nodes_with_several_parents(tree, tree.parents) == {}


def test_tree_of_nested_groups(tree: Hierarchy) -> None:
    names = ["keloid", "milia", "nevus", "malignant melanoma", "lentigo maligna", "psoriasis"]
    nodes = [str(tree.find(name)) for name in names]
    assert len(set(nodes)) == 6
    scores = hierarchy_scores(tree, nodes)
    assert scores.num_levels == 3
    assert scores.distance_CC[0].tolist() == [0, 2, 4, 6, 6, 6]
    assert scores.distance_CC[3].tolist() == [6, 6, 6, 0, 2, 6]  # the label of that name, not the group above it
    assert scores.right_LCC[0, 0].tolist() == [1, 1, 1, 0, 0, 0]
    assert scores.right_LCC[1, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert scores.right_LCC[2, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert tree.find("Keloids") == tree.find("keloid") and tree.find("scabies") is None
    assert tree.find("inflammatory") is not None  # a group, where no label has the name


@needs_data
def test_published_ontology_equals_brute_force() -> None:
    path = DATA / "derm1m-sample" / "ontology.json"
    children = json.loads(path.read_text())
    hierarchy, ontology = load_hierarchy(path), Ontology.load(path)
    two_parents = [node for node, parents in hierarchy.parents.items() if len(parents) > 1]
    assert len(hierarchy.parents) == len(children) - 1 and two_parents
    nodes = [*two_parents, *np.random.default_rng(0).choice(sorted(hierarchy.parents), 25, replace=False).tolist()]
    BruteForce(children).check(hierarchy, nodes)
    assert hierarchy.find("nail disease") == "Nail diseases, nail disease" == ontology.match("nail disease")
    assert hierarchy_scores(hierarchy, sorted(hierarchy.parents)).num_levels == 5


@needs_data
def test_published_tree_has_three_levels() -> None:
    path = DATA / "text" / "fitzpatrick17k_hierarchy.json"
    raw = json.loads(path.read_text())
    labels = [(top, group, label) for top, groups in raw.items() for group, below in groups.items() for label in below]
    hierarchy = load_hierarchy(path)
    nodes = [str(hierarchy.find(label)) for _, _, label in labels]
    assert len(set(nodes)) == len(labels) == 114
    scores = hierarchy_scores(hierarchy, nodes)
    for level in range(3):
        same = [[mine[: level + 1] == theirs[: level + 1] for theirs in labels] for mine in labels]
        assert np.array_equal(scores.right_LCC[level], np.array(same, dtype=float))
    num_shared = sum(scores.right_LCC)
    assert np.array_equal(scores.distance_CC, 6 - 2 * num_shared)


def test_paths_of_rows() -> None:
    labels = ["nevus", "nevus", "nevus", "melanoma", None, "keloid"]
    paths = [("tumour", "nevus"), ("tumour", "melanocytic", "nevus"), ("tumour", "nevus"), ("tumour", "melanoma")]
    found = commonest_paths(labels, [*paths, ("x",), ()])
    assert found == {"nevus": ("tumour", "nevus"), "melanoma": ("tumour", "melanoma")}
    # one name at two places is two nodes, and no cycle
    hierarchy = hierarchy_of_paths([("a", "b"), ("b", "a"), ("a", "c")])
    assert len(hierarchy.parents) == 5 and hierarchy.find("c") is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected {node"),
        ('{"a": {"b": "text"}}', "'b': expected a group"),
        ('{"a": {}}', "'a': expected a group"),
        ('{"root": ["a"]}', "'a', a child of 'root', is not defined"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "h.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_hierarchy(tmp_path / "h.json")
    with pytest.raises(InputError, match="cannot read the hierarchy"):
        load_hierarchy(tmp_path / "missing.json")


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_task_scores_the_zero_shot_prediction(tmp_path: Path) -> None:
    known = ("nevus", "melanoma", "carcinoma", "eczema")
    classnames = (*known, "scabies")
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    rows = make_rows(90, classnames)
    config = HierarchyTask(ontology=tmp_path / "graph.json")
    result = task.run(config, make_input(tmp_path / "all", rows, classnames))
    num_missing = sum(row.label == "scabies" for row in rows)
    assert result.notes == (
        f"Classes that the hierarchy does not have, left out with their {num_missing} images: scabies.",
        # a carcinoma is malignant, the others at level 3 are both: told apart at level 2 already
        "Levels that tell no two of the classes apart that the level above does not: right_at_level_3.",
        "Nodes with several parents: melanocytic (benign and malignant). All parents count: a prediction is right at a "
        "level where it has the very ancestors that the label has there, so two classes below such a node agree in its "
        "parents, whichever of them is meant.",
    )
    assert result.settings["num_classes"] == 4
    zero_shot.run(ZeroShotTask(), make_input(tmp_path / "known", rows, known))
    expected = [
        (row["label"], row["predicted"]) for row in read_table(tmp_path / "known" / "zero_shot_probabilities.csv")
    ]
    table = read_table(tmp_path / "all" / "hierarchy_predictions.csv")
    assert [(row["label"], row["predicted"]) for row in table] == expected
    brute = BruteForce(GRAPH)
    distances = [brute.distance(true, predicted) for true, predicted in expected]
    assert [int(row["tree_distance"]) for row in table] == distances
    metric = result.metrics["tree_distance"]
    assert metric.value == pytest.approx(np.mean(distances)) and metric.lower_is_better and not metric.is_share
    chance = np.mean([brute.distance(true, name) for true, _ in expected for name in known])
    assert metric.chance == pytest.approx(chance)
    level_3 = [
        brute.ancestors(true, 3) == brute.ancestors(predicted, 3)
        for true, predicted in expected
        if true != "eczema"  # which ends at level 2
    ]
    assert result.metrics["right_at_level_3"].value == pytest.approx(np.mean(level_3))
    assert result.metrics["right_at_level_3"].n == len(level_3) == sum(row["right_at_level_3"] != "" for row in table)
    assert result.primary == "tree_distance" and result.by_group[0].worst is not None


def test_task_names_what_its_numbers_leave_out(tmp_path: Path) -> None:
    known = ("melanoma", "nevus", *(f"class {number}" for number in range(2, 7)))
    kinds = {f"kind {number}": [name] for number, name in enumerate(known)}
    ontology = {"root": ["tumour"], "tumour": ["benign", "malignant"], "benign": [*kinds], "malignant": [*kinds]}
    (tmp_path / "graph.json").write_text(json.dumps(ontology | kinds | {name: [] for name in known}))
    labels = ["nevus", "melanoma", "class 2", "scabies", "lupus", None, "no class at all"]
    rows = [replace(row, label=labels[i % 7], is_train=i >= 63) for i, row in enumerate(make_rows(70))]
    config = HierarchyTask(ontology=tmp_path / "graph.json")
    missing, train, others, empty, levels, several = task.run(
        config, make_input(tmp_path, rows, (*known, "scabies", "lupus"))
    ).notes
    # 9 of each label outside the training part
    assert missing == "Classes that the hierarchy does not have, left out with their 18 images: scabies, lupus."
    assert train.startswith("7 images of the data set's own training part")
    assert others == "18 images without a label, or with one that is no class here, are not scored."
    assert empty == "Classes that can be predicted, but have no image: class 3, class 4, class 5, class 6."
    assert levels == (
        "Levels that tell no two of the classes apart that the level above does not: right_at_level_1, "
        "right_at_level_2, right_at_level_4."
    )
    assert "kind 4 (benign and malignant); 2 more. All parents count" in several and "kind 5" not in several


@needs_data
def test_melanoma_and_nevus_agree_in_derm1m_to_level_3(tmp_path: Path) -> None:
    rows = make_rows(30, CLASSNAMES)
    config = HierarchyTask(ontology=DATA / "derm1m-sample" / "ontology.json")
    notes = task.run(config, make_input(tmp_path, rows, CLASSNAMES)).notes
    assert any("melanocytic (benign and malignant)" in note for note in notes)
    hierarchy = load_hierarchy(DATA / "derm1m-sample" / "ontology.json")
    nodes = [str(hierarchy.find(name)) for name in ("melanoma", "nevus", "actinic keratosis")]
    scores = hierarchy_scores(hierarchy, nodes)
    assert scores.right_LCC[:, 0, 1].tolist() == [1, 1, 1, 0] and levels_that_add_nothing(scores) == (2, 3)


def test_task_takes_the_paths_of_the_rows(tmp_path: Path) -> None:
    paths = {
        "melanoma": ("proliferations", "melanocytic", "melanoma"),
        "nevus": ("proliferations", "melanocytic", "melanocytic nevus"),
        "psoriasis": ("inflammatory", "psoriasis"),
    }
    rows = [replace(row, diagnosis_path=paths.get(str(row.label), ())) for row in make_rows(60)]
    overlap_N = np.arange(60) < 20
    given = make_input(tmp_path, rows, overlap_N=overlap_N)
    assert task.lacks(given.data) is None
    result = task.run(HierarchyTask(), given)
    assert result.settings["num_classes"] == 3 and result.settings["ontology"] == "diagnosis_path"
    assert "basal cell carcinoma, tinea corporis" in result.notes[0]
    table = read_table(tmp_path / "hierarchy_predictions.csv")
    assert {int(row["tree_distance"]) for row in table if row["label"] != "psoriasis"} <= {0, 2, 5}
    assert {int(row["tree_distance"]) for row in table if row["label"] == row["predicted"]} == {0}
    kept = [int(row["tree_distance"]) for row, key in ((r, int(r["key"])) for r in table) if not overlap_N[key]]
    assert result.without_overlap["tree_distance"].value == pytest.approx(np.mean(kept))


def test_sets_without_a_hierarchy(tmp_path: Path) -> None:
    given = make_input(tmp_path, make_rows(6))
    assert "diagnosis paths have 0 of its classes" in str(task.lacks(given.data))
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    config = HierarchyTask(ontology=tmp_path / "graph.json")
    assert task.lacks(given.data, config) is None  # melanoma and nevus are enough
    given = make_input(tmp_path, make_rows(6), (*CLASSNAMES, "scabies", "lupus"))
    for content, message in (
        ({"root": ["eczema"], "eczema": []}, r"graph.json has 0 of its classes"),
        ({"root": ["scabies", "lupus"], "scabies": [], "lupus": []}, "no image has a class of the hierarchy"),
    ):
        (tmp_path / "graph.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            task.run(config, given)
