"""What evaluation costs beside the bare computations: `python -m benchmarks.evaluate`.

    embed_of_forward        images a second of embedding by those of the bare forward (evaluate_embed.py)
    retrieval_speedup       seconds of the dense way by ours, 20,000 x 20,000 (evaluate_retrieval.py)
    retrieval_memory_ratio  peak memory of the dense way by ours, each over what its process held before

The two sides take turns in one run. A figure is the median over the rounds, with its 95 % bootstrap interval. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics

from benchmarks.evaluate_embed import embed_of_forward
from benchmarks.evaluate_retrieval import retrieval_ratios
from benchmarks.side_by_side import bootstrap_interval

AT_LEAST = {"embed_of_forward": 0.9, "retrieval_speedup": 3.0, "retrieval_memory_ratio": 10.0}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, one round: whether it runs, not how fast")
    parser.add_argument("--embed-rounds", type=int, default=20)
    parser.add_argument("--retrieval-rounds", type=int, default=5)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    seconds, num_bytes = (
        retrieval_ratios(1, num_pairs=1000) if arguments.quick else retrieval_ratios(arguments.retrieval_rounds)
    )
    # images/s: of the bare forward, of embedding
    embedding = embed_of_forward(1 if arguments.quick else arguments.embed_rounds)
    ratios = {
        "embed_of_forward": [ours / bare for bare, ours in embedding],
        "retrieval_speedup": [theirs / ours for ours, theirs in seconds],
        "retrieval_memory_ratio": [theirs / ours for ours, theirs in num_bytes],
    }
    print(f"{os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} after")
    if arguments.quick:
        print("--quick: these figures mean nothing")
    print("figure                    value  interval            bar")
    for name, values in ratios.items():
        low, high = bootstrap_interval(values)
        verdict = "met" if high >= AT_LEAST[name] else "missed"  # a bar near 1: the interval's better end decides
        print(f"{name:24} {statistics.median(values):6.3f}  [{low:.3f}, {high:.3f}]  >= {AT_LEAST[name]:g} {verdict}")
    print(json.dumps({name: round(statistics.median(values), 3) for name, values in ratios.items()}))


if __name__ == "__main__":
    main()
