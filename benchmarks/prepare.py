"""Preparation of images, beside the bare sum of its parts and beside img2dataset: `python -m benchmarks.prepare`.

    parts         read, one full decode, SHA-256 of the pixels, perceptual hash, and nothing else
    dermvlp       `prepare`: scan, copies, splits, shards, manifest, report; no sub-captions, which are no image work
    img2dataset   `download` of file:// addresses to WebDataset tars, in an environment of its own

Two cases. small: JPEGs of 224 px, which all but img2dataset's resizing keep without encoding them anew. photos: JPEGs
of 1600 x 1200 px, reduced to a short side of 224 px. All have two worker processes, pieces of equal size, files in the
page cache, and take turns. Each run is a process of its own, timed from the call on: the interpreter's start and its
imports are in none, the start of worker processes is in parts and dermvlp. img2dataset is timed from its first
worker's start of work to its last one's end, which is without the start of its workers (`vs_img2dataset_whole`: with
it). It computes no hash, reads no EXIF, finds no copies and makes no splits here; its number of threads is the best of
a trial.

The last line is one JSON object. `vs_parts`: small, dermvlp's rate by that of the parts. `vs_img2dataset`: photos,
dermvlp's rate by img2dataset's. `vs_img2dataset_kept`: small, img2dataset decoding but not encoding. Ratios are medians
over the rounds. With `--profile` where dermvlp's time goes, in one process.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import io
import json
import pstats
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagehash
from PIL import Image

from benchmarks import img2dataset_env
from benchmarks.pictures import PHOTO_SIZE, write_pictures
from benchmarks.side_by_side import by_turns, median_ratio
from data_prep import pool
from data_prep.config import NoDecomposer, PrepareConfig, TableColumns, TableSource
from data_prep.prepare import prepare

_NUM_PIECES = 16  # of either side's work: enough for two workers to end together
_SHORT_SIDE_PX = 224
_REPOSITORY = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------- the sides


def bare_parts(paths: list[Path]) -> int:
    """In a worker process: the parts of each image; returns how many there were."""
    for path in paths:
        image = Image.open(io.BytesIO(path.read_bytes()))
        image.load()
        hashlib.sha256(image.tobytes()).digest()
        imagehash.phash(image, hash_size=16)
    return len(paths)


def run_parts(picture_dir: Path) -> float:
    """Seconds."""
    paths = sorted(picture_dir.glob("*.jpg"))
    size = -(-len(paths) // _NUM_PIECES)
    start_s = time.perf_counter()
    num_done = sum(pool.run(bare_parts, (paths[at : at + size] for at in range(0, len(paths), size)), num_workers=2))
    elapsed_s = time.perf_counter() - start_s
    assert num_done == len(paths)
    return elapsed_s


def config_for(picture_dir: Path, out_dir: Path, num_workers: int) -> PrepareConfig:
    size = -(-sum(1 for _ in picture_dir.glob("*.jpg")) // _NUM_PIECES)
    return PrepareConfig(
        name="benchmark",
        source=TableSource(
            table_path=picture_dir / "table.csv",
            image_dir=picture_dir,
            columns=TableColumns(image="filename", caption="caption", diagnosis="diagnosis"),
        ),
        decomposer=NoDecomposer(),
        samples_per_shard=size,
        images_per_chunk=size,
        num_workers=num_workers,
        out_dir=out_dir,
    )


def run_dermvlp(picture_dir: Path, out_dir: Path) -> float:
    """Seconds. Every picture must have become a sample."""
    config = config_for(picture_dir, out_dir, num_workers=2)
    start_s = time.perf_counter()
    manifests = prepare(config)
    elapsed_s = time.perf_counter() - start_s
    num_pictures = sum(1 for _ in picture_dir.glob("*.jpg"))
    assert sum(manifest.num_samples for manifest in manifests.values()) == num_pictures, "rows were rejected"
    return elapsed_s


def _in_a_process(*arguments: str) -> float:
    """This module's `--side`, in a new interpreter."""
    # not -m: every worker process would import this module as its __main__, in both sides' time
    command = [sys.executable, "-c", "from benchmarks.prepare import main; main()", *arguments]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stderr[-3000:]}")
    return float(done.stdout.strip().splitlines()[-1])


