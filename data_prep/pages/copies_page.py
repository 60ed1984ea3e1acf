"""Pairs of copies as images side by side, on one page that needs no other file: for the eye that checks the threshold.

It shows images of the data set, so it belongs where these may be seen.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined


@dataclass(frozen=True)
class CopyPair:
    """Two images taken for copies. Labels are sample keys or, in an evaluation set, `NAME #n`: never file names."""

    first_jpeg: bytes  # without metadata
    second_jpeg: bytes
    first_label: str
    second_label: str
    distance: int | None  # bits of the perceptual hash; None: equal pixels
    outcome: str  # what was done, for example "dropped from train"


def write_page(
    path: Path, pairs: Sequence[CopyPair], *, title: str, max_distance: int, counts: Mapping[str, int]
) -> None:
    """Write `pairs`, in the order given, as HTML (about 30 kB a pair at 224 px: give it a few hundred at most).

    `counts`: totals by name, of all pairs and not only those shown. The file is complete or not there.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = _data_uri
    page = environment.from_string(_PAGE).render(
        style=_STYLE, title=title, pairs=pairs, max_distance=max_distance, counts=counts
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


_STYLE = """
:root { color-scheme: light dark; --ink: #1d252c; --soft: #5a6772; --line: #d9e0e6; --paper: #ffffff;
  --panel: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaef; --soft: #9aa8b4; --line: #34404a; --paper: #12181d;
  --panel: #1a2229; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; font-weight: 650; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .85rem; margin: .9rem 0 0; max-width: 46rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .9rem 1.5rem;
  margin: .9rem 0 0; }
dt { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.2rem;
  margin-top: 1.5rem; }
.pair { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; overflow: hidden;
  break-inside: avoid; }
.images { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--line); }
figcaption { padding: .4rem .6rem 0; font-size: .8rem; overflow-wrap: anywhere; }
.pair p { margin: .2rem .6rem .6rem; font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; }
"""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ title }}</h1>
<dl>
{% for name, count in counts.items() %}
<div><dt>{{ name }}</dt><dd>{{ "{:,}".format(count) }}</dd></div>
{% endfor %}
</dl>
<p class="note">{{ pairs | length }} pairs are shown. Near copies have perceptual hashes at most {{ max_distance }} of
256 bits apart. Where pairs are not of one picture, lower <code>duplicates.max_distance</code>.</p>
<div class="pairs">
{% for pair in pairs %}
<article class="pair">
<div class="images">
{% for jpeg, label in ((pair.first_jpeg, pair.first_label), (pair.second_jpeg, pair.second_label)) %}
<figure><img src="{{ jpeg | data_uri }}" alt="{{ label }}" loading="lazy"><figcaption>{{ label }}</figcaption></figure>
{% endfor %}
</div>
<p>{% if pair.distance is none %}equal pixels{% else %}{{ pair.distance }} bits apart{% endif %}: {{ pair.outcome }}</p>
</article>
{% endfor %}
</div>
</body>
</html>
"""
