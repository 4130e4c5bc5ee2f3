"""Pure functions: how many positions each step reveals, in which order; and what moves with the iteration."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def reveal_counts(num_tokens: int, steps: int, schedule: str = "cosine", power: float = 3.0) -> Tensor:
    """How many positions each step reveals: int64 (T,), every entry at least 1, sum N.

    The share known after step i is f((i+1)/T): cosine 1 - cos(pi r/2) (MaskGIT), linear r,
    power r**power, arccos 1 - arccos(r) / (pi/2) (Halton-MaskGIT, arXiv 2503.17076). Cosine and arccos round in
    float32 as published samplers do.
    Raises ValueError for steps outside 1..N or an unknown schedule.
    """
    if not 1 <= steps <= num_tokens:
        closest = min(max(steps, 1), num_tokens)
        raise ValueError(f"steps={steps}: expected 1 to {num_tokens} (one token a step); nearest: {closest}")
    ratio = torch.arange(1, steps + 1, dtype=torch.float32) / steps
    match schedule:
        case "cosine":
            known = num_tokens - (num_tokens * torch.cos(ratio * math.pi / 2)).floor()
        case "linear":
            known = num_tokens - (num_tokens * (1 - ratio)).floor()
        case "arccos":
            known = (num_tokens * (1 - ratio.arccos() / (math.pi / 2))).floor()
        case "power":
            known = (num_tokens * ratio**power).round()
        case _:
            raise ValueError(f"schedule={schedule!r} has no fixed counts; expected cosine, linear, arccos or power")
    index = torch.arange(1, steps + 1)
    known = known.long().maximum(index).minimum(num_tokens - (steps - index))
    known[-1] = num_tokens
    return torch.diff(known, prepend=torch.zeros(1, dtype=torch.int64))


def _radical_inverse(index: int, base: int) -> tuple[int, int]:
    """Numerator and denominator of the van der Corput number of `index`; exact."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator, denominator


def halton_order(rows: int, columns: int) -> Tensor:
    """The Halton order of a grid: int64 (N,) raster indices, base 2 for rows, base 3 for columns.

    Points run until every cell is hit, so that no position is forgotten on large grids
    (Besnier et al., arXiv 2503.17076).
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"grid {rows}x{columns}: expected at least 1x1")
    order: dict[int, None] = {}
    index = 0
    while len(order) < rows * columns:
        index += 1
        up, up_base = _radical_inverse(index, 2)
        across, across_base = _radical_inverse(index, 3)
        order.setdefault(rows * up // up_base * columns + columns * across // across_base)
    return torch.tensor(list(order))


def shifted_orders(order: Tensor, grid: tuple[int, int], uniforms: Tensor) -> Tensor:
    """Shift an order (N,) on the torus and flip it, one random way a row: (B, N) from uniforms (B, 4)."""
    rows, columns = grid
    down = (uniforms[:, :1] * rows).long()
    right = (uniforms[:, 1:2] * columns).long()
    row = (order // columns + down) % rows  # (B, N)
    column = (order % columns + right) % columns
    row = torch.where(uniforms[:, 2:3] < 0.5, rows - 1 - row, row)
    column = torch.where(uniforms[:, 3:] < 0.5, columns - 1 - column, column)
    return row * columns + column


def piecewise_linear(points: Sequence[tuple[int, float]], iteration: int) -> float:
    """Value at `iteration` of the line through (iteration, value) points, constant before and after them.

    Raises ValueError for no points, or points whose iterations do not increase.
    """
    if not points:
        raise ValueError("points=[]: expected at least one [iteration, value]")
    places = [place for place, _ in points]
    if any(after <= before for before, after in pairwise(places)):
        raise ValueError(f"points at iterations {', '.join(map(str, places))}: expected iterations that increase")
    if iteration <= places[0]:
        return float(points[0][1])
    for (left, low), (right, high) in pairwise(points):
        if iteration <= right:
            return low + (high - low) * (iteration - left) / (right - left)
    return float(points[-1][1])
