"""SIGKILL at random moments, resumed each time, and at the end the same losses and weights, bit by bit.

    make test-kill KILLS=50         or: python -m tests.integration.kill_runs --kills 50 --seed 0

Launcher, ranks and readers of `dermvlp train` are killed: some in the middle of saving, some while the run starts, the
others anywhere. Every fifth kill meets two DeepSpeed ranks (ZeRO 2), which take longest to start; the others one rank
of the plain engine. Both train all of it: contrastive terms, local alignment, masked latent with an EMA teacher, random
masks, augmentation, dropped activations and paths, micro-batches in parts, and a checkpoint every other step. A run
that reaches its end is compared with an uninterrupted one and begun anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file

from data_prep.config import PrepareConfig, SyntheticSource
from data_prep.prepare import prepare
from pretrain.train.metrics import read_metrics
from pretrain.train.retention import list_checkpoints, step_of
from tests.distributed.test_cached_features import BERT

NUM_STEPS = 16
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
KINDS: dict[str, dict[str, Any]] = {
    "torch, 1 rank": {"engine": {"kind": "torch"}, "launch": {"num_ranks": 1, "threads_per_rank": 1}},
    "ZeRO 2, 2 ranks": {
        "engine": {"kind": "deepspeed", "zero_stage": 2},
        "launch": {"num_ranks": 2, "threads_per_rank": 1},
    },
}
PLAIN, DEEPSPEED = KINDS


@dataclass
class Run:
    """A run under way and the uninterrupted one that it must equal."""

    config_path: Path
    run_dir: Path
    reference_dir: Path
    num_kills: int = 0

    def start(self, run_dir: Path | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pretrain.cli", "train", str(self.config_path)]
        with (self.config_path.with_suffix(".log")).open("ab") as log:
            return subprocess.Popen(
                [*command, f"run_dir={run_dir or self.run_dir}"], env=ENVIRONMENT, stderr=log, stdout=log
            )

    def differences(self) -> list[str]:
        """What of the two runs is not equal: nothing, if all is well."""
        ours, theirs = losses(self.run_dir), losses(self.reference_dir)
        found = [f"losses of step {a['step']}" for a, b in zip(ours, theirs, strict=False) if a != b]
        found += ["number of logged steps"] if len(ours) != len(theirs) else []
        for name in ("model", "teacher"):
            mine, other = (
                load_file(folder / "checkpoints" / f"step-{NUM_STEPS:08d}" / f"{name}.safetensors")
                for folder in (self.run_dir, self.reference_dir)
            )
            found += [f"{name}: {key}" for key in other if not torch.equal(mine[key], other[key])]
        return found


def losses(run_dir: Path) -> list[dict[str, float]]:
    """All that training alone decides: no times."""
    timed = ("samples_per_s", "reader_wait_fraction")
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


def prepare_runs(folder: Path) -> dict[str, Run]:
    """Synthetic data, a tiny model that drops activations and paths, and the uninterrupted runs."""
    source = SyntheticSource(num_train=96, num_val=24, image_px=48)
    prepare(PrepareConfig(name="kills", source=source, samples_per_shard=16, num_workers=1, out_dir=folder / "data"))
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 48, "timm_proj": "linear", "timm_drop_path": 0.4}
    towers = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": BERT | {"hf_proj_type": "linear"}}
    (folder / "model.json").write_text(json.dumps({"model_cfg": towers}), encoding="utf-8")
    config = {
        "run_dir": "by override",
        "data": {"train_dir": str(folder / "data" / "train"), "num_workers": 1},
        "model": {"name": str(folder / "model.json"), "tiny": True},
        "objectives": [
            {"kind": "clip"},
            {"kind": "multi_aspect"},
            {"kind": "local_alignment", "sigma": 0.0},
            {
                "kind": "masked_latent",
                "teacher": {"kind": "ema", "momentum_start": 0.9},
                "mask": {"kind": "random"},
                "predictor_depth": 1,
                "predictor_width": 16,
                "predictor_heads": 2,
            },
        ],
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "num_steps": NUM_STEPS,
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "log_every": 1,
        "checkpoint": {"every": 2},
        "trackers": [],
    }
    runs = {}
    for number, (kind, changes) in enumerate(KINDS.items()):
        path = folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump(config | changes), encoding="utf-8")
        runs[kind] = Run(path, folder / f"run-{number}", folder / f"reference-{number}")
        started = time.monotonic()
        if runs[kind].start(runs[kind].reference_dir).wait() != 0:
            raise SystemExit(path.with_suffix(".log").read_text(encoding="utf-8"))
        print(f"{kind}: uninterrupted, {NUM_STEPS} steps in {time.monotonic() - started:.0f} s", flush=True)
    return runs


def wait_for_moment(process: subprocess.Popen[bytes], run: Run, draw: random.Random, newest_step: int) -> str:
    """Until a random moment of a random kind, or the run's end; counted in steps, so that slow machines get as far."""
    kind = draw.choices(["saving", "anywhere", "starting"], [0.5, 0.4, 0.1])[0]
    started_at = time.time()
    num_steps, pause_s = newest_step + draw.randint(1, 5), draw.uniform(0.0, 0.1)
    if kind == "starting":
        wait(process, lambda: time.time() > started_at + 80 * pause_s)
        return kind
    wait(process, lambda: num_steps_logged(run.run_dir, started_at) >= num_steps)
    if kind == "saving":
        wait(process, lambda: bool(partials(run.run_dir)))
    time.sleep(pause_s)
    return kind


def wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.001)


def num_steps_logged(run_dir: Path, since: float = 0.0) -> int:
    """0 where this attempt has logged none: a resume writes the log anew."""
    with contextlib.suppress(OSError):
        path = run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.stat().st_mtime > since else 0
    return 0


def partials(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*.partial"))


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Launcher, ranks and readers at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for victim in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
    process.wait()


def end(run: Run, kind: str) -> bool:
    """To the end without a kill, then compared."""
    if run.start().wait() != 0:
        print(run.config_path.with_suffix(".log").read_text(encoding="utf-8")[-3000:], flush=True)
        return False
    found = run.differences()
    steps = f"{run.num_kills} kills and resumes, {NUM_STEPS} steps"
    print(f"{kind}: {steps}: {'NOT equal: ' + ', '.join(found[:5]) if found else 'bit-equal'}", flush=True)
    shutil.rmtree(run.run_dir)
    run.num_kills = 0
    return not found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, is_equal, in_saving = random.Random(arguments.seed), True, 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dermvlp-kills-") as name:
        runs = prepare_runs(Path(name))
        number = 0
        while number < arguments.kills and is_equal:
            kind = DEEPSPEED if number % 5 == 4 else PLAIN
            run = runs[kind]
            before = list_checkpoints(run.run_dir)
            process = run.start()
            moment = wait_for_moment(process, run, draw, step_of(before[-1]) if before else 0)
            if process.poll() is not None:  # it was over before: no kill
                is_equal &= process.returncode == 0 and end(run, kind)
                continue
            kill_all(process)
            number, run.num_kills = number + 1, run.num_kills + 1
            left = partials(run.run_dir)
            in_saving += bool(left)
            steps = [path.name for path in list_checkpoints(run.run_dir)]
            print(
                f"kill {number:3d}/{arguments.kills}  {kind:15}  {moment:8}  after step "
                f"{num_steps_logged(run.run_dir):2d}  newest {steps[-1] if steps else 'none':13}  {' '.join(left)}",
                flush=True,
            )
        for kind, run in runs.items():
            if run.num_kills and is_equal:
                is_equal &= end(run, kind)
    verdict = "all bit-equal" if is_equal else "NOT equal"
    minutes = (time.monotonic() - started) / 60
    print(f"{number} kills, {in_saving} in the middle of saving, {verdict}, {minutes:.1f} min", flush=True)
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
