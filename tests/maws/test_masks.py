"""Masks against loops that do what the papers say, patch by patch."""

import math

import numpy as np
import pytest
import torch

from maws import config
from maws.config import ConfigError, DataConfig
from maws.data.loader import LoadImage, LoadMasked, StepDataset
from maws.data.masks import Masking, make_mask, random_mask, visible_patches
from maws.data.order import Order, Part
from maws.seeding import stream

GRIDS = [(2, 2), (3, 3), (4, 4), (6, 6), (14, 14), (7, 7), (5, 9), (16, 12)]


def draw(masking: Masking, grid: tuple[int, int], seed: int = 0) -> tuple[list[int], list[int]]:
    """The visible and the hidden patches, in their order."""
    masking.check(grid)
    ids, keep = make_mask(masking, np.random.default_rng(seed), grid).tolist(), masking.keep(grid)
    return ids[:keep], ids[keep:]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "masking",
    [Masking(ratio=0.5), Masking("block", 0.5), Masking("block"), Masking("grid"), Masking("unit", 0.6, 2)],
    ids=lambda m: f"{m.kind}-{m.ratio}",
)
def test_every_mask_is_a_permutation_with_the_asked_number_visible_and_a_function_of_its_stream(masking, grid):
    masking.check(grid)
    patches = grid[0] * grid[1]
    expected = {"grid": sum(r % 2 == 0 and c % 2 == 0 for r in range(grid[0]) for c in range(grid[1]))}
    assert masking.keep(grid) == expected.get(masking.kind, int(patches * (1 - masking.ratio)))
    for seed in range(20):
        ids = make_mask(masking, np.random.default_rng(seed), grid)
        assert ids.dtype == np.int64 and sorted(ids.tolist()) == list(range(patches))
        assert np.array_equal(ids, make_mask(masking, np.random.default_rng(seed), grid))
    if masking.kind != "grid" and patches > 10:
        assert len({tuple(make_mask(masking, np.random.default_rng(s), grid)) for s in range(5)}) > 1


