"""The benchmark of a step runs, its rival computes our losses and gradients, and its measures measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.padded_form import pad_batch, padded_losses
from benchmarks.side_by_side import bootstrap_interval, in_turns
from benchmarks.step import AT_LEAST, AT_MOST
from benchmarks.step_padded import MAKE_OBJECTIVES, LossCase, loss_reader, make_loss_case, peak_extra_mb
from benchmarks.step_workload import Workload, make_workload
from data_prep.schema import Sample
from pretrain.data.manifest import ShardedDataset

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_IMAGES = 24


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return make_workload(tmp_path_factory.mktemp("step"), num_rows=120)


def make_case(workload: Workload, is_dense: bool) -> LossCase:
    reader = loss_reader(workload.dense if is_dense else workload.as_prepared, NUM_IMAGES)
    return make_loss_case(reader, 0, num_patches=5, width=16)


@pytest.mark.parametrize("is_dense", [False, True])
def test_the_padded_form_has_our_value_and_gradients(workload: Workload, is_dense: bool) -> None:
    case = make_case(workload, is_dense)
    ours = case.ours().item()
    gradients = [case.image_BD.grad, case.patch_BPD.grad, case.scale.grad]
    texts = case.text_RD.grad
    assert case.padded_form().item() == pytest.approx(ours, abs=1e-5)
    for own, rival in zip(gradients, [case.image_BD.grad, case.patch_BPD.grad, case.scale.grad], strict=True):
        assert own is not None and rival is not None and own.abs().max() > 0
        torch.testing.assert_close(own, rival, rtol=1e-4, atol=1e-5)
    # a text's gradient is the sum of its slots'; an empty slot has none
    assert case.text_TD.grad is not None and texts is not None
    summed = torch.zeros(case.batch.num_texts + 1, 16).index_add_(0, case.batch.text_BK.flatten(), case.text_TD.grad)
    torch.testing.assert_close(summed[:-1], texts, rtol=1e-4, atol=1e-5)
    assert summed[-1].abs().max() == 0


def test_the_value_depends_on_what_the_masks_put_right(workload: Workload) -> None:
    case = make_case(workload, is_dense=False)
    ours = case.ours().item()
    terms = {objective.label: objective.aspects for objective in MAKE_OBJECTIVES}
    without_sharing = pad_batch(case.batch, torch.empty(0), terms)
    without_sharing.shared_TB.zero_()
    without_blocks = pad_batch(case.batch, torch.empty(0), terms)
    for blocked_TT in without_blocks.blocked_TT.values():
        blocked_TT.zero_()
    for padded in (without_sharing, without_blocks):
        features = (case.image_BD, case.patch_BPD, case.text_TD, case.scale)
        assert abs(padded_losses(MAKE_OBJECTIVES, padded, *features).item() - ours) > 1e-3


def test_filled_slots_are_new_strings(workload: Workload) -> None:
    before, after = read(workload.as_prepared), read(workload.dense)
    existing = {caption.text for sample in before for caption in sample.captions}
    added = [caption.text for sample in after for caption in sample.captions if caption.origin == "spliced"]
    assert all(len(sample.captions) >= 8 for sample in after) and len(before) == len(after)
    assert len(set(added)) == len(added) and not set(added) & existing


def read(directory: Path) -> list[Sample]:
    data = ShardedDataset(directory)
    return [data.read_sample(position) for position in range(len(data))]


def test_peak_counts_what_is_there_at_once(tmp_path: Path) -> None:
    def one_after_the_other() -> None:
        for _ in range(4):
            torch.ones(1_000_000)

    kept: list[torch.Tensor] = []
    assert peak_extra_mb(one_after_the_other, tmp_path) == pytest.approx(4.0, abs=0.1)
    assert peak_extra_mb(lambda: kept.extend(torch.ones(1_000_000) for _ in range(3)), tmp_path) == pytest.approx(
        12.0, abs=0.1
    )


def test_turns_and_interval() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    rows = in_turns((lambda n: side(f"a{n}"), lambda n: side(f"b{n}"), lambda n: side(f"c{n}")), 2)
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1"] and rows == [(1.0, 2.0, 3.0), (6.0, 4.0, 5.0)]
    low, high = bootstrap_interval([1.0, 1.1, 1.2, 1.3, 5.0])
    assert 1.0 <= low < 1.2 < high <= 5.0 and bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)


def test_the_benchmark_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.step", "--quick"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    figures = {*AT_LEAST, *AT_MOST}
    assert set(result) == {*figures, "valid_captions", "intervals", "dense"}
    assert all(result[key] > 0 for key in AT_LEAST) and set(result["intervals"]) == figures
    assert set(result["dense"]) == set(AT_LEAST) and 4 < result["valid_captions"] < 11
