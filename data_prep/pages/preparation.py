"""The report of a preparation: one HTML page without scripts or other files, for a screen, a phone or paper.

`ReportFacts` holds plain counts, which the caller takes from manifests and plan; nothing is read from a shard here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from data_prep.files import write_atomically
from data_prep.labels.coverage import Coverage, describe_entry

Counts = Mapping[str, int]
BySplit = Mapping[str, Counts]  # split -> name -> samples

MAX_MEASURED_TEXTS = 4_000
_NUM_BINS = 14  # of a histogram, up to twice the context length; the last holds all beyond


@dataclass(frozen=True)
class TokenLengths:
    """Lengths of a sample of the texts of one kind, start and end tokens included."""

    num_texts: int  # there are
    num_by_length: Mapping[int, int]  # tokens -> texts, of those measured

    @property
    def num_measured(self) -> int:
        return sum(self.num_by_length.values())

    def num_over(self, context_length: int) -> int:
        return sum(num for length, num in self.num_by_length.items() if length > context_length)


@dataclass(frozen=True)
class ReportFacts:
    """What the page shows. Empty parts are left out."""

    title: str  # name of the dataset
    overview: Mapping[str, object] = field(default_factory=dict)  # name -> value, as they are to be read
    samples_by_split: Counts = field(default_factory=dict)
    samples_by_source: BySplit = field(default_factory=dict)
    samples_by_licence: BySplit = field(default_factory=dict)
    samples_by_level: BySplit = field(default_factory=dict)  # level of the diagnosis in the ontology; "0" = none
    samples_by_diagnosis: BySplit = field(default_factory=dict)
    captions_by_aspect: BySplit = field(default_factory=dict)
    captions_by_origin: BySplit = field(default_factory=dict)
    token_lengths: Mapping[str, TokenLengths] = field(default_factory=dict)  # kind of text -> lengths
    tokenizer: str = ""
    context_length: int = 77
    rejected_by_reason: Counts = field(default_factory=dict)
    duplicates: Counts = field(default_factory=dict)
    duplicates_page: str | None = None  # relative link to the pairs as images
    diagnoses: Coverage | None = None
    concepts: Coverage | None = None
    notes: Counts = field(default_factory=dict)
    warnings: Sequence[str] = ()


def write_report(out_dir: Path, facts: ReportFacts) -> Path:
    """Writes `OUT_DIR/report.html`, whole or not at all, and returns its path."""
    page = environment().from_string(_PAGE)
    path = out_dir / "report.html"
    write_atomically(path, page.render(facts=facts, style=STYLE, **_derived(facts)).encode())
    return path


def token_lengths(
    texts: Iterable[tuple[str, str]], count: Callable[[str], int], max_texts: int = MAX_MEASURED_TEXTS
) -> dict[str, TokenLengths]:
    """Lengths by kind of (kind, text), of a uniform sample of at most `max_texts` texts of all kinds together.

    The same texts in the same order give the same sample (reservoir sampling, Vitter's algorithm R).
    """
    rng, chosen, total = random.Random(0), list[tuple[str, str]](), Counter[str]()
    for position, (kind, text) in enumerate(texts):
        total[kind] += 1
        if position < max_texts:
            chosen.append((kind, text))
        elif (place := rng.randrange(position + 1)) < max_texts:
            chosen[place] = (kind, text)
    lengths: dict[str, Counter[int]] = {kind: Counter() for kind in total}
    for kind, text in chosen:
        lengths[kind][count(text)] += 1
    return {kind: TokenLengths(num, dict(sorted(lengths[kind].items()))) for kind, num in total.items()}


# ---------------------------------------------------------------------------------------------- what the template needs


@dataclass(frozen=True)
class _Bin:
    label: str
    num: int
    height: float  # percent of the highest
    is_over: bool


def histogram(lengths: TokenLengths, context_length: int) -> list[_Bin]:
    """Bins of equal width, of which one ends at the context length; the last one holds what is longer still."""
    width = -(-context_length // (_NUM_BINS // 2))
    first = context_length % width or width  # the first may be narrower
    counts = [0] * _NUM_BINS
    for length, num in lengths.num_by_length.items():
        counts[min(max(0, -(-(length - first) // width)), _NUM_BINS - 1)] += num
    highest = max(1, *counts)
    bins = []
    for number, num in enumerate(counts):
        last = first + number * width
        label = f"{max(1, last - width + 1)} to {last}" if number < _NUM_BINS - 1 else f"{last - width + 1} and more"
        bins.append(_Bin(label, num, 100 * num / highest, last > context_length))
    return bins


def _table(by_split: BySplit, num_listed: int = 25, commonest_first: bool = True) -> dict[str, Any] | None:
    """Rows (name, counts by split, all, percent of the largest), by number or by name; None where all is empty."""
    total: Counter[str] = Counter()
    for counts in by_split.values():
        total.update(counts)
    if not total:
        return None
    largest = max(total.values())
    rows = [
        (name, [counts.get(name, 0) for counts in by_split.values()], num, 100 * num / max(1, largest))
        for name, num in sorted(total.items(), key=lambda item: (-item[1] * commonest_first, item[0]))
    ]
    return {
        "splits": list(by_split) if len(by_split) > 1 else [],
        "rows": rows[:num_listed],
        "sum": total.total(),
        "num_more": max(0, len(rows) - num_listed),
        "sum_more": sum(row[2] for row in rows[num_listed:]),
    }


def _derived(facts: ReportFacts) -> dict[str, Any]:
    levels = {
        split: {f"level {level}" if level != "0" else "no path": num for level, num in counts.items()}
        for split, counts in facts.samples_by_level.items()
    }
    tables = [
        ("Splits", "", _table({"": facts.samples_by_split})),
        ("Sources", "", _table(facts.samples_by_source)),
        ("Licences", "A shard's own licences are in manifest.json.", _table(facts.samples_by_licence)),
        (
            "Diagnosis levels",
            "How far down the ontology the diagnosis path of a sample leads.",
            _table(levels, commonest_first=False),
        ),
        ("Diagnoses", "As the source names them.", _table(facts.samples_by_diagnosis)),
        ("Captions by aspect", "", _table(facts.captions_by_aspect)),
        ("Captions by origin", "What wrote them.", _table(facts.captions_by_origin)),
    ]
    after = [
        ("Rejected rows", "Each with its reason in rejected.csv.", _table({"": facts.rejected_by_reason})),
        ("Notes", "What was dropped or not found on the way; no row was lost by it.", _table({"": facts.notes})),
    ]
    coverages = [
        (title, coverage, _table({"": {how: n for how, n in coverage["rows"].items() if how != "all"}}))
        for title, coverage in (("Ontology", facts.diagnoses), ("Visual concepts", facts.concepts))
        if coverage is not None
    ]
    return {"tables": tables, "after": after, "coverages": coverages, "histogram": histogram}


@cache
def environment() -> jinja2.Environment:
    """Escapes everything that is put into a page: labels and captions are other people's text."""
    made = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, auto_reload=False
    )
    made.filters["thousands"] = lambda value: f"{value:,}" if isinstance(value, int) else value
    made.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    made.globals["describe_entry"] = describe_entry
    made.globals["first"] = lambda items, num: list(items)[:num]
    return made


