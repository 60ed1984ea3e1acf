"""Configuration: overrides, variables, and messages that name the file, the key and the remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from data_prep.config import Derm1MSource, LLMDecomposer, PrepareConfig, SyntheticSource
from data_prep.config_file import dump_yaml, load_config
from data_prep.errors import InputError
from pretrain.config import ClipObjective, MaskedLatentObjective, TrainConfig

CONFIGS = Path(__file__).parents[3] / "configs"
TRAIN = """
run_dir: runs/one
data: {train_dir: data/train}
model: {name: ViT-B-16}
objectives:
  - {kind: clip}
  - {kind: masked_latent, mask: {kind: random, ratio: 0.75}}
global_batch_size: 64
num_steps: 1000
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(TRAIN, encoding="utf-8")
    return file


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, list(overrides), TrainConfig)
    return str(caught.value)


def test_overrides_reach_nested_keys_and_list_elements(path: Path) -> None:
    config = load_config(
        path,
        ["optimizer.lr=1e-4", "objectives.1.mask.ratio=0.6", "objectives.0.weight=2", "data.num_workers=0", "seed=7"],
        TrainConfig,
    )
    assert config.optimizer.lr == 1e-4 and isinstance(config.optimizer.lr, float)
    assert config.objectives[1] == MaskedLatentObjective.model_validate({"mask": {"kind": "random", "ratio": 0.6}})
    assert config.objectives[0] == ClipObjective(weight=2.0)
    assert (config.data.num_workers, config.seed) == (0, 7)


@pytest.mark.parametrize(
    ("written", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.5e+2", 250.0), ("3.e1", 30.0), ("0.5", 0.5), ("3", 3.0)]
)
def test_numbers_as_people_write_them(path: Path, written: str, value: float) -> None:
    assert load_config(path, [f"optimizer.lr={written}"], TrainConfig).optimizer.lr == value
    in_file = path.with_name("lr.yaml")
    in_file.write_text(TRAIN + f"optimizer: {{lr: {written}}}\n", encoding="utf-8")
    assert load_config(in_file, [], TrainConfig).optimizer.lr == value


def test_an_empty_override_is_absent_and_yaml_gives_the_type(path: Path) -> None:
    config = load_config(path, ["optimizer.grad_clip_norm=", "data.text_bucket_edges=[16, 32]"], TrainConfig)
    assert config.optimizer.grad_clip_norm is None
    assert config.data.text_bucket_edges == (16, 32)


def test_misspelt_keys_are_named_with_their_path(path: Path) -> None:
    text = message(path, "optimizer.learning_rate=1e-4", "objectives.0.wieght=2", "sed=1")
    assert text.startswith(f"{path}: 3 problem(s) in the configuration (TrainConfig):\n")
    lines = text.splitlines()[1:]
    assert "  objectives.0.clip.wieght: no such key; did you mean weight?" in lines
    assert "  sed: no such key; did you mean seed?" in lines
    (of_optimizer,) = [line for line in lines if "learning_rate" in line]
    assert of_optimizer.startswith("  optimizer.learning_rate: no such key; there are betas, eps, ")
    assert "lr, " in of_optimizer and "wieght" not in of_optimizer


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("source.columns.cption=text", "source.table.columns.cption: no such key; did you mean caption?"),
        ("source.table_pth=x", "source.table.table_pth: no such key; did you mean table_path?"),
        ("decomposer={kind: llm, modle: x}", "decomposer.llm.modle: no such key; did you mean model?"),
    ],
)
def test_the_nearest_key_is_of_the_same_place(tmp_path: Path, override: str, near: str) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(
        "name: a\nout_dir: x\nsource: {kind: table, table_path: t.csv, image_dir: i, columns: {image: f}}\n"
    )
    with pytest.raises(InputError, match=re.escape(near)):
        load_config(config, [override], PrepareConfig)


def test_values_out_of_range_and_missing_keys_are_named(path: Path) -> None:
    text = message(path, "optimizer.lr=-1", "objectives.1.mask.ratio=1.0", "num_steps=many")
    assert "  optimizer.lr: Input should be greater than 0" in text
    assert "mask.random.ratio: Input should be less than 1" in text
    assert "  num_steps: Input should be a valid integer" in text
    path.write_text("run_dir: x\n", encoding="utf-8")
    assert "  objectives: Field required" in message(path)


