"""Typed configuration from YAML plus `key.path=value` overrides, checked by pydantic; a misspelt key is an error.

Data preparation, pretraining and evaluation read theirs here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from data_prep.errors import InputError

Config = TypeVar("Config", bound=BaseModel)


def load_config(path: str | Path, overrides: list[str], model: type[Config]) -> Config:
    """Read YAML, apply `a.b=value` overrides (values are YAML too), expand `${VARIABLE}`, validate.

    Raises InputError naming the file and the key for anything that is wrong.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file; the ones that exist are under configs/") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a mapping of keys to values at the top level")
    return make_config(raw, overrides, model, path)


def make_config(raw: dict[str, Any], overrides: list[str], model: type[Config], path: Path) -> Config:
    """The same for keys and values that were not read from a file; `path` is what messages begin with."""
    for override in overrides:
        _apply_override(raw, override)
    try:
        return model.model_validate(_expand(raw, path))
    except ValidationError as error:
        raise InputError(_explain(path, error, model)) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r}: write it as key.path=value, for example optimizer.lr=1e-4")
    *parents, leaf = key.split(".")
    node: Any = raw
    for part in [*parents, leaf][:-1]:
        node = node[_list_index(part, node, override)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise InputError(f"override {override!r}: {part!r} is a single value and has no keys below it")
    try:
        parsed = yaml.safe_load(value) if value else None
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not valid YAML; check brackets and quotes") from None
    # YAML 1.1 reads 1e-4 as a string; people mean a number
    if isinstance(parsed, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", parsed):
        parsed = float(parsed)
    if isinstance(node, list):
        node[_list_index(leaf, node, override)] = parsed
    else:
        node[leaf] = parsed


def _list_index(part: str, node: list[Any], override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise InputError(f"override {override!r}: {part!r} must be a position below {len(node)}")
    return int(part)


def _expand(node: Any, path: Path) -> Any:
    """`${NAME}` in strings becomes the environment variable's value; an unset one is an error."""
    if isinstance(node, dict):
        return {key: _expand(value, path) for key, value in node.items()}
    if isinstance(node, list):
        return [_expand(value, path) for value in node]
    if not isinstance(node, str):
        return node

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise InputError(f"{path}: needs the environment variable {name}, which is not set (export {name}=...)")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", replace, node)


def _explain(path: Path, error: ValidationError, model: type[BaseModel]) -> str:
    lines = [f"{path}: {error.error_count()} problem(s) in the configuration ({model.__name__}):"]
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        hint = problem["msg"]
        if problem["type"] == "extra_forbidden":
            known = _keys_at(model, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=3)
            there = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            hint = f"no such key; {there}"
        lines.append(f"  {key}: {hint}")
    return "\n".join(lines)


def _keys_at(model: type[BaseModel], where: Sequence[int | str]) -> list[str]:
    """The keys that a configuration has at a place that pydantic names: keys, positions in lists, tags of a union."""
    found = {model}
    for part in where:
        below = {
            m for each in found if part in each.model_fields for m in _models_in(each.model_fields[part].annotation)
        }
        if below:
            found = below
        elif isinstance(part, str):  # a tag
            tagged = {each for each in found if part in [field.default for field in each.model_fields.values()]}
            found = tagged or found
    return sorted({key for each in found for key in each.model_fields})


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    """In Annotated, unions and containers too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in get_args(annotation) for model in _models_in(part)}


def dump_yaml(config: BaseModel) -> str:
    """The resolved configuration, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
