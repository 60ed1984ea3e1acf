"""Text towers of open_clip that take texts shorter than their context, where that changes nothing, and that never
make the host wait for the device.

As the image towers, they keep open_clip's parameters and names; only their class is replaced.

Shapes: U texts, L tokens, W tower width, D joint embedding width.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn as nn
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from torch import Tensor

from data_prep.errors import InputError


class TrimmedTextTransformer(TextTransformer):
    """open_clip's text transformer for texts shorter than its context: the causal mask is cut to their length."""

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = super()._embeds(text)
        if mask is not None and mask.ndim == 2:
            mask = mask[: x.shape[1], : x.shape[1]]
        return x, mask


class AsyncHFTextEncoder(HFTextEncoder):
    """open_clip's adapter of a transformers tower, with the padding mask in its final form.

    From a mask (U, L) transformers asks the device whether anything is masked at all, and waits for the answer; one
    of four dimensions it takes as it is.
    """

    def forward(self, text: Tensor) -> Tensor:
        """(U, L) token ids to (U, D)."""
        is_text_UL = text != self.config.pad_token_id
        hidden = self.transformer(input_ids=text, attention_mask=is_text_UL[:, None, None, :])
        projected: Tensor = self.proj(self.pooler(hidden, is_text_UL.long()))
        return projected


def allow_trimmed(text: nn.Module) -> nn.Module:
    """Give a text tower of open_clip the forward that training uses, in place.

    Raises InputError for an HF tower whose attention takes no boolean mask of four dimensions.
    """
    if type(text) is TextTransformer:
        text.__class__ = TrimmedTextTransformer
        cast(Any, text).output_tokens = False  # CoCa's decoder wants them
    elif type(text) is HFTextEncoder:
        kind = cast(Any, text).transformer.config._attn_implementation
        if kind != "sdpa":
            raise InputError(
                f"model.name: the text tower's attention is {kind!r}; in its config.json remove `attn_implementation`, "
                "so that transformers takes 'sdpa'"
            )
        text.__class__ = AsyncHFTextEncoder
    return text


def can_trim(text: nn.Module, ends_apart: bool) -> bool:
    """Whether texts may be cut at their end token.

    True for a padding mask (HF towers) and for causal towers pooled at the end token; never where the end token is
    also the padding (`ends_apart` false), for then nothing tells where a text ends.
    """
    if isinstance(text, HFTextEncoder):
        return ends_apart
    is_causal = text.attn_mask is not None and text.pool_type in ("argmax", "eos") and text.cls_emb is None
    return ends_apart and is_causal
