"""How good a trained dual encoder is: features, zero-shot classification, retrieval and the report.

from pretrain.evaluation import embed_images, load_encoder
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.evaluation.encoding.encoders import load_encoder
    from pretrain.evaluation.encoding.features import embed_images

__all__ = ["embed_images", "load_encoder"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: results.py and its like are read without torch."""
    if name == "load_encoder":
        from pretrain.evaluation.encoding.encoders import load_encoder

        return load_encoder
    if name == "embed_images":
        from pretrain.evaluation.encoding.features import embed_images

        return embed_images
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
