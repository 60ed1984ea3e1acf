"""What a resume costs: to the first new step against a cold start, and the opening of a run over a million samples.

    python -m benchmarks.resume [--rounds 5]

`resume_vs_cold` starts `dermvlp train` (two DeepSpeed ranks, ZeRO 1) by turns from nothing and from a checkpoint, and
takes the time from the start of the process to the end of the first new step, as its line in metrics.jsonl says.
`open_million` opens a run of 1,000,000 samples up to its first batch, in a process of its own. Its shards are a few
real ones under many names, and its index repeats their rows. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.side_by_side import bootstrap_interval, by_turns
from data_prep.config import PrepareConfig, SyntheticSource
from data_prep.prepare import prepare
from pretrain.train.retention import list_checkpoints

_REPOSITORY = Path(__file__).parents[1]
_NUM_SAMPLES, _SAMPLES_PER_SHARD = 1_000_000, 5_000


def write_data(folder: Path) -> Path:
    source = SyntheticSource(num_train=192, num_val=24, image_px=96)
    prepare(PrepareConfig(name="resume", source=source, samples_per_shard=32, num_workers=1, out_dir=folder))
    return folder / "train"


def write_config(path: Path, train_dir: Path, run_dir: Path) -> Path:
    config: dict[str, Any] = {
        "run_dir": str(run_dir),
        "data": {"train_dir": str(train_dir), "num_workers": 1},
        "model": {"name": str(_REPOSITORY / "configs" / "models" / "vit_tiny_96.json")},
        "objectives": [{"kind": "clip"}],
        "global_batch_size": 8,
        "num_steps": 1000,
        "optimizer": {"warmup_steps": 10},
        "engine": {"kind": "deepspeed", "zero_stage": 1},
        "launch": {"num_ranks": 2, "threads_per_rank": 1},
        "log_every": 1,
        "checkpoint": {"every": 2},
        "trackers": [],
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def resume_vs_cold(num_rounds: int) -> list[tuple[float, float]]:
    """(seconds from nothing, seconds from a checkpoint) to the end of the first new step, by turns."""
    with tempfile.TemporaryDirectory(prefix="dermvlp-resume-") as name:
        folder = Path(name)
        config = write_config(folder / "run.yaml", write_data(folder / "data"), folder / "unused")
        saved = folder / "saved"
        _run_until(config, saved, lambda: bool(list_checkpoints(saved)))
        for later in list_checkpoints(saved)[1:]:
            shutil.rmtree(later)
        first_step = int(list_checkpoints(saved)[0].name.removeprefix("step-"))

        def seconds(is_resume: bool) -> float:
            run_dir = folder / "run"
            shutil.rmtree(run_dir, ignore_errors=True)
            if is_resume:
                shutil.copytree(saved, run_dir)
                lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
                (run_dir / "metrics.jsonl").write_bytes(b"".join(lines[:first_step]))
            num_lines = first_step + 1 if is_resume else 1
            return _run_until(config, run_dir, lambda: _num_lines(run_dir) >= num_lines, "checkpoint.every=1000")

        return by_turns(lambda: seconds(False), lambda: seconds(True), num_rounds)


def _num_lines(run_dir: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def _run_until(config: Path, run_dir: Path, condition: Any, *overrides: str) -> float:
    """Seconds from the start of the command until the condition holds; the run is killed then."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pretrain.cli", "train", str(config), f"run_dir={run_dir}", *overrides]
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
        while process.poll() is None and not condition():
            time.sleep(0.002)
        elapsed_s = time.perf_counter() - started
        if process.poll() is not None:
            log.seek(0)
            raise SystemExit(log.read())
    process.send_signal(signal.SIGKILL)  # the ranks see that within a second, and end
    process.wait()
    time.sleep(2.0)
    return elapsed_s


# ------------------------------------------------------------------------------------------- a million samples


def write_million(folder: Path, small_dir: Path, num_samples: int = _NUM_SAMPLES) -> Path:
    """A split of as many samples, whose rows and shards repeat those of a small one."""
    folder.mkdir(parents=True)
    manifest = json.loads((small_dir / "manifest.json").read_text(encoding="utf-8"))
    index, shards = np.load(small_dir / "index.npy", allow_pickle=False), manifest["shards"]
    rows_by_shard = [np.flatnonzero(index["shard"] == shard) for shard in range(len(shards))]
    parts, infos = [], []
    for number in range(num_samples // _SAMPLES_PER_SHARD):
        real = number % len(shards)
        name = f"million-{number:06d}.tar"
        (folder / name).hardlink_to(small_dir / shards[real]["name"])
        part = index[np.resize(rows_by_shard[real], _SAMPLES_PER_SHARD)].copy()
        part["shard"] = number
        parts.append(part)
        infos.append(shards[real] | {"name": name, "num_samples": _SAMPLES_PER_SHARD})
    np.save(folder / "index.npy", np.concatenate(parts), allow_pickle=False)
    manifest |= {"num_samples": len(infos) * _SAMPLES_PER_SHARD, "shards": infos}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def open_million() -> tuple[float, float, float]:
    """(seconds, GB that it adds to the process's peak, GB of that peak) of opening a run.

    Manifest, index, text buckets, the epoch's order and the first batch; imports and towers come before it.
    """
    with tempfile.TemporaryDirectory(prefix="dermvlp-million-") as name:
        folder = Path(name)
        million = write_million(folder / "million", write_data(folder / "data"))
        config = write_config(folder / "run.yaml", million, folder / "run")
        command = [sys.executable, "-m", "benchmarks.resume", "--open", str(config)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        return result["seconds"], result["added_gb"], result["peak_gb"]


def _open(config_path: str) -> None:
    from pretrain.data.plan import order_digest
    from pretrain.models.build import build_tokenizer
    from pretrain.train.__main__ import load_training_config
    from pretrain.train.state import build_dual_encoder, build_reader, with_num_steps

    config = load_training_config(config_path, ["engine.kind=torch"])
    model = build_dual_encoder(config)
    tokenizer = build_tokenizer(config.model, model.text)
    before_gb, started = _peak_gb(), time.perf_counter()
    config = with_num_steps(config)
    reader = build_reader(config, model, tokenizer)
    digest = (reader.data.digest, order_digest(reader.order(0)))
    assert reader[0].image_BCHW.shape[0] == config.global_batch_size and all(digest)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "added_gb": _peak_gb() - before_gb, "peak_gb": _peak_gb()}))


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        _open(arguments.open)
        return
    seconds, added_gb, peak_gb = open_million()
    print(
        f"a million samples opened in {seconds:.2f} s: {added_gb:.2f} GB more, {peak_gb:.2f} GB with torch and towers"
    )
    pairs = resume_vs_cold(arguments.rounds)
    for cold_s, resumed_s in pairs:
        print(f"cold {cold_s:6.2f} s   resumed {resumed_s:6.2f} s   {resumed_s / cold_s:.3f}")
    ratios = [resumed_s / cold_s for cold_s, resumed_s in pairs]
    low, high = bootstrap_interval(ratios)
    ratio = statistics.median(ratios)
    result = {"resume_vs_cold": round(ratio, 3), "interval": [round(low, 3), round(high, 3)]}
    print(json.dumps(result | {"open_million_s": round(seconds, 2), "open_million_gb": round(added_gb, 2)}))


if __name__ == "__main__":
    main()
