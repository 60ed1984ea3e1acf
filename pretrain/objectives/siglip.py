"""The sigmoid objective (SigLIP): every image with every distinct text of the term, alone.

Shapes: B images on this rank, K slots, C columns (distinct texts of the term), X = C + 1, D width.
"""

from __future__ import annotations

from pretrain.config import SiglipObjective
from pretrain.losses.sigmoid import sigmoid_loss_sum
from pretrain.objectives.base import Term
from pretrain.objectives.contrastive import with_spare_column
from pretrain.objectives.features import Features


class Siglip:
    """Needs the scale and the bias of its tower, no weights, and no collective of its own."""

    def __init__(self, config: SiglipObjective) -> None:
        self.label = config.label
        self.weight = config.weight
        self.aspects = config.aspects

    def __call__(self, features: Features) -> Term:
        """Each rank has the mean over its own images: the mean over ranks is the mean over the global batch."""
        assert features.logit_bias is not None
        columns, image_BD = features.batch.columns[self.label], features.image_BD
        text_XD = with_spare_column(features.text_UD[columns.text_C])
        column_BK = columns.column_of_text[features.batch.text_BK]
        logits_BX = (features.logit_scale * image_BD) @ text_XD.T + features.logit_bias
        loss = sigmoid_loss_sum(logits_BX, column_BK) / image_BD.shape[0]
        used_BK = column_BK < columns.text_C.shape[0]
        return Term(loss, {"texts_per_image": (used_BK.sum(), loss.new_full((), image_BD.shape[0]))})
