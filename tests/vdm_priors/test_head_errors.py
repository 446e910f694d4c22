"""Sampling errors of the head metrics against the spread over seeds, and by hand."""

from __future__ import annotations

import pytest
import torch

from tests.vdm_priors.metric_loops import make_grid
from vdm_priors.grid import TokenGrid
from vdm_priors.head_errors import sampling_errors
from vdm_priors.heads import MotionMask, row_statistics, sample_rows, select_heads


def uneven_attention(frames: int, rows: int, columns: int, heads: int) -> tuple[torch.Tensor, TokenGrid]:
    """Rows that differ in sharpness, frames in how much they follow places, heads a little in both."""
    grid = make_grid(frames, rows, columns)
    generator = torch.Generator().manual_seed(0)
    count = grid.num_tokens
    sharpness = 3 * torch.rand(1, count, 1, generator=generator)
    follows = (1 + 0.2 * torch.rand(heads, 1, 1, generator=generator)) * (
        1 + torch.arange(count)[:, None] // (rows * columns) / frames
    )
    logits = sharpness * torch.randn(heads, count, count, generator=generator)
    return (logits + follows * MotionMask()(torch.arange(count), grid)).softmax(-1), grid


def test_sampling_errors_are_the_spread_over_seeds():
    attention, grid = uneven_attention(4, 7, 7, heads=6)
    names = ("dfc", "tcs", "dsr", "score")
    values, errors, selected, exchanged = {n: [] for n in names}, {n: [] for n in names}, [], []
    for seed in range(60):
        rows = sample_rows(grid, 64, seed)
        statistics = row_statistics(attention[:, rows], grid, rows=rows)
        metrics, error = statistics.metrics(), sampling_errors(statistics)
        for name in names:
            values[name].append(metrics.score() if name == "score" else getattr(metrics, name))
            errors[name].append(getattr(error, name))
        selected.append(select_heads(metrics).double())
        exchanged.append(error.exchanged)
    for name in names:
        spread = torch.stack(values[name]).std(dim=0)
        estimate = torch.stack(errors[name]).square().mean(dim=0).sqrt()
        # 60 seeds know the spread to 9%; a small sample's thresholds make the jackknife a little too careful
        assert 0.8 < float((estimate / spread).mean()) < 1.3, name
    selected = torch.stack(selected)
    pairs = torch.einsum("ah,bh->ab", selected, 1 - selected)
    truth = float(pairs.sum() / (60 * 59))
    assert truth > 0.3  # the test would say nothing of heads that never change
    assert sum(exchanged) / 60 == pytest.approx(truth, rel=0.35)


def test_sampling_errors_by_hand():
    """DFC against the jackknife's definition: groups left out, shares given to the frame's other rows."""
    attention, grid = uneven_attention(2, 4, 4, heads=2)
    rows = sample_rows(grid, 6, 3)  # three of each frame's 16
    statistics = row_statistics(attention[:, rows], grid, rows=rows)
    inside, outside = statistics.inside.tolist(), statistics.outside.tolist()
    # with as many groups as rows of a frame, each group is one row of each frame: all ways to pair them are possible
    error = sampling_errors(statistics)
    from itertools import permutations

    candidates = []
    for order in permutations(range(3)):
        for head in range(2):
            deviations = []
            full = sum(inside[head]) / sum(outside[head])
            for g in range(3):
                kept = [i for i in range(6) if i not in (g, 3 + order[g])]
                deviations.append(sum(inside[head][i] for i in kept) / sum(outside[head][i] for i in kept) - full)
            variance = (1 - 3 / 16) * 2 / 3 * sum(d * d for d in deviations)
            candidates.append((head, variance**0.5))
    for head in range(2):
        assert any(error.dfc[head].item() == pytest.approx(value) for h, value in candidates if h == head)


def test_all_rows_have_no_sampling_error_and_too_few_rows_an_unknown_one():
    attention, grid = uneven_attention(3, 3, 3, heads=4)
    everything = sampling_errors(row_statistics(attention, grid))
    assert everything.exchanged == 0
    assert all((getattr(everything, n) == 0).all() for n in ("dfc", "tcs", "dsr", "score"))
    rows = sample_rows(grid, 4, 0)  # a frame with one row
    assert sampling_errors(row_statistics(attention[:, rows], grid, rows=rows)) is None
    rows = sample_rows(grid, 9, 0)
    once, again = (sampling_errors(row_statistics(attention[:, rows], grid, rows=rows)) for _ in range(2))
    assert torch.equal(once.score, again.score) and once.exchanged == again.exchanged
    assert (once.dfc > 0).all()
