"""Pairs of copies as images side by side, on one page that needs no other file: for the eye that checks the threshold.

It shows images of the data set, so it belongs where these may be seen.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.files import write_atomically
from data_prep.pages.preparation import HEAD, STYLE, environment


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
    page = environment().from_string(HEAD + _PAGE)
    shown = [(pair, _data_uri(pair.first_jpeg), _data_uri(pair.second_jpeg)) for pair in pairs]
    content = page.render(style=STYLE + _STYLE, title=title, pairs=shown, max_distance=max_distance, counts=counts)
    write_atomically(path, content.encode())


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


_STYLE = """
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

_PAGE = """<body>
<h1>{{ title }}</h1>
<dl>
{% for name, count in counts.items() %}
<div><dt>{{ name }}</dt><dd>{{ count | thousands }}</dd></div>
{% endfor %}
</dl>
<p class="note">{{ pairs | length }} pairs are shown. Near copies have perceptual hashes at most {{ max_distance }} of
256 bits apart. Where pairs are not of one picture, lower <code>duplicates.max_distance</code>.</p>
<div class="pairs">
{% for pair, first, second in pairs %}
<article class="pair">
<div class="images">
{% for uri, label in ((first, pair.first_label), (second, pair.second_label)) %}
<figure><img src="{{ uri }}" alt="{{ label }}" loading="lazy"><figcaption>{{ label }}</figcaption></figure>
{% endfor %}
</div>
<p>{% if pair.distance is none %}equal pixels{% else %}{{ pair.distance }} bits apart{% endif %}: {{ pair.outcome }}</p>
</article>
{% endfor %}
</div>
</body>
</html>
"""
