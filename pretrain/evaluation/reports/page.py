"""What the HTML pages of evaluation share: one way to fill a template, one table of intervals, one form of text.

Class names, captions and model names come from data sets and from others, and are not trusted: Jinja2 escapes them,
charts are shown as images (where SVG cannot run script), and each page's own content security policy allows neither
script nor anything that is not in the page. Templates and the style sheet are in `pages/`.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import jinja2
from markupsafe import Markup, escape

from data_prep.files import write_atomically

MAX_TABLE_ROWS = 200  # of a table on a page
MAX_OPEN_ROWS = 25  # of a table that is not folded away
#: Said wherever a value has none.
NO_INTERVAL = (
    "A value has no interval where its images, or those of a group, are of one patient, and where the resamples leave "
    "it undefined or are all alike."
)
MAX_TEXT_LENGTH = 300  # characters of a caption or a setting on a page
#: What no name needs: control characters, which may not stand in SVG; those that turn the direction of the text around,
#: with the numbers beside it; halves of surrogate pairs.
_HARMFUL = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TEMPLATES_DIR = Path(__file__).parent / "pages"


class Interval(Protocol):
    """`statistics.Estimate` or `results.Metric`. NaN and None both mean undefined."""

    @property
    def value(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...
    @property
    def n(self) -> int: ...


@dataclass(frozen=True)
class TableRow:
    """`estimates`: one a column of the table, None = an empty cell."""

    name: str
    estimates: tuple[Interval | None, ...]
    chance: float | None = None  # what guessing gives
    is_share: bool = True  # within the table's scale: three decimals and a plot; otherwise one decimal and none
    mark: str = ""  # a word beside the name, such as "worst"
    is_few: bool = False  # too few images to judge by: greyed
    texts: tuple[str, ...] = ()  # one a text column of the table


@dataclass(frozen=True)
class Table:
    """Values with intervals, drawn beside their numbers."""

    label: str  # for screen readers
    first: str  # heading of the names
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    counted: str = "n"
    text_columns: tuple[str, ...] = ()  # after the values
    accented: int = 0  # the column whose n is shown, and whose interval has the accent
    scale: tuple[float, float] = (0.0, 1.0)
    reference: float | None = None  # a dotted line for all rows, such as 0 of differences
    is_signed: bool = False  # differences
    more_in: str = "evaluation.json"  # where rows are that the page leaves out
    stacks: bool = False  # too many columns for a phone: there a row is a block, and each cell names its column

    @property
    def shown(self) -> tuple[TableRow, ...]:
        return self.rows[:MAX_TABLE_ROWS]

    @property
    def is_long(self) -> bool:
        """Folded away until it is asked for."""
        return len(self.rows) > MAX_OPEN_ROWS

    @property
    def num_more(self) -> int:
        return len(self.rows) - len(self.shown)

    @property
    def has_chance(self) -> bool:
        return any(row.chance is not None for row in self.rows)

    @property
    def has_plot(self) -> bool:
        return any(row.is_share for row in self.rows)


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Fill a template of `pages/` and write it whole or not at all. Equal values give equal bytes."""
    page = _environment().get_template(template).render(**values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    return path


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES_DIR),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        finalize=lambda value: type(value)(harmless(value)) if isinstance(value, str) else value,
    )
    made.filters |= {
        "number": _number,
        "place": _place,
        "tick": "{:g}".format,
        "thousands": "{:,}".format,
        "breakable": _breakable,
        "short": shortened,
        "squeezed": squeezed,
        "jpeg": _jpeg_uri,
    }
    made.tests["finite"] = _is_finite
    return made


def harmless(text: str) -> str:
    """The text with a replacement character for each that would make a chart unreadable or turn the text around."""
    return _HARMFUL.sub("\ufffd", text)


def shortened(text: str, length: int = MAX_TEXT_LENGTH) -> str:
    """At most `length` characters; a cut is shown by an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def squeezed(text: str, length: int) -> str:
    """At most `length` characters of one line, cut in the middle: names of models often differ at their end alone."""
    text = " ".join(text.split())
    num_first = (length - 1) // 2
    return text if len(text) <= length else f"{text[:num_first]}…{text[len(text) - (length - 1 - num_first) :]}"


def lacks_interval(metric: Interval | None) -> bool:
    """A value that stands alone, of which a reader is told why."""
    return metric is not None and _is_finite(metric.value) and not _is_finite(metric.low)


def listed(names: Iterable[str]) -> str:
    """a, b and c."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None, decimals: int = 3, is_signed: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "undefined"
    return f"{value:+,.{decimals}f}" if is_signed else f"{value:,.{decimals}f}"


def _place(value: float, scale: tuple[float, float] = (0.0, 1.0)) -> str:
    """Percent of the way along the scale, within it."""
    low, high = scale
    share = (value - low) / (high - low)
    return f"{min(max(share, 0.0), 1.0) * 100:.1f}" if math.isfinite(share) else "0"


def _breakable(name: str) -> Markup:
    """Let a long metric name wrap after its underscores and before its @ on a narrow screen."""
    return escape(shortened(name)).replace("_", Markup("_<wbr>")).replace("@", Markup("<wbr>@"))


def _jpeg_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
