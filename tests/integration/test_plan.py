"""`dermvlp train CONFIG --plan`: of every recipe, as a command, and against what real steps send and allocate."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.config_file import load_config
from pretrain import cli
from pretrain.config import TrainConfig
from pretrain.train.preflight.memory import state_bytes
from pretrain.train.preflight.plan import make_plan
from pretrain.train.preflight.report import plan_lines
from pretrain.train.preflight.towers import Count
from tests.distributed import steps
from tests.distributed.run import run_on_ranks
from tests.distributed.steps import CLIP, EVERYTHING, LOCAL_ALIGNMENT, MULTI_ASPECT, SIGLIP, build
from tests.distributed.test_communication import count
from tests.integration.conftest import val_dir, write_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "pretrain").glob("*.yaml"))

#: millions of parameters of the image and the text tower, as published (PubMedBERT: 108.9 without pooler, and the head)
SIZES = {
    "clip_vitb16": (86.2, 63.4),
    "dermlip_panderm_pubmedbert256": (86.2, 109.7),
    "dermfm_zero_stage2_contrastive": (304.1, 110.1),
    "whylesionclip_vitl14": (304.0, 123.7),
    "siglip_so400m": (428.2, 449.7),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan_offline(name: str, prepared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 96 samples, which fill no batch of a recipe; hand-made weights are missing."""
    monkeypatch.chdir(ROOT)
    config = load_config(f"configs/pretrain/{name}.yaml", [f"data.train_dir={prepared_dir / 'train'}"], TrainConfig)
    plan = make_plan(config)
    expected = []
    if config.global_batch_size > 96:
        expected.append("samples are fewer than one global batch")
    weights = config.model.image.weights
    if weights is not None and not weights.source.startswith(("package:", "hf-hub:")):
        expected.append(weights.source)
    assert len(plan.problems) == len(expected), plan.problems
    for problem, part in zip(plan.problems, expected, strict=True):
        assert part in problem
    assert plan.knows_text_tower and plan.memory is not None and plan.captions is not None
    assert all(parameter.trained >= 0 for parameter in plan.parameters.values())
    if name in SIZES:
        sizes = plan.parameters["image"].total / 1e6, plan.parameters["text"].total / 1e6
        assert sizes == pytest.approx(SIZES[name], abs=0.06)
    assert plan.memory.activation_bytes > 0 and plan.memory.total(plan.memory.stage) > 1e8
    lines = "\n".join(plan_lines(plan))
    assert all(text in lines for text in ("Parameters", "Memory", "Communication", *plan.not_checked, *plan.problems))
    json.dumps(plan.to_json())


def test_the_command_prints_a_plan_and_trains_nothing(
    run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", run_config)
    assert cli.main(["train", str(config), "micro_batch_size=4", "launch.num_ranks=2", "--plan"]) == 0
    printed = capsys.readouterr().out
    for part in ("steps an epoch     12", "8 over 2 rank(s): 4 each, in 1 forward(s) of 4", "Nothing speaks against"):
        assert part in printed
    assert not Path(run_config["run_dir"]).exists()

    arguments = ["train", str(config), "num_steps=null", "num_epochs=3", "--plan", "--json"]
    assert cli.main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["batch"]["steps_per_epoch"], plan["batch"]["num_steps"]) == (12, 36)
    assert plan["parameters"]["text"] == {"trained": 1_609_600, "frozen": 0}
    assert plan["problems"] == [] and plan["traffic"] == []
    total = sum(plan["memory"]["state"]["0"].values()) + plan["memory"]["activation_bytes"]
    assert plan["memory"]["total"]["0"] == total + plan["memory"]["logits"] + plan["memory"]["features"]


