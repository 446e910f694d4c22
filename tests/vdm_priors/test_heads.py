"""Head metrics against plain loops over the paper's definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vdm_priors.metric_loops import assert_metrics, in_mask, make_grid, metrics_by_loops
from vdm_priors.errors import ModelError
from vdm_priors.heads import BandMask, HeadAccumulator, HeadMetrics, MotionMask, head_metrics, sample_rows, select_heads

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 3)).filter(
    lambda shape: shape[1] * shape[2] > 4  # so that something lies outside a radius of 1
)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), shapes, st.integers(0, 1), *[st.booleans()] * 3)
def test_metrics_are_the_papers(seed, shape, radius, own_frame, sampled, holes):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(shape, dtype=torch.bool)
    if holes:
        valid = torch.rand(shape, generator=generator) > 0.2
        valid[0, 0, 0] = valid[0, -1, -1] = True
    grid = make_grid(*shape, valid)
    count = grid.num_tokens
    rows = torch.arange(count)
    if sampled:
        rows = torch.randperm(count, generator=generator)[: max(1, count // 2)].sort().values
        rows[0] = 0  # valid
    logits = 3 * torch.randn(2, len(rows), count, generator=generator, dtype=torch.float64)
    attention = logits.softmax(-1)
    metrics = head_metrics(
        attention, grid, MotionMask(radius, own_frame), rows if sampled else None
    )
    expected = metrics_by_loops(
        attention, grid, rows.tolist(), lambda q, k: in_mask(q, k, grid, radius, own_frame), own_frame
    )
    assert_metrics(metrics, expected)


@pytest.mark.parametrize("order", ["frame", "place"])
@pytest.mark.parametrize("own_frame", [True, False])
def test_metrics_of_a_band_mask(order, own_frame):
    grid = make_grid(3, 2, 4)
    attention = torch.randn(2, 24, 24, dtype=torch.float64).mul(2).softmax(-1)
    mask = BandMask(1.5, "places", order, own_frame)
    inside = mask(torch.arange(24), grid)  # against its definition in test_masks.py
    expected = metrics_by_loops(attention, grid, range(24), lambda q, k: bool(inside[q, k]), own_frame)
    assert_metrics(head_metrics(attention, grid, mask), expected)


def test_runs_are_counted_row_by_row():
    grid = make_grid(5, 1, 2)
    attention = torch.zeros(1, 10, 10)
    for frame, pattern in enumerate(("11011", "00000", "11111", "10101", "01110")):
        attention[0, 2 * frame, 0::2] = torch.tensor([float(c) for c in pattern])
    # place 0: runs 2, 2 | none | 5 | 1, 1, 1 | 3 -> 15/7; place 1: no run -> 0
    assert head_metrics(attention, grid).tcs.item() == pytest.approx(15 / 7 / 2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_permuted_heads_give_permuted_scores(seed):
    generator = torch.Generator().manual_seed(seed)
    grid = make_grid(3, 2, 3)
    attention = torch.randn(6, 18, 18, generator=generator).mul(2).softmax(-1)
    order = torch.randperm(6, generator=generator)
    metrics, permuted = head_metrics(attention, grid), head_metrics(attention[order], grid)
    assert torch.equal(permuted.dfc, metrics.dfc[order])
    assert torch.equal(permuted.tcs, metrics.tcs[order])
    assert torch.equal(permuted.dsr, metrics.dsr[order])
    torch.testing.assert_close(permuted.score(), metrics.score()[order])


def test_invalid_cells_change_nothing():
    valid = torch.ones(2, 3, 3, dtype=torch.bool)
    valid[1, 0] = False
    grid = make_grid(2, 3, 3, valid)
    attention = torch.rand(3, 18, 18)
    expected = head_metrics(attention, grid)
    holes = ~valid.flatten()
    attention[:, holes] = torch.nan
    attention[:, :, holes] = torch.nan
    found = head_metrics(attention, grid)
    assert torch.equal(found.dfc, expected.dfc)
    assert torch.equal(found.tcs, expected.tcs)
    assert torch.equal(found.dsr, expected.dsr)


def test_a_head_that_follows_places_is_selected():
    grid = make_grid(4, 3, 3)
    same_place = MotionMask(0)(torch.arange(36), grid).float() / 4
    same_frame = torch.block_diag(*[torch.full((9, 9), 1 / 9)] * 4)
    uniform = torch.full((36, 36), 1 / 36)
    metrics = head_metrics(torch.stack([uniform, same_place, same_frame]), grid)
    assert metrics.score().argmax() == 1
    assert metrics.score().isfinite().all()  # nothing of `same_place` lies outside M
    assert metrics.tcs[1] == 4 and metrics.dsr[1] == 1
    assert select_heads(metrics, 0.3).tolist() == [False, True, False]


def test_equal_heads_score_zero_and_the_first_are_kept():
    grid = make_grid(3, 1, 1)  # everything lies in M: no contrast to standardise
    attention = torch.rand(1, 3, 3).softmax(-1).expand(5, -1, -1)
    metrics = head_metrics(attention, grid)
    assert (metrics.score() == 0).all()
    assert select_heads(metrics).tolist() == [True, True, True, False, False]


def test_the_score_standardises_each_metric():
    dfc, tcs, dsr = torch.rand(3, 7, dtype=torch.float64)
    by_hand = sum((m - m.mean()) / ((m - m.mean()) ** 2).mean().sqrt() for m in (dfc, tcs, dsr))
    torch.testing.assert_close(HeadMetrics(dfc, tcs, dsr).score(), by_hand)
    scaled = HeadMetrics(dfc * 1e-9, tcs * 1e6 + 3, dsr)
    torch.testing.assert_close(scaled.score(), by_hand)


def test_low_precision_attention_is_scored_in_float32():
    grid = make_grid(3, 2, 3)
    attention = torch.rand(4, 18, 18).softmax(-1).half()
    found, expected = head_metrics(attention, grid), head_metrics(attention.float(), grid)
    assert torch.equal(found.score(), expected.score())


def test_head_metrics_say_what_does_not_fit():
    grid = make_grid(2, 2, 2)
    with pytest.raises(ValueError, match=r"\[H, R, S\].*R = 8.*\[2, 4, 8\]"):
        head_metrics(torch.rand(2, 4, 8), grid)
    broken = torch.rand(3, 8, 8)
    broken[1, 2, 3] = torch.nan
    with pytest.raises(ModelError, match="head 1 holds NaN"):
        head_metrics(broken, grid)
    empty = make_grid(2, 2, 2, torch.zeros(2, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no query row"):
        head_metrics(torch.rand(2, 8, 8), empty)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 80))
def test_sampled_rows_are_spread_over_frames(seed, frames, count):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(frames, 3, 4, generator=generator) > 0.3
    valid[0, 0, 0] = True
    grid = make_grid(frames, 3, 4, valid)
    rows = sample_rows(grid, count, seed)
    assert len(rows) == min(count, int(valid.sum()))
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert valid.flatten()[rows].all()
    per_frame = torch.bincount(rows // 12, minlength=frames)
    room = per_frame < valid.flatten(1).sum(1)
    if room.any():  # frames that could give more give at most one less than any other
        assert per_frame[room].min() >= per_frame.max() - 1
    assert torch.equal(rows, sample_rows(grid, count, seed))


def test_sampled_rows_follow_the_seed_and_reach_every_cell():
    grid = make_grid(4, 3, 4)
    drawn = [sample_rows(grid, 8, seed) for seed in range(60)]
    assert any(not torch.equal(drawn[0], other) for other in drawn)
    assert len(torch.cat(drawn).unique()) == 48
    assert torch.equal(sample_rows(grid, "all", 0), torch.arange(48))
    for wrong in (0, -1, "some", True):
        with pytest.raises(ValueError, match="sample_rows"):
            sample_rows(grid, wrong, 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 7), st.booleans(), st.booleans())
def test_chunks_of_rows_give_the_metrics_of_all_at_once(seed, size, sampled, own_frame):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(3, 2, 3, generator=generator) > 0.2
    valid[0, 0, 0] = True
    grid = make_grid(3, 2, 3, valid)
    attention = torch.randn(3, 18, 18, generator=generator).mul(2).softmax(-1)
    rows = sample_rows(grid, 7, seed) if sampled else torch.arange(18)
    mask = MotionMask(1, own_frame)
    taken = HeadAccumulator(grid, mask, rows)
    for chosen in rows[torch.randperm(len(rows), generator=generator)].split(size):
        taken.add(attention[:, chosen], chosen)
    found, expected = taken.statistics().metrics(), head_metrics(attention[:, rows], grid, mask, rows)
    for name in ("dfc", "tcs", "dsr"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=0)


def test_rows_added_again_are_averaged():
    """Of two layers: τ, TCS and DSR are those of the mean map, DFC has the mean of the energies."""
    grid = make_grid(3, 2, 3)
    layers = torch.randn(2, 4, 18, 18, dtype=torch.float64).mul(2).softmax(-1)
    taken = HeadAccumulator(grid)
    for layer in layers:
        for chosen in torch.arange(18).split(5):
            taken.add(layer[:, chosen], chosen)
    found, of_mean = taken.statistics().metrics(), head_metrics(layers.mean(0), grid)
    torch.testing.assert_close(found.tcs, of_mean.tcs)
    torch.testing.assert_close(found.dsr, of_mean.dsr)
    inside = MotionMask()(torch.arange(18), grid)
    energy = layers.square().mean(0)
    torch.testing.assert_close(found.dfc, (energy * inside).sum((1, 2)) / (energy * ~inside).sum((1, 2)))


def test_a_stream_of_rows_holds_no_columns():
    """What is held grows with rows × frames: the same for a frame of 4 and of 400 places, but for the rows."""
    held = []
    for columns in (4, 400):
        grid = make_grid(3, 1, columns)
        rows = torch.arange(8)
        taken = HeadAccumulator(grid, MotionMask(), rows)
        taken.add(torch.rand(2, 8, grid.num_tokens).softmax(-1), rows)
        statistics = taken.statistics()
        parts = (statistics.mass, statistics.inside, statistics.outside, statistics.same_place, statistics.rows)
        held.append(sum(part.numel() for part in parts))
    assert held[0] == held[1] == 2 * 8 * (3 + 3) + 8


def test_an_accumulator_says_what_does_not_fit():
    grid = make_grid(2, 2, 2)
    taken = HeadAccumulator(grid, MotionMask(), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="no query row"):
        taken.statistics()
    with pytest.raises(ValueError, match=r"rows \[1\] are none of those"):
        taken.add(torch.rand(2, 1, 8), torch.tensor([1]))
    taken.add(torch.rand(2, 1, 8), torch.tensor([3]))
    with pytest.raises(ValueError, match="2 heads were added before, now 3"):
        taken.add(torch.rand(3, 1, 8), torch.tensor([0]))
    assert taken.statistics().rows.tolist() == [3]  # a row that never came counts in nothing
