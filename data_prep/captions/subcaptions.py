"""The task of decomposition: which captions are asked about, with what words, and which answers can be used."""

from __future__ import annotations

from collections.abc import Mapping

from data_prep.captions.answers import ANSWER_SCHEMA, Unusable, format_prompt, parse_answer, read_prompt
from data_prep.captions.decompose import Decomposition, Fits, fits_in_bytes
from data_prep.captions.grounding import num_words
from data_prep.captions.tasks import Messages, hash_prompt
from data_prep.config import LLMDecomposer

#: A shorter caption is one statement ("Lichen planus."), in Derm1M nearly always the diagnosis alone: rules label it as
#: well, and a twentieth of the bill is saved.
MIN_WORDS = 4


def worth_asking(caption: str) -> bool:
    return num_words(caption) >= MIN_WORDS


class SubcaptionsTask:
    """A `Task[str]` whose items are captions; white space makes no difference between them."""

    name = "subcaptions"
    num_image_tokens = 0

    def __init__(self, options: LLMDecomposer, fits: Fits = fits_in_bytes) -> None:
        self.options = options
        self._fits = fits
        self._prompt = read_prompt(options.prompt)
        self.prompt_hash = hash_prompt(self._prompt, ANSWER_SCHEMA)
        self.schema: Mapping[str, object] = ANSWER_SCHEMA

    def identity(self, item: str) -> str:
        return " ".join(item.split())

    def messages(self, item: str) -> Messages:
        return format_prompt(self.identity(item), self._prompt)

    def why_unusable(self, raw: str, item: str) -> str | None:
        parsed = self.parse(raw, item, "")
        return parsed.reason if isinstance(parsed, Unusable) else None

    def parse(self, raw: str, item: str, answered_on: str) -> Decomposition | Unusable:
        """The answer's sub-captions with their origin. `answered_on`: the ISO date of the answer."""
        origin = f"llm:{self.options.model}:{self.prompt_hash[:12]}:{answered_on}"
        return parse_answer(raw, item, self._fits, origin)