class Case:
    """Pictures of one kind, and each side's rate on them in images per second."""

    def __init__(self, name: str, directory: Path, num_pictures: int, *, photos: bool) -> None:
        self.name, self.num_pictures = name, num_pictures
        self._picture_dir, self._out_dir = directory / name, directory / f"{name}-out"
        paths, self.mean_kb = write_pictures(self._picture_dir, num_pictures, photos=photos)
        for path in paths:
            path.read_bytes()  # into the page cache
        self._img2dataset_arguments: dict[str, Any] = {
            "resize_mode": "keep_ratio" if photos else "no",
            "resize_only_if_bigger": True,
            "skip_reencode": True,
            "thread_count": 1,
        }
        self.whole_rates: list[float] = []  # img2dataset's, with the start of its workers

    def parts(self) -> float:
        return self.num_pictures / _in_a_process("--side", "parts", str(self._picture_dir))

    def dermvlp(self) -> float:
        elapsed_s = _in_a_process("--side", "dermvlp", str(self._picture_dir), str(self._out_dir))
        self._check_size(next((self._out_dir / "train").glob("*.tar")))
        return self.num_pictures / elapsed_s

    def img2dataset(self) -> float:
        arguments = self._img2dataset_arguments | {
            "url_list": str(self._picture_dir / "table.csv"),
            "input_format": "csv",
            "caption_col": "caption",
            "output_format": "webdataset",
            "output_folder": str(self._out_dir),
            "image_size": _SHORT_SIDE_PX,
            "encode_quality": 92,  # as ours
            "processes_count": 2,
            "number_sample_per_shard": -(-self.num_pictures // _NUM_PIECES),
            "extract_exif": False,
            "compute_hash": None,
        }
        script = Path(__file__).with_name("img2dataset_run.py")
        command = [str(img2dataset_env.python_path()), str(script), json.dumps(arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=img2dataset_env.ENVIRONMENT)
        if done.returncode != 0:
            raise SystemExit(f"img2dataset:\n{done.stderr[-3000:]}")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        assert result["num_images"] == self.num_pictures, f"img2dataset wrote {result['num_images']} images"
        self._check_size(next(self._out_dir.glob("*.tar")))
        self.whole_rates.append(self.num_pictures / result["whole_s"])
        return float(self.num_pictures / result["work_s"])

    def tune_img2dataset(self, num_threads: tuple[int, ...]) -> int:
        """The number of its download threads that is fastest here."""
        rates: dict[int, float] = {}
        for number in num_threads:
            self._img2dataset_arguments["thread_count"] = number
            rates[number] = self.img2dataset()
        best = max(rates, key=rates.__getitem__)
        self._img2dataset_arguments["thread_count"] = best
        self.whole_rates.clear()
        return best

    def _check_size(self, tar_path: Path) -> None:
        """Both sides must write pictures of the same size. Removes the output."""
        with tarfile.open(tar_path) as tar:
            member = next(member for member in tar if member.name.endswith(".jpg"))
            file = tar.extractfile(member)
            assert file is not None
            size = Image.open(file).size
        shutil.rmtree(self._out_dir)
        assert min(size) == _SHORT_SIDE_PX, size
        wanted = max(PHOTO_SIZE) * _SHORT_SIDE_PX / min(PHOTO_SIZE) if "photo" in self.name else _SHORT_SIDE_PX
        assert abs(max(size) - wanted) < 1.01, size


# ---------------------------------------------------------------------------------------------- command


def _row(case: Case, names: tuple[str, str], pairs: list[tuple[float, float]], bar: str) -> None:
    middle = [statistics.median(side) for side in zip(*pairs, strict=True)]
    print(
        f"{case.name:8} {case.num_pictures:6}  {names[1]:8} {middle[1]:7.0f}/s  {names[0]:12} {middle[0]:7.0f}/s  "
        f"ratio {median_ratio(pairs):5.2f}  ({', '.join(f'{b / a:.2f}' for a, b in pairs)})  {bar}",
        flush=True,
    )


def compare(directory: Path, num_small: int, num_photos: int, num_rounds: int) -> dict[str, object]:
    small = Case("small", directory, num_small, photos=False)
    photos = Case("photos", directory, num_photos, photos=True)
    num_threads = {case.name: case.tune_img2dataset((1, 2, 8)) for case in (small, photos)}
    print(
        f"small: {num_small} JPEGs of {_SHORT_SIDE_PX} px, {small.mean_kb:.0f} kB; photos: {num_photos} JPEGs of "
        f"{PHOTO_SIZE[0]} x {PHOTO_SIZE[1]} px, {photos.mean_kb:.0f} kB; images per second, two worker processes; "
        f"img2dataset's threads: {num_threads}"
    )

    def turns(case: Case, other: Callable[[], float], name: str, bar: str) -> list[tuple[float, float]]:
        pairs = by_turns(other, case.dermvlp, num_rounds)
        _row(case, (name, "dermvlp"), pairs, bar)
        return pairs

    by_parts = turns(small, small.parts, "parts", "bar 0.8")
    by_peer = turns(photos, photos.img2dataset, "img2dataset", "bar 2")
    kept = turns(small, small.img2dataset, "img2dataset", "kept without encoding, by both")
    whole = statistics.median(photos.whole_rates)
    return {
        "vs_parts": round(median_ratio(by_parts), 3),
        "vs_img2dataset": round(median_ratio(by_peer), 3),
        "vs_img2dataset_kept": round(median_ratio(kept), 3),
        "vs_img2dataset_whole": round(statistics.median(ours for _, ours in by_peer) / whole, 3),
        "small_per_s": round(statistics.median(ours for _, ours in by_parts)),
        "photos_per_s": round(statistics.median(ours for _, ours in by_peer)),
        "num_small": num_small,
        "num_photos": num_photos,
    }


def profile(directory: Path, num_small: int, num_photos: int) -> None:
    """Where the time goes: every piece of work in this process, so that the profiler sees it."""
    pool.run = _in_this_process
    for name, num_pictures in (("small", num_small), ("photos", num_photos)):
        write_pictures(directory / name, num_pictures, photos=name == "photos")
        profiler = cProfile.Profile()
        config = config_for(directory / name, directory / f"{name}-out", num_workers=1)
        profiler.runcall(prepare, config)
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).sort_stats("cumulative").print_stats(70)
        pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(40)
        print(f"{name}\n{text.getvalue()}")


def _in_this_process(function: Callable[[Any], Any], pieces: Any, num_workers: int) -> Any:
    return map(function, pieces)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=__doc__.partition("\n")[0])
    parser.add_argument("--num", type=int, default=8000, help="small JPEGs; a quarter as many photos")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a quarter of the images, two rounds")
    parser.add_argument("--profile", action="store_true", help="where dermvlp's time goes, instead of the comparison")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)  # what a process of its own does
    arguments = parser.parse_args()
    if arguments.side:
        side, *paths = arguments.side
        print(run_parts(Path(paths[0])) if side == "parts" else run_dermvlp(Path(paths[0]), Path(paths[1])))
        return
    num_small = arguments.num // 4 if arguments.quick else arguments.num
    with tempfile.TemporaryDirectory(prefix="dermvlp-benchmark-") as directory:
        if arguments.profile:
            profile(Path(directory), num_small, num_small // 4)
            return
        figures = compare(Path(directory), num_small, num_small // 4, 2 if arguments.quick else arguments.rounds)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
