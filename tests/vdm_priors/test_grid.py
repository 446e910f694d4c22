"""TokenGrid and regrid against brute-force box intersection."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm_priors.grid import TokenGrid, frame_spans, merge_spans, regrid


def random_grid(generator: torch.Generator, holes: bool = True) -> TokenGrid:
    frames, rows, columns = torch.randint(1, 4, (3,), generator=generator).tolist()

    def edges(count: int, low: float, high: float) -> torch.Tensor:
        steps = torch.rand(count, generator=generator, dtype=torch.float64) + 0.2
        places = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        return low + places / places[-1] * (high - low)

    time = edges(frames, 0.0, 3.0)
    spans = torch.stack([time[:-1], time[1:] - 0.05], dim=1)  # gaps between frames
    valid = torch.rand(frames, rows, columns, generator=generator) > (0.3 if holes else -1.0)
    return TokenGrid(spans, edges(rows, -0.2, 1.1), edges(columns, 0.0, 1.0), valid)


def shared_length(one, other) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


def regrid_by_loops(values, source, target):
    result = torch.zeros(target.num_tokens, dtype=torch.float64)
    for j in range(target.num_tokens):
        if not target.valid.flatten()[j]:
            continue
        t_span, (t_top, t_left, t_bottom, t_right) = target.cell(j)
        for i in range(source.num_tokens):
            if not source.valid.flatten()[i]:
                continue
            s_span, (s_top, s_left, s_bottom, s_right) = source.cell(i)
            volume = (s_span[1] - s_span[0]) * (s_bottom - s_top) * (s_right - s_left)
            shared = (
                shared_length(s_span, t_span)
                * shared_length((s_top, s_bottom), (t_top, t_bottom))
                * shared_length((s_left, s_right), (t_left, t_right))
            )
            result[j] += values.flatten()[i] * shared / volume
    return result.reshape(target.shape)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_overlap_is_the_intersection_of_boxes(seed):
    generator = torch.Generator().manual_seed(seed)
    source, target = random_grid(generator), random_grid(generator)
    values = torch.rand(source.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        regrid(values, source, target), regrid_by_loops(values, source, target)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_overlap_keeps_mass_and_returns_from_a_finer_grid(seed):
    generator = torch.Generator().manual_seed(seed)
    frames, rows, columns = torch.randint(1, 5, (3,), generator=generator).tolist()
    spans = frame_spans(torch.arange(frames) * 0.5)
    halves = torch.stack([spans[:, 0], spans.mean(1), spans.mean(1), spans[:, 1]], 1).reshape(-1, 2)
    coarse = TokenGrid.regular(spans, rows, columns)
    fine = TokenGrid.regular(halves, rows * 3, columns * 2)
    values = torch.rand(2, 3, *coarse.shape, generator=generator)
    there = regrid(values, coarse, fine)
    torch.testing.assert_close(there.sum((-3, -2, -1)), values.sum((-3, -2, -1)))
    torch.testing.assert_close(regrid(there, fine, coarse), values)
    # onto a grid that covers the same box but nests nowhere
    other = TokenGrid.regular([[0.0, 0.1], [0.1, 9.0]], 7, 5, (-0.5, -0.5, 1.5, 1.5))
    torch.testing.assert_close(
        regrid(values, coarse, other).sum((-3, -2, -1)), values.sum((-3, -2, -1))
    )


@pytest.mark.parametrize("mode", ["overlap", "trilinear"])
def test_the_same_grid_changes_nothing(mode):
    grid = random_grid(torch.Generator().manual_seed(3), holes=False)
    values = torch.rand(2, *grid.shape)
    torch.testing.assert_close(regrid(values, grid, grid, mode), values)


@pytest.mark.parametrize("mode", ["overlap", "trilinear"])
def test_invalid_cells_neither_give_nor_get(mode):
    spans = [[0.0, 1.0], [1.0, 2.0]]
    holed = torch.ones(2, 4, 4, dtype=torch.bool)
    holed[0, 1:, :2] = False
    source = TokenGrid.regular(spans, 4, 4, valid=holed)
    blocked = torch.ones(2, 2, 2, dtype=torch.bool)
    blocked[1, 1, 1] = False
    target = TokenGrid.regular(spans, 2, 2, valid=blocked)
    values = torch.where(holed, torch.rand(2, 4, 4), torch.nan).requires_grad_()
    result = regrid(values, source, target, mode)
    assert result.isfinite().all()
    assert result[1, 1, 1] == 0
    assert result[0, 1, 0] == 0  # lies on invalid cells alone
    if mode == "trilinear":
        ones = regrid(holed.float(), source, target, mode)
        assert set(ones.flatten().tolist()) <= {0.0, 1.0}  # a hole does not darken its edge
    result.sum().backward()
    assert values.grad.isfinite().all()
    assert (values.grad[~holed] == 0).all()


def test_trilinear_interpolates_a_linear_field_exactly_and_clamps_outside():
    def field(grid):
        time = grid.spans.mean(1)[:, None, None]
        row = ((grid.row_edges[1:] + grid.row_edges[:-1]) / 2)[None, :, None]
        column = ((grid.column_edges[1:] + grid.column_edges[:-1]) / 2)[None, None]
        return 2 * time - row + 3 * column

    source = TokenGrid.regular([[0.0, 1.0], [1.5, 2.0], [2.0, 4.0]], 5, 6)
    target = TokenGrid.regular([[0.5, 1.0], [1.0, 3.0]], 3, 2, (0.2, 0.1, 0.9, 0.9))
    torch.testing.assert_close(regrid(field(source), source, target, "trilinear"), field(target))
    later = TokenGrid.regular([[9.0, 10.0]], 5, 6)
    torch.testing.assert_close(
        regrid(field(source), source, later, "trilinear")[0], field(source)[-1]
    )


@pytest.mark.parametrize("mode", ["overlap", "trilinear"])
def test_gradients_reach_the_values(mode):
    source = TokenGrid.regular([[0.0, 1.0], [1.0, 2.0]], 2, 3)
    target = TokenGrid.regular([[0.0, 0.7], [0.7, 2.0]], 3, 2)
    values = torch.rand(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: regrid(v, source, target, mode), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_regrid_keeps_the_dtype(dtype):
    source = TokenGrid.regular([[0.0, 1.0]], 4, 4)
    target = TokenGrid.regular([[0.0, 1.0]], 2, 2)
    result = regrid(torch.full((1, 4, 4), 0.25, dtype=dtype), source, target)
    assert result.dtype == dtype
    assert (result == 1).all()


def test_regrid_names_what_does_not_fit():
    grid = TokenGrid.regular([[0.0, 1.0]], 2, 2)
    with pytest.raises(ValueError, match=r"\[1, 2, 3\].*\[1, 2, 2\]"):
        regrid(torch.rand(1, 2, 3), grid, grid)
    with pytest.raises(ValueError, match="overlap, trilinear"):
        regrid(torch.rand(1, 2, 2), grid, grid, "nearest")


def test_cells_are_frame_major():
    grid = TokenGrid.regular([[0.0, 1.0], [1.0, 3.0]], 2, 4, (0.0, 0.0, 1.0, 2.0))
    assert grid.shape == (2, 2, 4) and grid.num_tokens == 16
    assert grid.cell(0) == ((0.0, 1.0), (0.0, 0.0, 0.5, 0.5))
    assert grid.cell(8 + 4 + 1) == ((1.0, 3.0), (0.5, 0.5, 1.0, 1.0))
    with pytest.raises(IndexError):
        grid.cell(16)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_a_grid_survives_json(seed, holes):
    grid = random_grid(torch.Generator().manual_seed(seed), holes)
    assert TokenGrid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


def test_grids_differ_by_any_part():
    grid = TokenGrid.regular([[0.0, 1.0]], 2, 2)
    assert grid == TokenGrid.regular([[0.0, 1.0]], 2, 2)
    assert grid != TokenGrid.regular([[0.0, 2.0]], 2, 2)
    assert grid != TokenGrid.regular([[0.0, 1.0]], 2, 3)
    assert grid != TokenGrid.regular([[0.0, 1.0]], 2, 2, valid=torch.zeros(1, 2, 2) > 0)
    assert grid != "grid"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": torch.tensor([[1.0, 1.0]])}, "end after its start"),
        ({"spans": torch.zeros(0, 2)}, r"\[F, 2\]"),
        ({"row_edges": torch.tensor([0.0, 0.5, 0.5])}, "row_edges"),
        ({"column_edges": torch.tensor([0.0])}, "column_edges"),
        ({"column_edges": torch.tensor([0.0, torch.nan])}, "finite"),
        ({"valid": torch.ones(2, 2, 2, dtype=torch.bool)}, r"valid must be \[F, H, W\]"),
    ],
)
def test_impossible_grids_are_refused(change, message):
    good = TokenGrid.regular([[0.0, 1.0]], 2, 2)
    parts = {name: getattr(good, name) for name in ("spans", "row_edges", "column_edges", "valid")}
    with pytest.raises(ValueError, match=message):
        TokenGrid(**(parts | change))


@pytest.mark.parametrize(
    ("times", "duration", "spans"),
    [
        ([0.0, 1.0, 2.0], None, [[0.0, 0.5], [0.5, 1.5], [1.5, 2.5]]),
        ([0.0, 1.0, 2.0], 2.75, [[0.0, 0.5], [0.5, 1.5], [1.5, 2.75]]),
        ([10.0, 12.0], 3600.0, [[9.0, 11.0], [11.0, 14.0]]),
        ([0.0, 1.0], 0.5, [[0.0, 0.5], [0.5, 1.5]]),  # a container that understates its length
        ([2.0], 0.5, [[2.0, 2.5]]),
        ([2.0], None, [[2.0, 2.001]]),
        ([0.0, 1.0, 1.0], None, [[0.0, 0.5], [0.5, 1.0], [1.0, 1.5]]),
    ],
)
def test_frame_spans(times, duration, spans):
    result = frame_spans(times, duration)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, torch.tensor(spans, dtype=torch.float64))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=12, unique_by=lambda t: round(t, 3)))
def test_frame_spans_meet_and_hold_their_frame(times):
    times = sorted(times)
    spans = frame_spans(times)
    assert (spans[:, 1] > spans[:, 0]).all()
    assert torch.equal(spans[1:, 0], spans[:-1, 1])
    instants = torch.tensor(times, dtype=torch.float64)
    assert ((spans[:, 0] <= instants) & (instants <= spans[:, 1])).all()


def test_frame_spans_refuse_falling_times():
    with pytest.raises(ValueError, match="must not fall"):
        frame_spans([1.0, 0.5])
    with pytest.raises(ValueError, match="one or more"):
        frame_spans([])


def test_merge_spans_of_a_causal_vae():
    spans = frame_spans([0.0, 1.0, 2.0, 3.0, 4.0])
    assert merge_spans(spans, [[0], [1, 2, 3, 4]]).tolist() == [[0.0, 0.5], [0.5, 4.5]]
    with pytest.raises(ValueError, match="every group needs a frame"):
        merge_spans(spans, [[0], []])
