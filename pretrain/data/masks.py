"""Patch masks: exactly the same number of masked patches for each image, seeded by (seed, epoch, sample)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from pretrain.config import BlockMask, RandomMask

MaskConfig = BlockMask | RandomMask


def num_masked(config: MaskConfig, grid: tuple[int, int]) -> int:
    """At least one patch masked and one visible."""
    total = grid[0] * grid[1]
    return min(total - 1, max(1, round(config.ratio * total)))


def check_mask(config: MaskConfig, grid: tuple[int, int]) -> None:
    """Raises InputError for blocks that the grid has no room for: single patches would silently take their place."""
    if isinstance(config, BlockMask) and num_masked(config, grid) < config.min_num_patches:
        raise InputError(
            f"masked_latent.mask: {num_masked(config, grid)} masked patches of a {grid[0]} x {grid[1]} grid leave no "
            f"room for a block of {config.min_num_patches}; lower min_num_patches or raise ratio"
        )


def draw_mask(config: MaskConfig, grid: tuple[int, int], random: np.random.Generator) -> NDArray[np.bool_]:
    """(height * width,) bool, True = masked, with `num_masked` True."""
    wanted = num_masked(config, grid)
    mask = np.zeros(grid, dtype=bool)
    if isinstance(config, BlockMask):
        _add_blocks(mask, wanted, config, random)
    flat = mask.reshape(-1)
    # blocks rarely add up to the exact number: the last few patches are drawn one by one (all of them, if random)
    missing = wanted - int(flat.sum())
    flat[random.choice(np.flatnonzero(~flat), size=missing, replace=False)] = True
    return flat


def _add_blocks(mask: NDArray[np.bool_], wanted: int, config: BlockMask, random: np.random.Generator) -> None:
    """Rectangles of at least `min_num_patches` until no further one fits (BEiT's block-wise masking)."""
    height, width = mask.shape
    log_aspect = np.log(config.min_aspect_ratio)
    for _ in range(100):
        missing = wanted - int(mask.sum())
        if missing < config.min_num_patches:
            return
        area = random.uniform(config.min_num_patches, missing)
        aspect = np.exp(random.uniform(log_aspect, -log_aspect))
        rows, columns = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if rows > height or columns > width or not config.min_num_patches <= rows * columns <= missing:
            continue
        top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
        mask[top : top + rows, left : left + columns] = True
