"""What the ways of splitting a caption have in common, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from data_prep.config import DecomposerConfig, NoDecomposer, RulesDecomposer
from data_prep.schema import Caption

#: Whether a text fits the context of the text tower to be trained: `data_prep.captions.tokens.TokenCounter.fits`.
Fits = Callable[[str], bool]

#: 77 tokens, CLIP's context, at four bytes a token
_MAX_BYTES = 300
TOO_LONG = "too long: does not fit the context"


def fits_in_bytes(text: str) -> bool:
    """An estimate of `Fits` for where there is no tokenizer."""
    return len(text.encode()) <= _MAX_BYTES


@dataclass(frozen=True)
class Dropped:
    """A candidate sub-caption that was not kept."""

    text: str
    aspect: str
    reason: str  # may name a word of the caption, after a colon

    @property
    def kind(self) -> str:
        """The reason without its particulars: what counts are kept by."""
        return self.reason.partition(":")[0]


@dataclass(frozen=True)
class Decomposition:
    """At most `MAX_SUBCAPTIONS` sub-captions of one caption, no two alike, aspects in `SUBCAPTION_ASPECTS`."""

    subcaptions: tuple[Caption, ...]
    dropped: tuple[Dropped, ...]
    made_by: Literal["rules", "llm", "none"]
    #: Why the model's answer could not be used. The caller lists it; with `on_failure: reject` it rejects the row.
    failure: str | None = None


def keep_fitting(decomposition: Decomposition, fits: Fits) -> Decomposition:
    """Sub-captions that do not fit the context, dropped with the reason."""
    too_long = tuple(sub for sub in decomposition.subcaptions if not fits(sub.text))
    if not too_long:
        return decomposition
    return replace(
        decomposition,
        subcaptions=tuple(sub for sub in decomposition.subcaptions if sub not in too_long),
        dropped=decomposition.dropped + tuple(Dropped(sub.text, sub.aspect, TOO_LONG) for sub in too_long),
    )


class Decomposer(Protocol):
    """Built from the configuration in every worker process. `LLMSplitter.prepare` must have asked before."""

    @property
    def name(self) -> str:
        """Enters the manifest: `none`, `rules-1`, or `llm:<model>:<first 12 hex digits of the prompt's hash>`."""

    def decompose(self, caption: str) -> Decomposition:
        """Split one caption. Deterministic; no network."""


class NoSplitter:
    """The Decomposer that leaves captions whole."""

    name = "none"

    def decompose(self, caption: str) -> Decomposition:
        return Decomposition((), (), made_by="none")


def make_decomposer(config: DecomposerConfig, ledger_path: Path, fits: Fits = fits_in_bytes) -> Decomposer:
    """The decomposer that the configuration names; every sub-caption it gives satisfies `fits`.

    `ledger_path` is the SQLite file of the model's answers; the others do not touch it. openai is imported only for
    the LLM.
    """
    if isinstance(config, NoDecomposer):
        return NoSplitter()
    if isinstance(config, RulesDecomposer):
        from data_prep.captions.rules import RuleSplitter

        return RuleSplitter(fits)
    from data_prep.captions.llm import LLMSplitter

    return LLMSplitter(config, ledger_path, fits)
