"""Retrieval beside the dense way of the peers: seconds, and peak memory over what the process held before.

    python -m benchmarks.evaluate_retrieval                           # 20,000 x 20,000, three rounds
    python -m benchmarks.evaluate_retrieval --side ours --num 100000  # one side, once

The dense way is the one of open_clip, which DermLIP and MAKE inherit: all similarities in float32, a full argsort of
the rows and of the columns, and where the right item stands in it. Here it sorts with numpy, several times as fast as
torch's sort on a CPU; `--against torch` is the peers' own form. Each measurement is a process of its own, and all
may use every core. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.side_by_side import median_ratio
from pretrain.evaluation.methods.retrieval import retrieval_ranks

_NUM_PAIRS, _WIDTH = 20_000, 512
_NOISE = 6.6  # cosine of a pair 0.15: with 20,000 candidates about a third is found at once

Ranks = tuple[NDArray[np.int64], NDArray[np.int64]]
Pairs = list[tuple[float, float]]


def retrieval_ratios(num_rounds: int, num_pairs: int = _NUM_PAIRS, against: str = "dense") -> tuple[Pairs, Pairs]:
    """Rounds of (ours, theirs): seconds, and peak bytes over those before the search. against: "dense" or "torch"."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_features(Path(folder), num_pairs)
        sides = ("ours", against)
        for number in range(num_rounds):
            results = {side: _measure(side, folder) for side in (sides if number % 2 == 0 else sides[::-1])}
            found.append((results["ours"], results[against]))
    for mine, theirs in found:
        _check_equal(mine["recalls"], theirs["recalls"])
    seconds, sizes = ([(mine[key], theirs[key]) for mine, theirs in found] for key in ("seconds", "bytes"))
    return seconds, sizes


def write_features(folder: Path, num_pairs: int) -> None:
    """images.npy, texts.npy: (num_pairs, 512) float32 unit rows; each image lies around its text."""
    random = np.random.default_rng(0)
    for name in ("texts", "images"):
        features = random.standard_normal((num_pairs, _WIDTH), dtype=np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        if name == "images":
            features = _NOISE * features + np.load(folder / "texts.npy")
            features /= np.linalg.norm(features, axis=1, keepdims=True)
        np.save(folder / f"{name}.npy", features)


def ours(image_ND: NDArray[np.float32], text_ND: NDArray[np.float32]) -> Ranks:
    return retrieval_ranks(image_ND, text_ND, np.arange(len(image_ND)))


def dense(image_ND: NDArray[np.float32], text_ND: NDArray[np.float32]) -> Ranks:
    similarity_NN = image_ND @ text_ND.T
    ranks = []
    for similarity in (similarity_NN, similarity_NN.T):
        order_NN = np.argsort(similarity, axis=1)  # ascending: descending would need a second matrix
        place_N = np.nonzero(order_NN == np.arange(len(image_ND))[:, None])[1]
        ranks.append(len(image_ND) - 1 - place_N)
        del order_NN
    return ranks[0], ranks[1]


def dense_torch(image_ND: NDArray[np.float32], text_ND: NDArray[np.float32]) -> Ranks:
    similarity_NN = torch.from_numpy(image_ND) @ torch.from_numpy(text_ND).T
    own_N1 = torch.arange(len(image_ND))[:, None]
    ranks = []
    for similarity in (similarity_NN, similarity_NN.T):
        order_NN = torch.argsort(similarity, descending=True)
        ranks.append(torch.where(order_NN == own_N1)[1].numpy())
        del order_NN
    return ranks[0], ranks[1]


SIDES: dict[str, Callable[..., Ranks]] = {"ours": ours, "dense": dense, "torch": dense_torch}


def run_side(search: Callable[..., Ranks], folder: Path) -> dict[str, Any]:
    """What one search takes in this process."""
    image_ND, text_ND = np.load(folder / "images.npy"), np.load(folder / "texts.npy")
    search(image_ND[:64], text_ND[:64])  # starts the threads
    before = _status_bytes("VmRSS")
    started = time.perf_counter()
    ranks = search(image_ND, text_ND)
    seconds = time.perf_counter() - started
    recalls = [float((rank < k).mean()) for rank in ranks for k in (1, 10, 100)]
    return {"seconds": seconds, "bytes": _status_bytes("VmHWM") - before, "recalls": recalls}


def _measure(side: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.evaluate_retrieval", "--side", side, "--features", folder]
    environment = os.environ | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _check_equal(ours: list[float], theirs: list[float]) -> None:
    """float32 puts a few near ties in another order."""
    if not np.allclose(ours, theirs, rtol=0, atol=5e-4):
        raise SystemExit(f"recalls differ: {ours} and {theirs}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate_retrieval", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num", type=int, default=_NUM_PAIRS, help="images, and texts")
    parser.add_argument("--against", choices=("dense", "torch"), default="dense", help="how the dense way sorts")
    parser.add_argument("--side", choices=SIDES, help="only this one, in this process")
    parser.add_argument("--features", type=Path, help="folder of images.npy and texts.npy, for --side")
    arguments = parser.parse_args()
    if arguments.side:
        if arguments.features:
            print(json.dumps(run_side(SIDES[arguments.side], arguments.features)))
            return
        with tempfile.TemporaryDirectory() as folder:
            write_features(Path(folder), arguments.num)
            print(json.dumps(_measure(arguments.side, folder)))
        return
    seconds, sizes = retrieval_ratios(arguments.rounds, arguments.num, arguments.against)
    for (s, dense_s), (size, dense_size) in zip(seconds, sizes, strict=True):
        print(
            f"ours {s:6.2f} s {size / 1e6:7.0f} MB    {arguments.against} {dense_s:6.2f} s {dense_size / 1e6:7.0f} MB"
        )
    speedup = median_ratio(seconds)
    memory = statistics.median(size / dense_size for size, dense_size in sizes)
    print(json.dumps({"retrieval_speedup": round(speedup, 2), "retrieval_memory_ratio": round(memory, 4)}))


if __name__ == "__main__":
    main()