# ---------------------------------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --ink: #1d252c; --soft: #5a6772; --line: #d9e0e6; --paper: #fff; --panel: #f5f7f9;
  --accent: #0b6e8f; --over: #b3541e; --notice: #fdf3dc; --notice-ink: #6b4a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaef; --soft: #9aa8b4; --line: #34404a; --paper: #12181d;
  --panel: #1a2229; --accent: #5cc3e4; --over: #e8935c; --notice: #352a10; --notice-ink: #f0cf87; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .25rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .85rem; margin: .4rem 0 .8rem; max-width: 46rem; }
.notice { background: var(--notice); color: var(--notice-ink); padding: .6rem .9rem; border-radius: 4px;
  margin: .5rem 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: baseline; }
thead th { color: var(--soft); font-weight: 500; font-size: .8rem; white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: anywhere; }
.n { text-align: right; white-space: nowrap; }
.bar { width: 34%; padding-right: 0; }
.bar i { display: block; height: .6rem; min-width: 1px; background: var(--accent); border-radius: 2px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .9rem 1.5rem;
  margin: .9rem 0 0; }
dt { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: .82rem; }
svg { width: 100%; height: 8rem; display: block; border-bottom: 1px solid var(--line); }
svg rect { fill: var(--accent); } svg rect.over { fill: var(--over); }
.axis { position: relative; height: 1.4rem; color: var(--soft); font-size: .78rem; }
.axis span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis span:first-child { transform: none; }
.axis span:last-child { transform: translateX(-100%); }
.over-text { color: var(--over); font-weight: 600; }
ul { padding-left: 1.2rem; margin: .3rem 0; font-size: .9rem; }
li { margin: .2rem 0; overflow-wrap: anywhere; }
a { color: var(--accent); }
@media (max-width: 32rem) { th, td { padding-right: .6rem; } .bar { width: 22%; } }
@media print { figure, tr { break-inside: avoid; } }
"""

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
"""

