"""Confidence of priors: what both measures promise, and a plain-loop reference of each."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm_priors.confidence import concentration, confidence_report, mobility, word_weights
from vdm_priors.grid import TokenGrid

MEASURES = (concentration, mobility)


def random_grid(generator: torch.Generator, frames: int = 3, holes: bool = False) -> TokenGrid:
    """Cells of unequal volume: frames, rows and columns of random length."""
    ends = (0.1 + torch.rand(frames, generator=generator, dtype=torch.float64)).cumsum(0)
    spans = torch.stack([torch.cat([torch.zeros(1).double(), ends[:-1]]), ends], dim=1)
    edges = [torch.cat([torch.zeros(1), 0.1 + torch.rand(n, generator=generator)]).cumsum(0).double() for n in (2, 3)]
    valid = torch.rand(frames, 2, 3, generator=generator) > (0.25 if holes else -1.0)
    valid[:, 0, 0] = True
    return TokenGrid(spans, *(edge / edge[-1] for edge in edges), valid)


def uniform(grid: TokenGrid) -> torch.Tensor:
    return grid.volumes / grid.volumes[grid.valid].sum() * grid.valid


seeds, frames = st.integers(0, 2**31), st.integers(2, 4)


@settings(max_examples=30, deadline=None)
@given(seeds, frames, st.booleans())
def test_measures_against_plain_loops(seed, frames, holes):
    generator = torch.Generator().manual_seed(seed)
    grid = random_grid(generator, frames, holes)
    maps = torch.rand(2, *grid.shape, generator=generator) ** 4
    cells = [tuple(cell) for cell in grid.valid.nonzero().tolist()]
    volume = {cell: float(grid.volumes[cell]) for cell in cells}
    for n, map_fhw in enumerate(maps.tolist()):
        mass = {(f, h, w): map_fhw[f][h][w] for f, h, w in cells}
        entropy = cross = change = total = 0.0
        for cell in cells:
            p, q = mass[cell] / sum(mass.values()), volume[cell] / sum(volume.values())
            entropy -= p * log(p) if p else 0.0
            cross -= p * log(q)
            f, h, w = cell
            if (f + 1, h, w) in mass:
                here, there = mass[cell] / volume[cell], mass[f + 1, h, w] / volume[f + 1, h, w]
                change, total = change + abs(there - here), total + there + here
        assert concentration(maps, grid)[n].item() == pytest.approx(1 - entropy / cross, abs=1e-9)
        assert mobility(maps, grid)[n].item() == pytest.approx(change / total, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seeds, frames, st.booleans())
def test_a_uniform_map_has_none_and_one_cell_all(seed, frames, holes):
    generator = torch.Generator().manual_seed(seed)
    grid = random_grid(generator, frames, holes)
    one_cell = torch.zeros(grid.shape, dtype=torch.float64)
    one_cell[frames // 2, 0, 0] = 3.0  # valid, and so are its neighbours in time
    maps = torch.stack([uniform(grid), one_cell])
    for measure in MEASURES:
        assert measure(maps, grid).tolist() == pytest.approx([0.0, 1.0], abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seeds, frames, st.booleans(), st.floats(1e-8, 1e8))
def test_scale_says_nothing_and_mixing_with_uniform_lowers(seed, frames, holes, scale):
    generator = torch.Generator().manual_seed(seed)
    grid = random_grid(generator, frames, holes)
    sharp = torch.rand(grid.shape, generator=generator, dtype=torch.float64) ** 8 * grid.valid
    sharp /= sharp.sum()
    mixed = torch.stack([(1 - share) * sharp + share * uniform(grid) for share in (0, 0.1, 0.4, 0.7, 1)])
    for measure in MEASURES:
        values = measure(mixed, grid)
        assert (values.diff() <= 1e-9).all() and values[0] > values[-1]
        assert ((values >= 0) & (values <= 1)).all()
        torch.testing.assert_close(measure(mixed * scale, grid), values, rtol=1e-6, atol=1e-9)


def test_invalid_cells_may_hold_anything_and_empty_maps_say_nothing():
    generator = torch.Generator().manual_seed(0)
    grid = random_grid(generator, holes=True)
    maps = torch.rand(2, *grid.shape, generator=generator)
    maps[1] = 0
    expected = [measure(maps, grid) for measure in MEASURES]
    maps[:, ~grid.valid] = torch.nan
    for measure, value in zip(MEASURES, expected, strict=True):
        assert torch.equal(measure(maps, grid), value) and value[1] == 0
    one = TokenGrid.regular([[0.0, 1.0]], 1, 1)
    assert [measure(torch.ones(1, 1, 1, 1), one).item() for measure in MEASURES] == [0, 0]


def test_a_thing_that_only_moves_is_mobile_and_one_that_stays_is_not():
    grid = TokenGrid.regular([[0.0, 0.1], [0.1, 0.5], [0.5, 1.0]], 1, 3)
    seconds = grid.spans.diff(dim=1)[:, 0]
    moves, stays = torch.zeros(2, 3, 1, 3, dtype=torch.float64)
    for frame in range(3):
        moves[frame, 0, frame] = stays[frame, 0, 1] = seconds[frame]  # mass: equal density in every frame
    assert mobility(torch.stack([moves, stays]), grid).tolist() == pytest.approx([1, 0])


def test_weights_are_the_measures_and_their_product():
    generator = torch.Generator().manual_seed(1)
    grid = random_grid(generator)
    maps = torch.rand(4, *grid.shape, generator=generator)
    still, moving = concentration(maps, grid).float(), mobility(maps, grid).float()
    assert torch.equal(word_weights(maps, grid, "none"), torch.ones(4))
    assert torch.equal(word_weights(maps, grid, "concentration"), still)
    assert torch.equal(word_weights(maps, grid, "mobility"), moving)
    torch.testing.assert_close(word_weights(maps, grid, "both"), still * moving)
    report = confidence_report(maps, grid)
    assert report["mobility"]["words"] == pytest.approx(moving.tolist())
    assert report["concentration"]["prior"] == pytest.approx(float(still.mean()))
    assert confidence_report(maps[:0], grid)["mobility"] == {"prior": 0.0, "words": []}
    with pytest.raises(ValueError, match="none, concentration, mobility, both"):
        word_weights(maps, grid, "off")
    with pytest.raises(ValueError, match=r"\[N, F, H, W\] on the grid \[3, 2, 3\]"):
        mobility(maps[:, :2], grid)
