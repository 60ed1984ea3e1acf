"""What a published file must not say: paths of this machine, and with them the names of people and projects."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.errors import InputError

_PATH_KEYS = {"run_dir", "train_dir", "val_dir", "stage_dir"}
_TEXT_SUFFIXES = {".json", ".jsonl", ".yaml", ".md", ".txt", ".csv"}
_PREFIXES = ("local-dir:", "file:")


def without_paths(node: Any, key: str = "") -> Any:
    """A config, as plain dictionaries and lists, with every path cut to its last part and every stream's URL removed.

    Names of models and packages, and paths inside this repository, stay.
    """
    if isinstance(node, dict):
        return {name: without_paths(value, name) for name, value in node.items()}
    if isinstance(node, list):
        return [without_paths(value, key) for value in node]
    if not isinstance(node, str):
        return node
    if key == "url":  # a bucket, a host, a command
        return "removed"
    prefix = next((prefix for prefix in _PREFIXES if node.startswith(prefix)), "")
    rest = node.removeprefix(prefix)
    if prefix or key in _PATH_KEYS or rest.startswith(("/", "~", "../")):
        return prefix + PurePosixPath(rest).name
    return node


def check_private(files: Iterable[Path], known_paths: Iterable[Path]) -> None:
    """Reads the text files that will be sent. Raises InputError, with file and line, where one names a path of this
    machine or the publisher's home."""
    given = (*known_paths, Path.cwd())
    known = {path.resolve() for path in given} | {path.absolute() for path in given}  # a link's two names
    plain = {str(path) for path in known if len(path.parts) > 2} | {f"{Path.home()}/"} - {"//"}
    forbidden = sorted(plain | {json.dumps(path)[1:-1] for path in plain})
    for file in files:
        if file.suffix not in _TEXT_SUFFIXES:
            continue
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                found = next((path for path in forbidden if path in line), None)
                if found is not None:
                    raise InputError(
                        f"{file}: line {number} holds {found}, a path of this machine; remove it from what was given "
                        "to publish, or report it if dermvlp wrote it"
                    )