_PAGE = (
    """{%- macro counts(title, note, table) -%}
{% if table %}
{% if title %}<h2>{{ title }}</h2>{% endif %}
{% if note %}<p class="note">{{ note }}</p>{% endif %}
<table>
{% if table.splits %}
<thead><tr><th></th>{% for split in table.splits %}<th class="n">{{ split }}</th>{% endfor %}<th class="n">all</th>
<th></th></tr></thead>
{% endif %}
<tbody>
{% for name, nums, num, percent in table.rows %}
<tr><th>{{ name }}</th>{% if table.splits %}{% for each in nums %}<td class="n">{{ each | thousands }}</td>{% endfor %}
{% endif %}<td class="n">{{ num | thousands }}</td>
<td class="bar" title="{{ (num / table.sum) | percent }}"><i style="width: {{ "%.1f" | format(percent) }}%"></i></td>
</tr>
{% endfor %}
</tbody></table>
{% if table.num_more %}
<p class="note">{{ table.num_more | thousands }} more, together {{ table.sum_more | thousands }}.</p>
{% endif %}
{% endif %}
{%- endmacro -%}
{% set title = "Data preparation: " ~ facts.title %}
"""
    + HEAD
    + """<body>
<h1>{{ title }}</h1>
{% for warning in facts.warnings %}<p class="notice">{{ warning }}</p>{% endfor %}
{% if facts.overview %}
<dl>{% for name, value in facts.overview.items() %}<div><dt>{{ name }}</dt><dd>{{ value | thousands }}</dd></div>
{% endfor %}</dl>
{% endif %}
{% for name, note, table in tables %}{{ counts(name, note, table) }}{% endfor %}
{% if facts.token_lengths %}
<h2>Tokens</h2>
<p class="note">Texts by their length in tokens of {{ facts.tokenizer or "the tokenizer" }}, start and end tokens
included. The context holds {{ facts.context_length }}; of longer texts the rest is cut off in training.</p>
<div class="charts">
{% for kind, lengths in facts.token_lengths.items() %}
{% set bins = histogram(lengths, facts.context_length) %}
{% set over = lengths.num_over(facts.context_length) %}
<figure><h3>{{ kind }}</h3>
<svg viewBox="0 0 {{ bins | length * 10 }} 100" preserveAspectRatio="none" role="img" aria-label="histogram of tokens">
{% for bin in bins %}
<rect x="{{ loop.index0 * 10 + 0.5 }}" y="{{ "%.2f" | format(100 - bin.height) }}" width="9"
 height="{{ "%.2f" | format(bin.height) }}"{% if bin.is_over %} class="over"{% endif %}>
<title>{{ bin.label }} tokens: {{ bin.num | thousands }}</title></rect>
{% endfor %}
</svg>
<div class="axis"><span>1</span>
<span style="left: {{ 100 * (bins | rejectattr("is_over") | list | length) / (bins | length) }}%">
{{- facts.context_length }}</span>
<span style="left: 100%">{{ bins[-1].label }}</span></div>
<figcaption>
<span{% if over %} class="over-text"{% endif %}>{{ (over / (lengths.num_measured or 1)) | percent }} longer than the
context</span>; {{ lengths.num_measured | thousands }} of {{ lengths.num_texts | thousands }} texts measured
</figcaption></figure>
{% endfor %}
</div>
{% endif %}
{{ counts(*after[0]) }}
{% if facts.duplicates %}
<h2>Duplicates and leakage</h2>
<dl>{% for name, num in facts.duplicates.items() %}<div><dt>{{ name }}</dt><dd>{{ num | thousands }}</dd></div>
{% endfor %}</dl>
{% if facts.duplicates_page %}
<p class="note"><a href="{{ facts.duplicates_page }}">The pairs, as images side by side</a></p>
{% endif %}
{% endif %}
{% for name, coverage, table in coverages %}
<h2>{{ name }}</h2>
<p class="note">{{ coverage.labels.all | thousands }} distinct labels, {{ coverage.rows.all | thousands }} times in the
rows of the source, by how they were matched.</p>
{{ counts("", "", table) }}
{% if coverage.get("levels") %}
<p class="note">Rows by level of the node:
{% for level, num in coverage.levels.items() %}{{ level }}: {{ num | thousands }}{{ ", " if not loop.last }}
{%- endfor %}</p>
{% endif %}
{% for how in ("fuzzy", "ambiguous", "unmatched") %}{% if coverage[how] %}
<h3>{{ how | capitalize }}</h3>
<ul>{% for label, entry in first(coverage[how].items(), 15) %}
<li><b>{{ label }}</b> {{ describe_entry(how, entry) }}</li>
{% endfor %}</ul>
{% if coverage[how] | length > 15 %}<p class="note">{{ (coverage[how] | length - 15) | thousands }} more.</p>{% endif %}
{% endif %}{% endfor %}
{% endfor %}
{{ counts(*after[1]) }}
</body>
</html>
"""
)