def test_checks_across_fields(path: Path) -> None:
    two_clips = message(path, "objectives=[{kind: clip}, {kind: clip}]")
    assert "['clip', 'clip'] are not distinct; give entries of one kind a `name` each" in two_clips
    assert "siglip is published without a clamp" in message(path, "objectives=[{kind: siglip}]")
    assert "ontology needs the aspect diagnosis" in message(path, "objectives=[{kind: clip, ontology: {}}]")
    frozen = ("objectives=[{kind: masked_latent}]", "model.image.frozen=true")
    assert "masked_latent trains the image tower" in message(path, *frozen)
    assert "set one of num_steps and num_epochs" in message(path, "num_epochs=3")
    assert "warmup_steps must be smaller than num_steps" in message(path, "num_steps=50")
    assert "objectives.0: Input tag 'clap'" in message(path, "objectives.0.kind=clap")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "override 'seed': write it as key.path=value, for example optimizer.lr=1e-4"),
        ("=3", "override '=3': write it as key.path=value, for example optimizer.lr=1e-4"),
        ("objectives.2.weight=1", "override 'objectives.2.weight=1': '2' must be a position below 2"),
        ("objectives.first.weight=1", "override 'objectives.first.weight=1': 'first' must be a position below 2"),
        ("objectives.-1=1", "override 'objectives.-1=1': '-1' must be a position below 2"),
        ("seed.a=1", "override 'seed.a=1': 'seed' is a single value and has no keys below it"),
    ],
)
def test_bad_overrides(path: Path, override: str, expected: str) -> None:
    if override.startswith("seed."):
        path.write_text(TRAIN + "seed: 3\n", encoding="utf-8")
    assert message(path, override) == expected


def test_environment_variables(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(TRAIN.replace("data/train", "'${DERMVLP_TEST_DIR}/train'"), encoding="utf-8")
    monkeypatch.delenv("DERMVLP_TEST_DIR", raising=False)
    assert message(path) == (
        f"{path}: needs the environment variable DERMVLP_TEST_DIR, which is not set (export DERMVLP_TEST_DIR=...)"
    )
    monkeypatch.setenv("DERMVLP_TEST_DIR", "/some/$where")
    assert load_config(path, [], TrainConfig).data.train_dir == Path("/some/$where/train")
    overridden = load_config(path, ["run_dir=${DERMVLP_TEST_DIR}/run"], TrainConfig)
    assert overridden.run_dir == Path("/some/$where/run")


def test_files_that_are_no_configuration(path: Path) -> None:
    assert "no such configuration file" in message(path.with_name("other.yaml"))
    path.write_text("a: [1, 2\n", encoding="utf-8")
    assert message(path).startswith(f"{path}: not valid YAML: ")
    path.write_text("- a\n- b\n", encoding="utf-8")
    assert message(path) == f"{path}: expected a mapping of keys to values at the top level"
    path.write_text("", encoding="utf-8")
    assert message(path) == f"{path}: expected a mapping of keys to values at the top level"


def test_yaml_cannot_run_code(path: Path) -> None:
    path.write_text(TRAIN + "seed: !!python/object/apply:os.getpid []\n", encoding="utf-8")
    assert "not valid YAML" in message(path)


def test_a_written_configuration_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["optimizer.lr=3e-5"], TrainConfig)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(copy, [], TrainConfig) == config
    written = yaml.safe_load(copy.read_text(encoding="utf-8"))
    assert written["optimizer"]["weight_decay"] == 0.1  # defaults are written out
    assert written["objectives"][1]["teacher"]["kind"] == "ema"


def test_data_configurations_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERM1M_DIR", "/data/derm1m")
    synthetic = load_config(CONFIGS / "data" / "synthetic.yaml", ["source.num_train=10"], PrepareConfig)
    assert isinstance(synthetic.source, SyntheticSource) and synthetic.source.num_train == 10
    overrides = ["decomposer.kind=llm", "decomposer.model=some-model"]
    derm1m = load_config(CONFIGS / "data" / "derm1m.yaml", overrides, PrepareConfig)
    assert isinstance(derm1m.source, Derm1MSource) and isinstance(derm1m.decomposer, LLMDecomposer)
    assert derm1m.source.train_csv_path == Path("/data/derm1m/Derm1M_v2_pretrain.csv")
    with pytest.raises(InputError, match=r"decomposer\.rules\.model: no such key"):
        load_config(CONFIGS / "data" / "derm1m.yaml", ["decomposer.model=some-model"], PrepareConfig)
