"""Captions into sub-captions by a language model behind any OpenAI-compatible server.

`LLMSplitter.prepare` asks (`asking.py`: what it does about failures), `decompose` reads the ledger and needs no
network, so worker processes build their own from the configuration. The pure half, prompt and check of the answer, is
in `answers.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.captions.answers import Unusable
from data_prep.captions.asking import AskSummary, ask
from data_prep.captions.decompose import Decomposition, Dropped, Fits, fits_in_bytes, keep_fitting
from data_prep.captions.ledger import Ledger
from data_prep.captions.rules import split
from data_prep.captions.subcaptions import MIN_WORDS, SubcaptionsTask, worth_asking
from data_prep.captions.tasks import request_key
from data_prep.config import LLMDecomposer
from data_prep.errors import InputError

_LOG = logging.getLogger(__name__)


class LLMSplitter:
    """The Decomposer that asks a language model. Build one in each process; opens the ledger when first used."""

    def __init__(self, config: LLMDecomposer, ledger_path: Path, fits: Fits = fits_in_bytes) -> None:
        self.task = SubcaptionsTask(config, fits)
        self._on_failure = config.on_failure
        self._fits = fits
        self._ledger_path = ledger_path
        self._ledger_opened: Ledger | None = None

    @property
    def name(self) -> str:
        return f"llm:{self.task.options.model}:{self.task.prompt_hash[:12]}"

    @property
    def ledger(self) -> Ledger:
        if self._ledger_opened is None:
            self._ledger_opened = Ledger(self._ledger_path)
        return self._ledger_opened

    def prepare(
        self,
        captions: Iterable[str],
        *,
        retry_failed: bool = False,
        limit: int | None = None,
        max_usd: float | None = None,
    ) -> AskSummary:
        """Ask about the captions of `MIN_WORDS` and more. Arguments, errors and result as `asking.ask`."""
        num_short = 0

        def long_enough() -> Iterator[str]:
            nonlocal num_short
            for caption in captions:
                if worth_asking(caption):
                    yield caption
                else:
                    num_short += 1

        summary = ask(self.task, long_enough(), self.ledger, retry_failed=retry_failed, limit=limit, max_usd=max_usd)
        if num_short:
            _LOG.info("%d captions of less than %d words are left to the rules, unasked", num_short, MIN_WORDS)
        return summary

    def decompose(self, caption: str) -> Decomposition:
        """From the ledger. Raises InputError for a caption that `prepare` was not given, or did not get to."""
        if not worth_asking(caption):
            return keep_fitting(split(caption), self._fits)
        answer = self.ledger.get(request_key(self.task, self.task.identity(caption)))
        if answer is None:
            raise InputError(
                f"{self._ledger_path}: holds no answer of {self.name} for a caption; run the preparation again, "
                "without limit or with more money"
            )
        failure, dropped = answer.failure or "no usable answer", tuple[Dropped, ...]()
        if answer.raw is not None and answer.status != "unanswered":
            parsed = self.task.parse(answer.raw, caption, answer.answered_on)
            if answer.status == "answered" and isinstance(parsed, Decomposition):
                return parsed
            dropped = parsed.dropped
            # an answer that was usable under earlier checks and is not under today's
            failure = parsed.reason if answer.status == "answered" and isinstance(parsed, Unusable) else failure
        if self._on_failure != "rules":
            return Decomposition((), dropped, made_by="llm", failure=failure)
        by_rules = keep_fitting(split(caption), self._fits)
        return replace(by_rules, dropped=dropped + by_rules.dropped, failure=failure)
