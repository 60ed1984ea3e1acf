"""Markdown of cards. What comes from data or a file is text there and never markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#!~])")


def plain(text: object) -> str:
    """Text of somebody else's: on one line, its markup escaped."""
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split()))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def count_table(name: str, counts: Mapping[str, int], what: str, most: int | None = None) -> str:
    """Counts by name, the largest first; beyond `most` rows one that sums up the rest."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown, rest = ordered[:most], ordered[most:] if most is not None else []
    rows = [(plain(key), f"{count:,}") for key, count in shown]
    if rest:
        rows.append((f"{len(rest)} more", f"{sum(count for _, count in rest):,}"))
    return table((name, what), rows)
