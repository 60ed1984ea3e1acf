"""A million rows: planned from simulated facts of a million images, and prepared whole from tiny ones.

    python -m benchmarks.million_rows            # the plan alone: a table of 1,000,000 rows, 1,000,000 distinct images
    python -m benchmarks.million_rows --whole    # also: all stages for 1,000,000 rows over 100,000 tiny JPEGs

The plan reads the real table, then finds exact and near copies by hash, leakage and splits. Its images are facts alone
(hashes drawn at random, copies planted), since no byte of an image matters to it. Times and peak memory are of the
command `dermvlp prepare`, in processes of its own. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.config import PrepareConfig
from data_prep.config_file import load_config
from data_prep.images.scan import FACT_DTYPE, ChunkRecord, options_digest
from data_prep.salt import hash_name

_DERMVLP = "import sys; from pretrain.cli import main; sys.exit(main(sys.argv[1:]))"
_DIAGNOSES = 300
_IMAGES_A_CHUNK = 1000  # the default of PrepareConfig
_IMAGES_A_GROUP = 3
_COPIES = 0.02  # of the images are exact copies of another, and as many near copies


def write_table(path: Path, num_rows: int, num_images: int) -> list[str]:
    """A table in which each image has `num_rows / num_images` captions; returns the images' names."""
    random = np.random.default_rng(0)
    diagnosis = random.zipf(1.3, num_images) % _DIAGNOSES
    names = [f"{image // 1000:04d}/{image:07d}.jpg" for image in range(num_images)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "caption", "diagnosis", "patient", "source"])
        for row in range(num_rows):
            image = row % num_images
            caption = f"Red scaly plaque number {row} on the arm, itching for {row % 50} weeks, treated with cream."
            label = f"disease {diagnosis[image]}"
            writer.writerow([names[image], caption, label, f"P{image // _IMAGES_A_GROUP}", f"source {image % 7}"])
    return names


def write_config(path: Path, out_dir: Path, table: Path, image_dir: Path) -> None:
    columns = "{image: filename, caption: caption, diagnosis: diagnosis, group: patient, source: source}"
    path.write_text(
        f"name: million\nsource: {{kind: table, table_path: {table}, image_dir: {image_dir}, columns: {columns}}}\n"
        f"decomposer: {{kind: none}}\nimages: {{min_side_px: 16}}\nsamples_per_shard: 5000\nout_dir: {out_dir}\n",
        encoding="utf-8",
    )


def write_facts(scan_dir: Path, names: list[str], config_path: Path, salt: str) -> None:
    """What a scan would have left: random hashes, with exact and near copies planted."""
    scan_dir.mkdir(parents=True)
    digest = options_digest(load_config(config_path, [], PrepareConfig).images)
    random = np.random.default_rng(1)
    facts = np.zeros(len(names), dtype=FACT_DTYPE)
    facts["name"] = [hash_name(name, salt) for name in names]
    facts["chunk"] = np.arange(len(names)) // _IMAGES_A_CHUNK
    facts["pixels"] = random.integers(0, 256, (len(names), 32), dtype=np.uint8)
    facts["perceptual"] = random.integers(0, 2**64, (len(names), 4), dtype=np.uint64)
    num_copies = int(_COPIES * len(names))
    exact, near, originals = np.split(random.permutation(len(names))[: 4 * num_copies], [num_copies, 2 * num_copies])
    for field in ("pixels", "perceptual"):
        facts[field][exact] = facts[field][originals[:num_copies]]
    flipped = random.integers(0, 64, (num_copies, 6)).astype(np.uint64)
    hashes: NDArray[np.uint64] = facts["perceptual"][originals[num_copies:]]
    for bit in range(6):
        hashes[:, bit % 4] ^= np.uint64(1) << flipped[:, bit]
    facts["perceptual"][near] = hashes
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "pink").save(buffer, format="JPEG")  # stands for every image on the page of copies
    facts["num_bytes"] = len(buffer.getvalue())
    facts["sha256"] = np.frombuffer(hashlib.sha256(buffer.getvalue()).digest(), dtype=np.uint8)
    for chunk in range(-(-len(names) // _IMAGES_A_CHUNK)):
        (scan_dir / f"chunk-{chunk:06d}.jpegs").write_bytes(buffer.getvalue())
        part = facts[chunk * _IMAGES_A_CHUNK : (chunk + 1) * _IMAGES_A_CHUNK]
        np.save(scan_dir / f"chunk-{chunk:06d}.npy", part, allow_pickle=False)
        record = ChunkRecord(
            inputs_digest="", options_digest=digest, num_images=len(part), num_bytes=0, sha256="", reasons={}
        )
        (scan_dir / f"chunk-{chunk:06d}.json").write_text(record.model_dump_json(), encoding="utf-8")


def write_images(image_dir: Path, names: list[str]) -> None:
    """Tiny JPEGs of random coarse colours."""
    random = np.random.default_rng(2)
    for name in names:
        path = image_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((48, 48), Image.Resampling.BICUBIC).save(path, quality=85)


def run(*arguments: str) -> tuple[float, float]:
    """(seconds, peak GB of the largest of its processes) of one `dermvlp` command."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", _DERMVLP, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"dermvlp {' '.join(arguments)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--images", type=int, default=100_000, help="distinct images of --whole")
    arguments = parser.parse_args()
    os.environ.setdefault("DERMVLP_SALT", hashlib.sha256(b"benchmark").hexdigest())
    results: dict[str, float | int] = {"rows": arguments.rows}
    with tempfile.TemporaryDirectory(prefix="million-") as folder:
        root = Path(folder)
        names = write_table(root / "plan.csv", arguments.rows, arguments.rows)
        write_config(root / "plan.yaml", root / "plan", root / "plan.csv", root)
        write_facts(root / "plan" / "work" / "scan", names, root / "plan.yaml", os.environ["DERMVLP_SALT"])
        seconds, peak_gb = run("prepare", str(root / "plan.yaml"), "--stage", "plan")
        counts = json.loads((root / "plan" / "work" / "plan.json").read_text(encoding="utf-8"))["counts"]
        print(f"{'plan of simulated images':30}{seconds / 60:8.2f} min {peak_gb:8.2f} GB")
        for name, count in counts.items():
            print(f"    {name:50}{count:>10}")
        results |= {"minutes": round(seconds / 60, 2), "peak_gb": round(peak_gb, 2)}
        if arguments.whole:
            names = write_table(root / "whole.csv", arguments.rows, arguments.images)
            write_config(root / "whole.yaml", root / "whole", root / "whole.csv", root / "images")
            write_images(root / "images", names)
            total_s = 0.0
            for stage in ("scan", "plan", "captions", "shards", "merge"):
                seconds, stage_gb = run("prepare", str(root / "whole.yaml"), "--stage", stage)
                print(f"{'whole: ' + stage:30}{seconds / 60:8.2f} min {stage_gb:8.2f} GB")
                total_s, peak_gb = total_s + seconds, max(peak_gb, stage_gb)
            results |= {"whole_minutes": round(total_s / 60, 2), "whole_peak_gb": round(peak_gb, 2)}
    results["benchmark_peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
