"""How fast pictures come out of the reader, beside webdataset and beside bare decoding: `python -m benchmarks.reader`.

    ours         BatchDataset and its DataLoader, two reader processes, as `dermvlp train` runs them
    webdataset   a pipeline as its documentation and open_clip write it, two workers: shards shuffled, a shuffle buffer,
                 decode("pil"), torchvision's RandomResizedCrop and PILToTensor, batched
    our crop     the same pipeline with our decode and crop in the place of those two
    limit        two bare processes that decode and crop, as ours does, JPEG bytes held in memory; nothing is sent

All read the same shards and deliver (the limit: make) uint8 batches of the same crops: a share of the area in [0.6, 1],
bicubic to 224 px, no flips and no colours, no texts. The pipelines extract the pictures alone from the tars. The real
images of DERMVLP_DATA are prepared for it, or synthetic ones where it is not set. The sides are started once and take
turns; before a turn is timed the side delivers what it had prepared while the others ran.

The last line is one JSON object: vs_webdataset and of_limit, our images a second by theirs; vs_our_crop beside it, and
the 95 % bootstrap intervals of the medians over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import open_clip
import torch
import webdataset
from torchvision.transforms import v2

from benchmarks.side_by_side import bootstrap_interval, in_turns
from data_prep.config import PrepareConfig, SyntheticSource
from data_prep.config_file import load_config
from data_prep.prepare import prepare
from pretrain.config import AugmentationConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.data.reader import BatchDataset, ReaderSpec, read_batches
from pretrain.data.tokenize import TextTokenizer
from pretrain.data.transforms import TrainTransform

NUM_WORKERS = 2
PREFETCH = 2  # batches, by each worker
CROP = AugmentationConfig(crop_scale_min=0.6, horizontal_flip=False, vertical_flip=False, color_jitter=0.0)
RATIO = (0.85, 1.18)  # of TrainTransform
BARS = {"vs_webdataset": 1.6, "of_limit": 0.9}


@dataclass(frozen=True)
class Sizes:
    image_px: int = 224
    batch_size: int = 64
    num_batches: int = 24  # timed in a round
    num_rounds: int = 11


QUICK = Sizes(image_px=48, batch_size=8, num_batches=4, num_rounds=2)


def prepare_images(folder: Path, quick: bool) -> tuple[Path, str]:
    """(the prepared training split, what it is)."""
    if "DERMVLP_DATA" in os.environ and not quick:
        overrides = [f"out_dir={folder}", "images.short_side_px=224", "num_workers=2"]
        prepare(load_config("configs/data/derm_images.yaml", overrides, PrepareConfig))
        return folder / "train", "real images of 224 px"
    source = SyntheticSource(num_train=96 if quick else 3000, num_val=24, image_px=48 if quick else 224)
    prepare(PrepareConfig(name="synthetic", source=source, samples_per_shard=48 if quick else 1000, out_dir=folder))
    return folder / "train", "synthetic images"


# ---------------------------------------------------------------------------------------------- the sides


def our_batches(directory: Path, sizes: Sizes) -> Iterator[torch.Tensor]:
    spec = ReaderSpec(
        seed=0,
        global_batch_size=sizes.batch_size,
        shards_per_block=16,
        bucket_edges=(77,),
        aspects_by_term={},
        aspects_read=(),
        diagnoses=None,
        num_parts=1,
        mask=None,
        patch_grid=None,
    )
    tokenizer = TextTokenizer(open_clip.SimpleTokenizer(), 77, pad_id=0, can_trim=True)
    transform = TrainTransform(sizes.image_px, CROP)
    dataset = BatchDataset(ShardedDataset(directory), spec, transform, tokenizer, rank=0, world_size=1)
    return (batch.image_BCHW for batch in read_batches(dataset, 0, 2**40, NUM_WORKERS, PREFETCH))


def webdataset_batches(directory: Path, sizes: Sizes, our_crop: bool) -> Iterator[torch.Tensor]:
    shards = sorted(str(path) for path in directory.glob("shard-*.tar"))
    pipeline = webdataset.WebDataset(
        shards,
        shardshuffle=len(shards),
        workersplitter=webdataset.split_by_worker,
        select_files=lambda name: name.endswith(".jpg"),
        seed=0,
    )
    pipeline = pipeline.repeat().shuffle(1000)
    if our_crop:
        transform = TrainTransform(sizes.image_px, CROP)
        pipeline = pipeline.to_tuple("jpg").map_tuple(lambda jpeg: transform(jpeg, int(torch.randint(2**62, ()))))
    else:
        bicubic = v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(sizes.image_px, (CROP.crop_scale_min, 1.0), RATIO, interpolation=bicubic)
        pipeline = pipeline.decode("pil").to_tuple("jpg").map_tuple(v2.Compose([crop, v2.PILToTensor()]))
    batched = pipeline.batched(sizes.batch_size, partial=False)
    loader = webdataset.WebLoader(batched, batch_size=None, num_workers=NUM_WORKERS, prefetch_factor=PREFETCH)
    return (images for (images,) in loader)


class Loader:
    """A stream of batches from worker processes, timed while it runs."""

    def __init__(self, batches: Iterator[torch.Tensor], sizes: Sizes) -> None:
        self._batches, self._sizes = batches, sizes
        for _ in range(2 * NUM_WORKERS * PREFETCH):  # the processes are up and their caches warm
            self._next()

    def _next(self) -> None:
        images = next(self._batches)
        px = self._sizes.image_px
        assert images.dtype == torch.uint8 and images.shape == (self._sizes.batch_size, 3, px, px)

    def images_per_s(self, number: int) -> float:
        for _ in range(NUM_WORKERS * PREFETCH):  # prepared since the last turn
            self._next()
        began_at = time.perf_counter()
        for _ in range(self._sizes.num_batches):
            self._next()
        elapsed_s = time.perf_counter() - began_at
        time.sleep(1.5 * elapsed_s * NUM_WORKERS * PREFETCH / self._sizes.num_batches)  # it prepares the next ones
        return self._sizes.num_batches * self._sizes.batch_size / elapsed_s


class Limit:
    """Bare processes that decode and crop; each holds an equal part of the JPEGs in memory."""

    def __init__(self, directory: Path, sizes: Sizes) -> None:
        context = multiprocessing.get_context("forkserver")
        self._num_images = sizes.num_batches * sizes.batch_size // NUM_WORKERS
        self._ends: list[Connection] = []
        for worker in range(NUM_WORKERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_decode_on_demand, args=(directory, sizes, worker, theirs), daemon=True)
            process.start()
            self._ends.append(ours)
        self._ask(sizes.batch_size)

    def _ask(self, num_images: int) -> None:
        for end in self._ends:
            end.send(num_images)
        for end in self._ends:
            end.recv()

    def images_per_s(self, number: int) -> float:
        began_at = time.perf_counter()
        self._ask(self._num_images)
        return self._num_images * NUM_WORKERS / (time.perf_counter() - began_at)


def _decode_on_demand(directory: Path, sizes: Sizes, worker: int, orders: Connection) -> None:
    torch.set_num_threads(1)
    data = ShardedDataset(directory)
    jpegs = [data.read_image(position) for position in range(worker, len(data), NUM_WORKERS)]
    transform, seed = TrainTransform(sizes.image_px, CROP), 0
    with contextlib.suppress(EOFError):  # the end of the benchmark
        while True:
            for _ in range(orders.recv()):
                transform(jpegs[seed % len(jpegs)], seed)
                seed += 1
            orders.send(True)


# ---------------------------------------------------------------------------------------------- the table


def run(directory: Path, sizes: Sizes) -> dict[str, list[float]]:
    """Images a second by side, a value a round."""
    sides: dict[str, Callable[[int], float]] = {
        "ours": Loader(our_batches(directory, sizes), sizes).images_per_s,
        "webdataset": Loader(webdataset_batches(directory, sizes, our_crop=False), sizes).images_per_s,
        "our crop": Loader(webdataset_batches(directory, sizes, our_crop=True), sizes).images_per_s,
        "limit": Limit(directory, sizes).images_per_s,
    }
    rows = in_turns(list(sides.values()), sizes.num_rounds)
    return {name: [row[column] for row in rows] for column, name in enumerate(sides)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reader", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few small images: whether it runs, not how fast")
    parser.add_argument("--num-rounds", type=int)
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else Sizes()
    if arguments.num_rounds is not None:
        sizes = Sizes(sizes.image_px, sizes.batch_size, sizes.num_batches, arguments.num_rounds)
    with tempfile.TemporaryDirectory() as name:
        directory, about = prepare_images(Path(name) / "images", arguments.quick)
        load_before = os.getloadavg()[0]
        rates = run(directory, sizes)
    print(f"{about}, batches of {sizes.batch_size} at {sizes.image_px} px, {sizes.num_rounds} rounds of ", end="")
    print(f"{sizes.num_batches} batches, {os.cpu_count()} cores, load {load_before:.1f} before")
    for side, values in rates.items():
        print(f"{side:12} {statistics.median(values):8.0f} images/s")
    result: dict[str, Any] = {"intervals": {}}
    for key, rival in (("vs_webdataset", "webdataset"), ("of_limit", "limit"), ("vs_our_crop", "our crop")):
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates[rival], strict=True)]
        low, high = bootstrap_interval(ratios)
        result[key] = round(statistics.median(ratios), 3)
        result["intervals"][key] = [round(low, 3), round(high, 3)]
        bar = f"bar >= {BARS[key]:g} {'met' if high >= BARS[key] else 'missed'}" if key in BARS else ""
        print(f"{key:14} {result[key]:6.3f}  [{low:.3f}, {high:.3f}]  {bar}")
    if arguments.quick:
        print("--quick: these rates mean nothing")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