def units_by_loops(rng: np.random.Generator, rows: int, cols: int, unit: int) -> list[int]:
    """Recipes §3.2, steps 1 to 4."""
    across, down = math.ceil(cols / unit), math.ceil(rows / unit)
    ids = []
    for u in rng.permutation(across * down):
        column, row = (u % across) * unit, (u // across) * unit
        for column_offset in range(unit):
            for row_offset in range(unit):
                inside = row + row_offset < rows and column + column_offset < cols
                ids.append((row + row_offset) * cols + column + column_offset if inside else None)
    return [int(i) for i in ids if i is not None]


@pytest.mark.parametrize(
    ("grid", "unit"),
    [((6, 4), 1), ((28, 28), 2), ((28, 28), 4), ((7, 7), 2), ((7, 7), 3), ((5, 9), 3), ((9, 5), 4), ((6, 10), 5)],
)
def test_units_are_sampled_jointly_in_the_order_of_long_sequence_mae(grid, unit):
    for seed in range(10):
        ids = make_mask(Masking("unit", unit=unit), np.random.default_rng(seed), grid)
        assert ids.tolist() == units_by_loops(np.random.default_rng(seed), *grid, unit)


@pytest.mark.parametrize(
    ("image", "patch", "unit", "grid", "keep", "units", "whole", "split"),
    [
        (448, 16, 2, 28, 196, 196, 49, 0),
        (448, 16, 4, 28, 196, 49, 12, 4),  # a quarter of the thirteenth unit
        (512, 16, 2, 32, 256, 256, 64, 0),
        (384, 16, 2, 24, 144, 144, 36, 0),
        (320, 16, 2, 20, 100, 100, 25, 0),
        (224, 14, 2, 16, 64, 64, 16, 0),
        (224, 7, 2, 32, 256, 256, 64, 0),
    ],
)
def test_long_sequences_keep_the_patches_and_units_of_the_papers_table(
    image, patch, unit, grid, keep, units, whole, split
):
    assert image // patch == grid
    visible, _ = draw(Masking("unit", 0.75, unit), (grid, grid))
    seen = np.bincount([i // grid // unit * (grid // unit) + i % grid // unit for i in visible], minlength=units)
    assert (len(visible), len(seen)) == (keep, units)
    assert (seen == unit**2).sum() == whole and seen[seen < unit**2].sum() == split


@pytest.mark.parametrize(
    ("grid", "masking", "hidden_units"),
    [
        ((14, 14), Masking("unit", 0.6, 2, whole_units=True), 30),  # SimMIM, 224 px: ceil(49 x 0.6)
        ((12, 12), Masking("unit", 0.6, 2, whole_units=True), 22),  # SimMIM, 192 px: ceil(36 x 0.6)
        ((16, 16), Masking("unit", 0.75, 4, whole_units=True), 12),  # Pixio: 4 of 16 units are seen
        ((16, 16), Masking("unit", 0.75, 4), 12),  # which is a whole number of them either way
        ((6, 4), Masking("unit", 0.5, 2, whole_units=True), 3),
    ],
)
def test_whole_units_are_hidden_or_seen_and_as_many_as_simmim_hides(grid, masking, hidden_units):
    for seed in range(10):
        _, hidden = draw(masking, grid, seed)
        where = np.zeros(grid, int)
        where.flat[hidden] = 1
        sums = [
            int(where[r : r + masking.unit, c : c + masking.unit].sum())
            for r in range(0, grid[0], masking.unit)
            for c in range(0, grid[1], masking.unit)
        ]
        assert set(sums) == {0, masking.unit**2} and sums.count(masking.unit**2) == hidden_units


@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (7, 7), (5, 4), (3, 2)])
def test_the_grid_mask_sees_the_upper_left_patch_of_every_two_by_two_also_of_cut_ones(grid):
    rows, cols = grid
    parts = [
        [r * cols + c for r in range(rows) for c in range(cols) if (r % 2, c % 2) == place]
        for place in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    assert draw(Masking("grid"), grid) == (parts[0], parts[1] + parts[2] + parts[3])


def blocks_by_loops(rng: np.random.Generator, rows: int, cols: int, masked: int) -> tuple[list[int], list[int], int]:
    """BEiT's algorithm on a set of patches; visible and hidden in their order, and how many are in blocks."""
    hidden: set[int] = set()
    smallest = max(1, min(16, int(16 / 196 * rows * cols + 1e-9)))
    while len(hidden) < masked:
        missing, added = masked - len(hidden), set()
        numbers = iter(rng.random(40))
        for _ in range(10):
            area = smallest + (missing - smallest) * next(numbers)
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * next(numbers))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            y, x = next(numbers), next(numbers)
            if w < cols and h < rows:
                top, left = math.floor(y * (rows - h + 1)), math.floor(x * (cols - w + 1))
                block = {r * cols + c for r in range(top, top + h) for c in range(left, left + w)}
                if 0 < len(block - hidden) <= missing:
                    added = block - hidden
                    break
        if not added:
            break
        hidden |= added
    ids = rng.permutation(rows * cols).tolist()
    order = [i for i in ids if i not in hidden] + [i for i in ids if i in hidden]
    return order[: len(ids) - masked], order[len(ids) - masked :], len(hidden)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.75])
def test_block_masks_are_beits(grid, ratio):
    masking = Masking("block", ratio)
    for seed in range(15):
        masked = grid[0] * grid[1] - masking.keep(grid)
        *expected, in_blocks = blocks_by_loops(np.random.default_rng(seed), *grid, masked)
        assert draw(masking, grid, seed) == tuple(expected)
        assert in_blocks <= masked == len(expected[1])


def test_blocks_hide_what_lies_together_and_seldom_need_random_patches():
    def same_neighbours(masking: Masking) -> float:
        """Share of neighbours of which both or none is hidden."""
        shares = []
        for seed in range(60):
            hidden = np.zeros((14, 14), bool)
            hidden.flat[draw(masking, (14, 14), seed)[1]] = True
            shares += [(hidden[1:] == hidden[:-1]).mean(), (hidden[:, 1:] == hidden[:, :-1]).mean()]
        return float(np.mean(shares))

    assert same_neighbours(Masking("block", 0.5)) > 0.8
    assert same_neighbours(Masking("random", 0.5)) < 0.55
    for ratio, most in ((0.5, 0.05), (0.75, 0.1)):
        masked = 196 - visible_patches(196, ratio)
        filled = [masked - blocks_by_loops(np.random.default_rng(s), 14, 14, masked)[2] for s in range(60)]
        assert np.mean(filled) / masked < most


