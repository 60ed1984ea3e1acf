"""What both ways of splitting a caption have in common, and the choice between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from data_prep.config import DecomposerConfig, RulesDecomposer
from data_prep.schema import Caption


@dataclass(frozen=True)
class Dropped:
    """A candidate sub-caption that was not kept."""

    text: str
    aspect: str
    reason: str


@dataclass(frozen=True)
class Decomposition:
    """At most `MAX_SUBCAPTIONS` sub-captions of one caption, no two alike, aspects in `SUBCAPTION_ASPECTS`."""

    subcaptions: tuple[Caption, ...]
    dropped: tuple[Dropped, ...]
    made_by: Literal["rules", "llm"]
    failure: str | None = None  # why the model's answer could not be used; then made by rules, or no sub-captions


class Decomposer(Protocol):
    """Built from the configuration in every worker process; `prepare` is called once, in the parent, before them."""

    @property
    def name(self) -> str:
        """Enters the manifest: `rules-1`, or `llm:<model>:<first 12 hex digits of the prompt's hash>`."""

    def prepare(self, captions: Iterable[str]) -> None:
        """Do what is slow or needs the network. Raises InputError when the model cannot be used."""

    def decompose(self, caption: str) -> Decomposition:
        """Split one caption. Deterministic after `prepare`; no network."""


def make_decomposer(config: DecomposerConfig, ledger_path: Path) -> Decomposer:
    """The decomposer that the configuration names.

    `ledger_path` is the SQLite file of the model's answers; rules do not touch it. openai is imported only for the LLM.
    """
    if isinstance(config, RulesDecomposer):
        from data_prep.captions.rules import RuleSplitter

        return RuleSplitter()
    from data_prep.captions.llm import LLMSplitter

    return LLMSplitter(config, ledger_path)
