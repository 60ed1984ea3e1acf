"""What the trainer adds to a bare loop: `python -m benchmarks.trainer`.

    vs_ddp          seconds a step of `dermvlp train` on two ranks (ZeRO-1, fp32, gloo), by those of bare torch DDP
    vs_deepspeed    the same by those of a bare DeepSpeed loop, ZeRO-1
    resume_vs_cold  seconds to the first new step, resumed by cold (benchmarks/resume.py)

All three train the same towers (31 million parameters) on the same batches with the same loss (`clip`, texts packed in
buckets) and AdamW, one CPU thread a rank, and must report the same losses to 1e-3. Ours is a run as users start it:
reader in processes of its own, metrics, agreement of the ranks, guard, a log line every five steps. The bare loops
(trainer_loops.py) find every batch decoded in memory. Whole short runs take turns, the first five steps of each left
out; a figure is the median over the rounds of ours / theirs, with its 95 % bootstrap interval. Ours is read from
metrics.jsonl: global batch / samples_per_s.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.side_by_side import bootstrap_interval, in_turns
from data_prep.config import PrepareConfig, SyntheticSource
from data_prep.prepare import prepare
from pretrain.models.build import build_open_clip
from pretrain.train.__main__ import load_training_config
from pretrain.train.metrics import read_metrics

NUM_RANKS = 2
LOG_EVERY = 5  # also the steps that are left out
AT_MOST = {"vs_ddp": 1.1, "vs_deepspeed": 1.03, "resume_vs_cold": 1.2}
_TOLERANCE = 1e-3  # relative, of losses

_MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 384, "layers": 8, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}
_TINY_MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "patch_size": 12, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def write_run(folder: Path, model_cfg: dict[str, Any], images_per_rank: int, num_steps: int) -> Path:
    """Data, model and config of the run that all sides do."""
    source = SyntheticSource(num_train=4 * NUM_RANKS * images_per_rank * LOG_EVERY, num_val=4, image_px=96)
    prepare(PrepareConfig(name="trainer", source=source, num_workers=1, out_dir=folder / "data"))
    (folder / "model.json").write_text(json.dumps({"model_cfg": model_cfg}), encoding="utf-8")
    config = {
        "run_dir": str(folder / "run"),
        "data": {"train_dir": str(folder / "data" / "train"), "num_workers": 1},
        "model": {"name": str(folder / "model.json"), "max_logit_scale": None},
        "objectives": [{"kind": "clip"}],
        "global_batch_size": NUM_RANKS * images_per_rank,
        "num_steps": num_steps,
        # constant, and without decay: a bare loop needs neither schedule nor groups
        "optimizer": {
            "lr": 1e-4,
            "warmup_steps": 0,
            "schedule": "constant",
            "weight_decay": 0.0,
            "grad_clip_norm": 1.0,
        },
        "engine": {"kind": "deepspeed", "zero_stage": 1},
        "launch": {"num_ranks": NUM_RANKS, "threads_per_rank": 1},
        "log_every": LOG_EVERY,
        "checkpoint": {"every": num_steps, "every_minutes": None, "keep_last": 1},
        "trackers": [],
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


class Sides:
    """The three loops, each a whole run of two ranks that returns its seconds a step."""

    def __init__(self, config_path: Path) -> None:
        self._path = config_path
        self._config = load_training_config(str(config_path), [])
        self.losses: dict[str, list[float]] = {}  # by side, of the logged steps

    def ours(self, number: int) -> float:
        run_dir = self._config.run_dir.with_name(f"run-{number}")
        _run(["-m", "pretrain.cli", "train", str(self._path), f"run_dir={run_dir}"])
        records = [record for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record]
        self.losses["ours"] = [record["loss"] for record in records]
        timed = [self._config.global_batch_size / record["samples_per_s"] for record in records[1:]]
        return statistics.mean(timed)  # windows of equal length

    def ddp(self, number: int) -> float:
        return self._bare("ddp")

    def deepspeed(self, number: int) -> float:
        return self._bare("deepspeed")

    def _bare(self, side: str) -> float:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]
        out = _run([*launcher, "-m", "benchmarks.trainer_loops", side, str(self._path), str(LOG_EVERY)])
        result = next(json.loads(line) for line in reversed(out.splitlines()) if line.startswith('{"s_per_step"'))
        self.losses[side] = result["losses"][LOG_EVERY - 1 :: LOG_EVERY]
        return float(result["s_per_step"])

    def check_losses(self) -> None:
        """Raises RuntimeError where the sides did not train the same."""
        reference = self.losses["ours"]
        for side, losses in self.losses.items():
            pairs = zip(losses, reference, strict=True)
            if any(abs(theirs - ours) > _TOLERANCE * abs(ours) for theirs, ours in pairs):
                raise RuntimeError(f"losses of {side} {losses} are not ours {reference}")


def _run(arguments: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def num_parameters(config_path: Path) -> int:
    model = build_open_clip(load_training_config(str(config_path), []).model)
    return sum(parameter.numel() for parameter in model.parameters())


def resume_ratios(num_rounds: int) -> list[float]:
    """Of benchmarks/resume.py: seconds to the first new step, resumed by cold; none where that file is missing."""
    try:
        from benchmarks.resume import resume_vs_cold
    except ImportError:
        return []
    return [resumed / cold for cold, resumed in resume_vs_cold(num_rounds)]


def print_sides(rows: list[tuple[float, ...]]) -> None:
    print("side                  s a step (median of the rounds)")
    for name, values in zip(("dermvlp train", "bare DDP", "bare DeepSpeed"), zip(*rows, strict=True), strict=True):
        print(f"  {name:18} {statistics.median(values):8.3f}")


def print_figures(ratios: dict[str, list[float]]) -> None:
    print("figure            value  interval           bar")
    for name, values in ratios.items():
        if not values:
            print(f"  {name:14}    not measured")
            continue
        low, high = bootstrap_interval(values)
        verdict = "met" if low <= AT_MOST[name] else "missed"  # a bar near 1: the interval's better end decides
        print(f"  {name:14} {statistics.median(values):6.3f}  [{low:.3f}, {high:.3f}]  <= {AT_MOST[name]:g} {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny towers, one round: whether it runs, not how fast")
    parser.add_argument("--num-rounds", type=int, default=6)
    parser.add_argument("--images", type=int, default=32, help="of a rank in a step: with fewer, sending weighs more")
    parser.add_argument("--no-resume", action="store_true", help="leave benchmarks/resume.py out")
    arguments = parser.parse_args()
    num_rounds = 1 if arguments.quick else arguments.num_rounds
    num_steps, images = (2 * LOG_EVERY, 4) if arguments.quick else (3 * LOG_EVERY, arguments.images)
    with tempfile.TemporaryDirectory() as name:
        path = write_run(Path(name), _TINY_MODEL if arguments.quick else _MODEL, images, num_steps)
        size = num_parameters(path)
        load = os.getloadavg()
        sides = Sides(path)
        rows = in_turns([sides.ours, sides.ddp, sides.deepspeed], num_rounds)
        sides.check_losses()
    print(
        f"{size / 1e6:.1f} M parameters, {NUM_RANKS} ranks, {images} images each, {num_steps} steps a run, "
        f"{num_rounds} round(s); load before {load[0]:.1f}, after {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores"
    )
    if arguments.quick:
        print("--quick: tiny towers, these times mean nothing")
    ratios = {
        "vs_ddp": [ours / ddp for ours, ddp, _ in rows],
        "vs_deepspeed": [ours / deepspeed for ours, _, deepspeed in rows],
        "resume_vs_cold": [] if arguments.no_resume else resume_ratios(min(num_rounds, 5)),
    }
    print_sides(rows)
    print_figures(ratios)
    print(json.dumps({name: round(statistics.median(v), 3) if v else None for name, v in ratios.items()}))


if __name__ == "__main__":
    main()
