"""Schedules against published numbers and slow definitions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from speedrl_lab.schedules import halton_order, piecewise_linear, reveal_counts, shifted_orders

GRIDS = [(1, 1), (1, 7), (5, 3), (6, 10), (13, 8)]


def radical_inverse(index: int, base: int) -> Fraction:
    value, scale = Fraction(0), Fraction(1, base)
    while index:
        value, index, scale = value + index % base * scale, index // base, scale / base
    return value


@pytest.mark.parametrize("n", [8, 16, 24, 32, 64])
def test_halton_order_equals_the_golden_positions(n):
    golden = np.load(GOLDEN / "halton_positions.npz", allow_pickle=False)
    assert halton_order(n, n).tolist() == golden[f"order_{n}"].tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_halton_order_follows_its_definition_on_any_grid(grid):
    rows, columns = grid
    expected, index = [], 0
    while len(expected) < rows * columns:
        index += 1
        cell = int(rows * radical_inverse(index, 2)) * columns + int(columns * radical_inverse(index, 3))
        if cell not in expected:
            expected.append(cell)
    order = halton_order(rows, columns)
    assert order.tolist() == expected and order.dtype == torch.int64
    assert sorted(expected) == list(range(rows * columns))


def test_halton_order_refuses_an_empty_grid():
    with pytest.raises(ValueError, match="0x3: expected at least 1x1"):
        halton_order(0, 3)


@pytest.mark.parametrize(
    "steps, counts",
    [
        (4, [78, 222, 333, 391]),
        (8, [20, 58, 95, 127, 156, 177, 192, 199]),
        (12, [9, 26, 43, 60, 74, 88, 101, 112, 120, 126, 132, 133]),
    ],
)
def test_cosine_counts_are_the_published_ones(steps, counts):
    assert reveal_counts(1024, steps, "cosine").tolist() == counts


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [4, 8, 12])
def test_counts_leave_the_masks_of_the_golden_sampler(schedule, steps):
    golden = np.load(GOLDEN / "scheduler_tiny.npz", allow_pickle=False)
    left = 64 - reveal_counts(64, steps, schedule).cumsum(0)
    assert left.tolist() == golden[f"masks_left_{schedule}_T{steps}"][:, 0].tolist()


def test_power_counts_reveal_few_tokens_first():
    assert reveal_counts(64, 2, "power", 3.0).tolist() == [8, 56]
    assert reveal_counts(64, 4, "power", 1.0).tolist() == [16, 16, 16, 16]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "arccos", "power"])
@pytest.mark.parametrize("num_tokens", [1, 4, 64, 100])
def test_counts_reveal_everything_and_never_nothing(schedule, num_tokens):
    for steps in range(1, num_tokens + 1):
        counts = reveal_counts(num_tokens, steps, schedule)
        assert len(counts) == steps and counts.dtype == torch.int64
        assert int(counts.sum()) == num_tokens and int(counts.min()) >= 1


@pytest.mark.parametrize("steps, nearest", [(0, 1), (-3, 1), (65, 64)])
def test_impossible_steps_name_the_nearest_possible(steps, nearest):
    with pytest.raises(ValueError, match=rf"steps={steps}: expected 1 to 64 .*nearest: {nearest}$"):
        reveal_counts(64, steps)


def test_schedules_without_fixed_counts_are_refused():
    with pytest.raises(ValueError, match="'paced' has no fixed counts"):
        reveal_counts(64, 4, "paced")


@pytest.mark.parametrize("grid", [(8, 8), (3, 5)])
def test_shifted_orders_equal_a_slow_loop(grid):
    rows, columns = grid
    order = halton_order(rows, columns)
    uniforms = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    shifted = shifted_orders(order, grid, uniforms)
    for line, (down, right, flip_rows, flip_columns) in zip(shifted.tolist(), uniforms.tolist(), strict=True):
        expected = []
        for cell in order.tolist():
            row = (cell // columns + int(down * rows)) % rows
            column = (cell % columns + int(right * columns)) % columns
            row = rows - 1 - row if flip_rows < 0.5 else row
            column = columns - 1 - column if flip_columns < 0.5 else column
            expected.append(row * columns + column)
        assert line == expected
        assert sorted(line) == list(range(rows * columns))


def test_shifted_orders_cover_every_shift_and_flip_evenly():
    uniforms = torch.rand(4000, 4, generator=torch.Generator().manual_seed(1))
    shifted = shifted_orders(halton_order(8, 8), (8, 8), uniforms)
    assert len(shifted.unique(dim=0)) == 8 * 8 * 4
    first = torch.bincount(shifted[:, 0], minlength=64).double()
    assert float(((first - 62.5).square() / 62.5).sum()) < 110  # chi-square, 63 degrees: p < 0.001


def test_piecewise_linear_equals_numpy():
    points = [[3, 0.5], [10, -1.0], [11, 4.0], [40, 4.0]]  # lists, as a config file gives them
    for iteration in range(-2, 60):
        expected = np.interp(iteration, *zip(*points, strict=True))
        assert piecewise_linear(points, iteration) == pytest.approx(expected, abs=1e-12)
    assert [piecewise_linear(points, i) for i in (-5, 3, 10, 11, 99)] == [0.5, 0.5, -1.0, 4.0, 4.0]


def test_one_point_is_a_constant():
    assert [piecewise_linear([(5, 2)], iteration) for iteration in (0, 5, 9)] == [2.0, 2.0, 2.0]


def test_points_must_exist_and_increase():
    with pytest.raises(ValueError, match=r"points=\[\]: expected at least one"):
        piecewise_linear([], 3)
    for second in (2, 5):  # caught at any iteration, not only where it would matter
        with pytest.raises(ValueError, match=rf"iterations 0, 5, {second}: expected iterations that increase"):
            piecewise_linear([(0, 1.0), (5, 2.0), (second, 3.0)], 0)


@pytest.mark.parametrize("side", [16, 24, 32, 64])
@pytest.mark.parametrize("steps", [4, 8, 16, 32])
def test_the_arccos_schedule_reveals_what_the_published_halton_sampler_does(side, steps):
    known = np.load(GOLDEN / "halton_positions.npz")[f"known_{side}_T{steps}"]
    counts = reveal_counts(side * side, steps, "arccos")
    assert counts.cumsum(0).tolist() == known.tolist()
