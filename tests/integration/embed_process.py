"""`embed` in a process of its own, to be killed: `python -m tests.integration.embed_process MODEL OUT NUM_WORKERS`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.encoding.embed import embed
from pretrain.evaluation.encoding.encoders import load_encoder
from pretrain.evaluation.encoding.feature_chunks import CHUNK_ROWS
from tests.unit.evaluation.models import Pictures, encoded, picture

NUM_IMAGES = 2 * CHUNK_ROWS + 30
UNDECODABLE = 17


class Slowly(Pictures):
    """After the first chunk it takes its time, so that the process can be killed meanwhile."""

    def read_image(self, position: int) -> bytes:
        if position >= CHUNK_ROWS:
            time.sleep(0.5)
        return super().read_image(position)


def pictures() -> list[bytes]:
    images = [encoded(picture(seed)) for seed in range(NUM_IMAGES)]
    images[UNDECODABLE] = images[UNDECODABLE][:-200]
    return images


def settings(num_workers: int) -> EvaluationSettings:
    return EvaluationSettings(batch_size=64, num_workers=num_workers)


if __name__ == "__main__":
    model, out, num_workers = sys.argv[1:]
    embed(load_encoder(model), Slowly(pictures()), Path(out), settings=settings(int(num_workers)))
