"""Strings to token ids, for the kinds of tokenizer that open_clip's text towers come with.

Whether texts may be trimmed to their own length depends on the tower: causal towers pooled at the end token and
towers with a padding mask give the same output; a tower that pools the last position does not (SigLIP).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CACHE_SIZE = 100_000  # distinct strings kept; diagnosis sentences come back in every batch


class TextTokenizer:
    """Wraps an open_clip tokenizer: `encode` returns ids without padding, and says whether the text was cut."""

    def __init__(self, tokenizer: Any, context_length: int, pad_id: int, can_trim: bool) -> None:
        self._tokenizer = tokenizer
        self.context_length = context_length
        self.pad_id = pad_id
        self.can_trim = can_trim
        self._encode_one = lru_cache(_CACHE_SIZE)(self._encode_uncached)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_encode_one"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._encode_one = lru_cache(_CACHE_SIZE)(self._encode_uncached)

    def _encode_uncached(self, text: str) -> NDArray[np.int64]:
        row = self._tokenizer([text], context_length=self.context_length)[0].numpy()
        if not self.can_trim:
            return np.asarray(row, dtype=np.int64)
        # the ids of CLIP's tokenizer include 0 ("!"): the end is its largest id, the end token
        length = (
            int(row.argmax()) + 1 if self.pad_id == 0 and self._ends_with_largest else int((row != self.pad_id).sum())
        )
        return np.asarray(row[:length], dtype=np.int64)

    @property
    def max_length(self) -> int | None:
        """The most tokens that the tokenizer's own files allow, where they say."""
        limit = getattr(getattr(self._tokenizer, "tokenizer", None), "model_max_length", None)
        return int(limit) if limit is not None and limit < 1e9 else None  # transformers' "unknown" is 1e30

    @property
    def _ends_with_largest(self) -> bool:
        return hasattr(self._tokenizer, "eot_token_id")

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of each text, start and end tokens included, cut at the context length."""
        return [self._encode_one(text) for text in texts]

    def is_full(self, ids: NDArray[np.int64]) -> bool:
        """Whether the text fills the context: as a rule, it was cut."""
        return self.can_trim and len(ids) >= self.context_length
