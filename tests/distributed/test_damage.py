"""Ranks replace damaged samples alike, learn of them one step ahead, and end together when there are too many."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from pretrain.data.reader import BatchDataset
from pretrain.distributed import comm
from pretrain.train.agreement import Agreement, SharedInputError
from pretrain.train.damage import Damage
from tests.distributed.run import run_on_ranks
from tests.unit.pretrain.test_damage import damage_images
from tests.unit.pretrain.test_reader import reader, token_rows


def two_runs(directory: Path, run_dirs: tuple[Path, Path]) -> list[dict[str, object]]:
    return [train_through(directory, run_dir, f, 8) for run_dir, f in zip(run_dirs, (0.01, 0.0003), strict=True)]


def train_through(directory: Path, run_dir: Path, max_fraction: float, num_steps: int) -> dict[str, object]:
    """What a rank of the loop does with its batches, without the steps."""
    dataset: BatchDataset = reader(directory, comm.rank(), comm.world_size())
    damage, agreement = Damage(dataset, run_dir, max_fraction), Agreement()
    samples, texts, agreed, rows = [], [], [], []
    try:
        for step in range(num_steps):
            batch = dataset[step]
            agreement.start(False, False, len(batch.damaged))
            agreed.append(agreement.read().num_damaged)
            batch = damage.replaced(batch, step) if agreed[-1] else batch
            samples.append(batch.sample_B)
            texts.append(batch.text_NK)
            rows.append([row.tolist() for row in token_rows([batch])] if comm.world_size() == 1 else batch.packed)
    except SharedInputError as error:
        return {"error": str(error), "step": step}
    own = [[len(part.order_R) for part in packed] for packed in rows] if comm.world_size() > 1 else []
    return {"samples": samples, "texts": texts, "agreed": agreed, "num_own_texts": own}


def test_two_ranks_do_what_one_does(prepared_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(prepared_dir / "train", tmp_path / "train"))
    order = reader(directory).order(0)
    damage_images(directory, order[[1, 2, 8, 30, 59]])  # both ranks' in step 1; then the second's, the second's
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    one = train_through(directory, tmp_path / "one", 0.01, 8)
    by_rank = run_on_ranks(two_runs, 2, directory, (tmp_path / "two", tmp_path / "three"), timeout_s=200)
    two, ended = ([runs[which] for runs in by_rank] for which in (0, 1))
    assert [rank["agreed"] for rank in two] == [one["agreed"]] * 2 == [[3, 0, 1, 0, 1, 0, 0, 0]] * 2
    for step in range(8):
        together = torch.cat([rank["samples"][step] for rank in two])
        assert torch.equal(together, one["samples"][step])
        assert all(torch.equal(rank["texts"][step], one["texts"][step]) for rank in two)
        num_texts = int(one["texts"][step].max())  # the largest is the empty slot, U
        assert sum(sum(rank["num_own_texts"][step]) for rank in two) == num_texts
        assert not np.isin(together.numpy(), order[[1, 2, 8, 30, 59]]).any()
    ledgers = [(tmp_path / name / "damaged.jsonl").read_text() for name in ("one", "two")]
    assert ledgers[0] == ledgers[1] and ledgers[0].count("\n") == 5
    # and past the limit both end in the same step, with the same words
    assert ended[0] == ended[1] and ended[0]["step"] == 2 and "4 of 36 samples seen are damaged" in ended[0]["error"]
