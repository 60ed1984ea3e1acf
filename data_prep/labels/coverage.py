"""How many rows the ontology and the list of concepts cover, and what they do not: figures to act on.

A coverage is a plain dict that goes into JSON as it is, made from counters of labels (those of several parts of a
source are added up before):

    {"rows": {how: rows}, "labels": {how: distinct labels}, "levels": {"1": rows, ...},
     "fuzzy": {label: {node, similarity, rows}}, "ambiguous": {label: {candidates, rows}}, "unmatched": {label: rows}}

"levels" is of diagnoses alone; "all" in "rows" and "labels" is the sum over every how.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, get_args

from data_prep.labels.concepts import Concepts
from data_prep.labels.names import How, Match
from data_prep.labels.ontology import Ontology

Coverage = dict[str, dict[str, Any]]
_HOWS: tuple[str, ...] = get_args(How)


def diagnosis_coverage(labels: Mapping[str, int], ontology: Ontology, min_similarity: float) -> Coverage:
    """`labels`: diagnosis as the source names it -> rows."""
    levels: Counter[str] = Counter()

    def find(label: str) -> Match:
        match = ontology.find(label, min_similarity)
        if match.node is not None:
            levels[str(ontology.level(match.node))] += labels[label]
        return match

    return _coverage(labels, find) | {"levels": dict(sorted(levels.items()))}


def concept_coverage(concepts: Mapping[str, int], terms: Concepts) -> Coverage:
    """`concepts`: visual concept as the source names it -> rows."""
    return _coverage(concepts, terms.look_up)


def _coverage(texts: Mapping[str, int], find: Callable[[str], Match]) -> Coverage:
    rows: Counter[str] = Counter({"all": 0})
    labels: Counter[str] = Counter({"all": 0})
    result: Coverage = {"fuzzy": {}, "ambiguous": {}, "unmatched": {}}
    for text, num_rows in sorted(texts.items(), key=lambda item: (-item[1], item[0])):
        match = find(text)
        rows.update({"all": num_rows, match.how: num_rows})
        labels.update(["all", match.how])
        if match.how == "fuzzy":
            result["fuzzy"][text] = {"node": match.node, "similarity": round(match.similarity, 4), "rows": num_rows}
        elif match.how == "ambiguous":
            result["ambiguous"][text] = {"candidates": list(match.candidates), "rows": num_rows}
        elif match.how == "unmatched":
            result["unmatched"][text] = num_rows
    return {"rows": dict(rows), "labels": dict(labels), **result}


def print_coverage(what: str, coverage: Coverage, num_listed: int = 10) -> None:
    """Shares by how, then the commonest texts that need a person: fuzzy, ambiguous and unmatched ones."""
    rows, labels = coverage["rows"], coverage["labels"]
    print(f"{what}: {labels['all']} distinct in {rows['all']} rows")
    for how in _HOWS:
        if how in rows:
            print(f"  {how:10} {rows[how]:9} rows ({rows[how] / max(1, rows['all']):6.1%}), {labels[how]} distinct")
    if levels := coverage.get("levels"):
        print("  rows by level of the node: " + ", ".join(f"{level}: {num}" for level, num in levels.items()))
    for how in ("fuzzy", "ambiguous", "unmatched"):
        for text, entry in list(coverage[how].items())[:num_listed]:
            print(f"  {how}: {text!r} {describe_entry(how, entry)}")
        if (num_more := len(coverage[how]) - num_listed) > 0:
            print(f"  {how}: {num_more} more")


def describe_entry(how: str, entry: Any) -> str:
    """One entry of the lists "fuzzy", "ambiguous" or "unmatched" in words."""
    if how == "fuzzy":
        return f"-> {entry['node']!r}, similarity {entry['similarity']:.3f}, {entry['rows']} rows"
    if how == "ambiguous":
        return f"may be {' or '.join(map(repr, entry['candidates']))}, {entry['rows']} rows"
    return f"{entry} rows"
