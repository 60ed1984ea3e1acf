"""Lists of prompt templates, by name: `configs/eval/templates.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import InputError

TEMPLATES_PATH = Path(__file__).parents[1] / "configs" / "eval" / "templates.json"
DEFAULT_TEMPLATES = "dermatology"


def load_templates(path: Path, name: str = DEFAULT_TEMPLATES) -> list[str]:
    """The list called `name` in a JSON file of template lists (`configs/eval/templates.json`).

    Raises InputError when the file or the list is missing or a template has not exactly one `{}`.
    """
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such template file; one that exists is configs/eval/templates.json") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(lists, dict) or name not in lists:
        known = ", ".join(lists) if isinstance(lists, dict) else "none"
        raise InputError(f"{path}: no template list named {name!r}; it holds: {known}")
    templates = lists[name]
    if not isinstance(templates, list) or not all(isinstance(template, str) for template in templates):
        raise InputError(f"{path}: {name}: expected a list of strings")
    try:
        check_templates(templates)
    except InputError as error:
        raise InputError(f"{path}: {name}: {error}") from None
    return templates


def check_templates(templates: Sequence[str]) -> None:
    """Raises InputError for none, and for one without exactly one `{}`."""
    if not templates:
        raise InputError("templates: expected at least one")
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"template {template!r}: write {{}} exactly once, where the class name goes")