def test_what_cannot_work_is_said_at_once_by_plan_and_by_train(
    run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", run_config)
    overrides = ["model.name=RN50", "micro_batch_size=3", "trackers=[trackio]", "launch.num_ranks=2"]
    assert cli.main(["train", str(config), *overrides, "--plan"]) == 2
    planned = capsys.readouterr().out
    assert cli.main(["train", str(config), *overrides]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("error: 3 problems:") and refused.count("error") == 1
    for part in ("micro_batch_size: 3 does not divide", "cannot drop patches", "trackers: trackio is not installed"):
        assert part in planned and part in refused
    assert cli.main(["train", str(config), "--json"]) == 2
    assert "--json belongs to --plan" in capsys.readouterr().err


def test_run_dir_of_another_run(run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_config |= {"objectives": [{"kind": "clip"}], "num_steps": 1, "optimizer": {"lr": 1e-3, "warmup_steps": 0}}
    config = write_config(tmp_path / "run.yaml", run_config)
    assert cli.main(["train", str(config)]) == 0
    capsys.readouterr()
    validation = f"validation={{val_dir: {val_dir(run_config)}}}"
    assert cli.main(["train", str(config), validation, "--plan"]) == 0  # its own run, with a key that changes nothing
    capsys.readouterr()
    assert cli.main(["train", str(config), "optimizer.lr=0.5", "--plan"]) == 2
    printed = capsys.readouterr().out
    assert "run_dir: " in printed and "optimizer.lr: 0.001 in the checkpoint, 0.5 now" in printed


# ---------------------------------------------------------------------------------------------- against real steps


def test_traffic_is_what_two_ranks_send(prepared_dir: Path, tiny_model_path: Path) -> None:
    """Counted in one real step of each kind, plain engine."""
    objectives = {
        "siglip": [SIGLIP],
        "aspects and regions": [MULTI_ASPECT, LOCAL_ALIGNMENT | {"text_to_region": False}],
        "everything": EVERYTHING,
    }
    changes = {"launch": {"num_ranks": 2}, "trackers": []}
    configs = {name: steps.run_config(prepared_dir, tiny_model_path, o, **changes) for name, o in objectives.items()}
    counted, _ = run_on_ranks(count, 2, configs)
    for name, (calls, num_texts, _) in counted.items():
        plan = make_plan(configs[name])
        assert plan.traffic is not None and plan.captions is not None
        assert plan.captions.max_texts_of_a_rank == num_texts, name
        ours: Counter[str] = Counter()
        for transfer in plan.traffic:
            if not transfer.what.startswith("agreement"):  # the loop's, not the step's
                ours[transfer.kind.replace("_", "")] += transfer.num_elements * transfer.element_bytes
        theirs: Counter[str] = Counter()
        for (kind, numel, dtype), times in calls.items():
            theirs[kind.replace("_", "")] += times * numel * {"float32": 4, "int64": 8}[dtype]
        assert ours == theirs, name


def allocated(config: TrainConfig) -> dict[str, int]:
    """Bytes that the engine of this rank holds after a step, by part, and the module's parameters."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from pretrain.train.step import training_step

    trainer, reader = build(config, torch.float32)
    training_step(trainer, reader[0], 0)
    engine: Any = trainer.engine
    parameters = list(trainer.model.parameters())
    if config.engine.kind == "torch":
        masters, optimizer = [], engine._optimizer
    else:
        masters = engine._engine.optimizer.single_partition_of_fp32_groups
        optimizer = engine._engine.optimizer.optimizer
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    return {
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "frozen": sum(p.numel() for p in parameters if not p.requires_grad),
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "masters": sum(t.numel() * t.element_size() for t in masters),
        "moments": sum(t.numel() * t.element_size() for t in moments),
    }


def allocated_by(configs: dict[str, TrainConfig]) -> dict[str, dict[str, int]]:
    return {name: allocated(config) for name, config in configs.items()}


def test_weights_and_optimizer_state_are_what_engines_allocate(prepared_dir: Path, tiny_model_path: Path) -> None:
    engines: dict[str, dict[str, Any]] = {
        "torch": {"kind": "torch"},
        "zero 1 fp32": {"kind": "deepspeed", "zero_stage": 1},
        "zero 1 bf16": {"kind": "deepspeed", "zero_stage": 1, "precision": "bf16"},
        "zero 2 bf16": {"kind": "deepspeed", "zero_stage": 2, "precision": "bf16"},
    }
    model = {"name": str(tiny_model_path), "text": {"freeze_layers": 1}}
    configs = {name: steps.run_config(prepared_dir, model, [CLIP], engine=engine) for name, engine in engines.items()}
    for found in run_on_ranks(allocated_by, 2, configs):
        for name, sizes in found.items():
            config, module = configs[name], Count(sizes["trained"], sizes["frozen"])
            assert module.frozen > 0
            parts = state_bytes(module, 0, config.engine, 2, config.engine.zero_stage)
            for part in ("weights", "masters", "moments"):
                # DeepSpeed pads each group's part, of which this model has two
                assert sizes[part] == pytest.approx(parts[part], rel=0.01, abs=64), f"{name}: {part}"


def test_a_plan_of_what_cannot_be_read_at_all(run_config: dict[str, Any], tmp_path: Path) -> None:
    overrides = [
        "model.name=ViT-Z-99",
        f"data.train_dir={tmp_path / 'gone'}",
        "global_batch_size=7",
        "launch.num_ranks=2",
    ]
    plan = make_plan(load_config(write_config(tmp_path / "run.yaml", run_config), overrides, TrainConfig))
    assert len(plan.problems) == 3 and (plan.memory, plan.traffic, plan.captions, plan.parameters) == (
        None,
        None,
        None,
        {},
    )
    lines = list(plan_lines(plan))
    assert [line for line in lines if line.startswith("  - ")] == [f"  - {problem}" for problem in plan.problems]
    json.dumps(plan.to_json())