def test_random_and_unit_masks_hide_every_patch_as_often():
    for masking in (Masking(), Masking("unit", 0.75, 2)):
        counts = np.bincount(np.concatenate([draw(masking, (6, 8), s)[0] for s in range(400)]), minlength=48)
        assert counts.min() > 60 and counts.max() < 145  # 100 expected, 5 standard deviations


@pytest.mark.parametrize(
    ("masking", "grid", "message"),
    [
        (Masking("blocks"), (4, 4), r"mask\.kind=blocks is not known; did you mean block\?"),
        (Masking(ratio=0.0), (4, 4), r"mask\.ratio=0\.0 must lie between 0 and 1"),
        (Masking(ratio=1.0), (4, 4), r"mask\.ratio=1\.0 must lie between 0 and 1"),
        (Masking(ratio=float("nan")), (4, 4), r"mask\.ratio=nan must lie between 0 and 1"),
        (Masking(ratio=0.95), (4, 4), r"mask\.ratio=0\.95 leaves 0 of 16 patches visible"),
        (Masking("grid"), (1, 1), r"leaves 1 of 1 patches visible"),
        (Masking("grid", 0.5), (4, 4), r"kind=grid sees one patch of every 2 x 2; set mask\.ratio=0\.75"),
        (Masking("unit", unit=5), (4, 9), r"mask\.unit=5 must be at least 1 and at most 4, the shorter side"),
        (Masking("unit", unit=0), (4, 4), r"mask\.unit=0 must be at least 1"),
        (Masking("unit", unit=2, whole_units=True), (6, 7), r"mask\.unit=2 must divide a grid of 6 x 7 patches"),
        (Masking("unit", 0.9, 2, whole_units=True), (4, 4), r"mask\.ratio=0\.9 leaves 0 of 16 patches visible"),
        (Masking("random", unit=2), (4, 4), r"mean nothing to kind=random; set mask\.kind=unit"),
    ],
)
def test_impossible_masks_are_refused_with_the_way_out(masking, grid, message):
    with pytest.raises(ConfigError, match=message):
        masking.check(grid)
    with pytest.raises(ConfigError, match=message):
        LoadMasked(lambda item: {}, masking, grid, 0)


def test_a_masking_is_a_group_of_settings():
    masking = config.override(Masking(), ["kind=unit", "unit=2", "ratio=0.6", "whole_units=yes"])
    assert config.from_json(Masking, config.to_json(masking)) == Masking("unit", 0.6, 2, True)


@pytest.mark.parametrize("masking", [Masking(), Masking("block", 0.5), Masking("unit", 0.75, 3)], ids=lambda m: m.kind)
def test_masks_belong_to_a_visit_and_not_to_a_rank(shards, masking):
    order = Order(shards, seed=3, batch_size=8, streams=4, resample=False)
    load = LoadMasked(LoadImage(DataConfig(), shards, 3, 32), masking, (4, 4), 3)
    whole = StepDataset(order, Part(), load)[5]
    for rank in range(2):
        batch = StepDataset(order, Part(rank, 2), load)[5]
        for i, key in enumerate(batch["keys"]):
            assert torch.equal(batch["ids_shuffle"][i], whole["ids_shuffle"][whole["keys"].index(key)])
    item = order.items(5)[0]
    again = make_mask(masking, stream(3, "mask", item.epoch, item.key, item.copy), (4, 4))
    assert whole["ids_shuffle"][0].tolist() == again.tolist()
    if masking.kind == "random":
        old = random_mask(stream(3, "mask", item.epoch, item.key, item.copy), 16)  # as runs before had them
        assert again.tolist() == old.tolist()
