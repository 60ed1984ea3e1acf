"""Masks: the exact number for every image, seeded, and blocks that are blocks."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pretrain.config import BlockMask, RandomMask
from pretrain.data.masks import MaskConfig, _add_blocks, draw_mask, num_masked
from pretrain.data.plan import generator

GRIDS = [(4, 4), (8, 8), (14, 14), (16, 16), (3, 7)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "config", [BlockMask(), BlockMask(ratio=0.75), RandomMask(ratio=0.4), RandomMask(ratio=0.9)], ids=str
)
def test_every_image_has_exactly_the_ratio_masked(config: MaskConfig, grid: tuple[int, int]) -> None:
    total = grid[0] * grid[1]
    wanted = num_masked(config, grid)
    assert abs(wanted - config.ratio * total) <= 0.5
    for sample in range(200):
        mask = draw_mask(config, grid, generator(9, sample))
        assert mask.shape == (total,) and mask.dtype == bool and mask.sum() == wanted


@pytest.mark.parametrize("config", [BlockMask(), RandomMask()], ids=str)
def test_masks_follow_from_the_seed(config: MaskConfig) -> None:
    again = [draw_mask(config, (14, 14), generator(1, 2)) for _ in range(2)]
    assert np.array_equal(again[0], again[1])
    different = {draw_mask(config, (14, 14), generator(1, sample)).tobytes() for sample in range(50)}
    assert len(different) == 50


def test_extreme_ratios_leave_one_patch_on_each_side() -> None:
    assert num_masked(RandomMask(ratio=0.001), (4, 4)) == 1
    assert num_masked(RandomMask(ratio=0.999), (4, 4)) == 15


def is_rectangle(mask: NDArray[np.bool_]) -> bool:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return bool(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())


def test_the_first_block_is_a_rectangle_of_the_least_size_and_within_the_aspect() -> None:
    """Where the wanted number leaves no room for a second block, what is added is one rectangle."""
    config = BlockMask(min_num_patches=16)
    sizes = set()
    for sample in range(300):
        mask = np.zeros((14, 14), dtype=bool)
        _add_blocks(mask, 30, config, generator(2, sample))
        assert is_rectangle(mask) and 16 <= mask.sum() <= 30
        height, width = mask.any(1).sum(), mask.any(0).sum()
        # sides are rounded to whole patches, so the aspect may leave its range by half a patch a side
        assert (height + 0.5) / (width - 0.5) >= 0.3 and (width + 0.5) / (height - 0.5) >= 0.3
        sizes.add((int(height), int(width)))
    assert len(sizes) > 10


def num_neighbours(mask: NDArray[np.bool_]) -> float:
    """Masked among the four neighbours of a masked patch, on average."""
    padded = np.pad(mask, 1).astype(int)
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return float(around[mask].mean())


def test_blocks_hang_together_and_random_patches_do_not() -> None:
    blocks, scattered = (
        np.mean([num_neighbours(draw_mask(config, (14, 14), generator(3, s)).reshape(14, 14)) for s in range(100)])
        for config in (BlockMask(ratio=0.4), RandomMask(ratio=0.4))
    )
    assert scattered == pytest.approx(4 * 0.4 * 13 / 14, abs=0.1)  # of 4 neighbours, 1/14 fewer at the border
    assert blocks > 2.6


def test_random_masks_favour_no_patch() -> None:
    mean = np.mean([draw_mask(RandomMask(ratio=0.5), (4, 4), generator(4, s)) for s in range(2000)], axis=0)
    assert np.abs(mean - 0.5).max() < 0.05  # 4.5 standard errors
