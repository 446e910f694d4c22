"""Agreement of motion maps: every measure against plain loops, and what a perfect and a uniform map must get."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from enhancer.agreement import (
    DRAWS, UNIFORM_SHARE, GridMap, agreement, centre_errors, kl_divergence, mean_interval, nss, on_grid,
    rank_correlation, words_map)
from vdm_priors.errors import SampleError
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vdm_priors.words import split_words

seeds = st.integers(0, 2**31)


def some_grid(rng, frames=3):
    starts = np.cumsum(rng.uniform(0.1, 0.5, frames + 1))
    rows, columns = rng.integers(2, 6, 2)
    return TokenGrid.regular(np.stack([starts[:-1], starts[1:]], 1), int(rows), int(columns))


def some_map(rng, grid, hidden=0.2):
    valid = rng.random(grid.shape) >= hidden
    valid[0, 0, 0] = True
    mass = rng.random(grid.shape) * (rng.random(grid.shape) < 0.6)
    mass[0, 0, 0] = 0.5
    return GridMap(np.where(valid, mass, 0), np.where(valid, grid.volumes.numpy(), 0))


def cells(grid):
    return [(f, r, c) for f in range(grid.frames) for r in range(grid.rows) for c in range(grid.columns)]


# ---- plain loops -----------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(seeds)
def test_measures_equal_plain_loops(seed):
    rng = np.random.default_rng(seed)
    grid = some_grid(rng)
    found, truth = some_map(rng, grid), some_map(rng, grid, hidden=0)
    both = [at for at in cells(grid) if found.volume[at] > 0]
    volume = {at: found.volume[at] for at in both}
    p = {at: found.mass[at] / sum(found.mass[b] for b in both) for at in both}
    q = {at: truth.mass[at] / sum(truth.mass[b] for b in both) for at in both}
    density = {at: p[at] / volume[at] for at in both}
    true = {at: q[at] / truth.volume[at] for at in both}
    things = [at for at in both if true[at] >= 0.25 * max(true.values())]
    others = [at for at in both if at not in things]
    got = agreement(found, truth, grid)

    if others:
        wins = [1.0 if density[a] > density[b] else 0.5 if density[a] == density[b] else 0.0
                for a in things for b in others]
        assert got["auc"] == pytest.approx(sum(wins) / len(wins), abs=1e-3)
        whole = sum(volume.values())
        mean = sum(volume[at] * density[at] for at in both) / whole
        spread = math.sqrt(sum(volume[at] * (density[at] - mean) ** 2 for at in both) / whole)
        assert got["nss"] == pytest.approx(sum(q[at] * (density[at] - mean) / spread for at in both), abs=1e-4)
    else:
        assert math.isnan(got["auc"]) and math.isnan(got["nss"])

    u = {at: volume[at] / sum(volume.values()) for at in both}
    mixed = lambda of, at: (1 - UNIFORM_SHARE) * of[at] + UNIFORM_SHARE * u[at]  # noqa: E731
    assert got["kl"] == pytest.approx(sum(mixed(q, at) * math.log(mixed(q, at) / mixed(p, at)) for at in both))

    distances = []
    for frame in range(grid.frames):
        places = [at for at in both if at[0] == frame]
        centre = {}
        ours = found.mass if sum(found.mass[at] for at in places) else found.volume
        for name, mass in (("found", ours), ("truth", truth.mass)):
            total = sum(mass[at] for at in places)
            if total:
                centre[name] = [
                    sum(mass[at] * (at[axis] + 0.5) / grid.shape[axis] for at in places) / total for axis in (1, 2)]
        if len(centre) == 2:
            distances.append(math.dist(centre["found"], centre["truth"]))
    assert got["centre"] == pytest.approx(sum(distances) / len(distances))
    assert sum(not math.isnan(d) for d in got["centre_over_time"]) == len(distances)
    assert got["known"] == pytest.approx(len(both) / grid.num_tokens)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_rank_correlation_equals_plain_loops_with_ties(seed):
    rng = np.random.default_rng(seed)
    grid = TokenGrid.regular([[0.0, 0.5], [0.5, 1.0]], 3, 4)
    volume = grid.volumes.numpy()
    first, second = (GridMap(rng.integers(0, 4, grid.shape).astype(float), volume * (rng.random(grid.shape) < 0.8))
                     for _ in range(2))
    both = [at for at in cells(grid) if first.valid[at] and second.valid[at]]
    ranks = []
    for of in (first, second):
        values = [of.mass[at] for at in both]
        ranks.append([sum(v < value for v in values) + (1 + sum(v == value for v in values)) / 2 for value in values])
    means = [sum(r) / len(r) for r in ranks]
    cross = sum((a - means[0]) * (b - means[1]) for a, b in zip(*ranks))
    norm = math.sqrt(math.prod(sum((a - mean) ** 2 for a in r) for r, mean in zip(ranks, means)))
    got = rank_correlation(first, second)
    assert math.isnan(got) if norm == 0 else got == pytest.approx(cross / norm)


def test_interval_is_a_bootstrap_over_what_is_known():
    values = [0.1, 0.9, float("nan"), 0.4, 0.4]
    got = mean_interval(values, seed=3)
    known = [0.1, 0.9, 0.4, 0.4]
    rng = np.random.default_rng(3)
    means = sorted(sum(known[i] for i in row) / 4 for row in rng.integers(4, size=(DRAWS, 4)))
    assert got["mean"] == pytest.approx(0.45) and got["n"] == 4
    assert got["low"] == pytest.approx(means[int(0.025 * DRAWS)], abs=0.03)
    assert got["high"] == pytest.approx(means[int(0.975 * DRAWS)], abs=0.03)
    assert mean_interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1}
    assert mean_interval([float("nan")])["mean"] is None


# ---- what must come out ----------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(seeds)
def test_a_perfect_map_is_perfect_and_a_uniform_one_is_chance(seed):
    rng = np.random.default_rng(seed)
    grid = some_grid(rng)
    valid = rng.random(grid.shape) < 0.8
    thing = (rng.random(grid.shape) < 0.3) & valid
    thing[0, 0, 0], valid[0, 0, 0], thing[0, 0, 1], valid[0, 0, 1] = True, True, False, True
    volume = np.where(valid, grid.volumes.numpy(), 0)
    truth = GridMap(volume * thing, volume)

    perfect = agreement(truth, truth, grid)
    assert perfect["auc"] == 1 and perfect["kl"] == pytest.approx(0, abs=1e-12)
    assert perfect["centre"] == pytest.approx(0, abs=1e-12) and perfect["nss"] > 0
    uniform = agreement(GridMap(0.3 * volume, volume), truth, grid)
    assert uniform["auc"] == 0.5 and uniform["nss"] == 0 and uniform["kl"] > 0
    opposite = agreement(GridMap(volume * ~thing, volume), truth, grid)
    assert opposite["auc"] == 0 and opposite["nss"] < 0 and opposite["kl"] > uniform["kl"]


def test_uniform_stays_uniform_when_carried_to_a_grid_that_does_not_line_up():
    source = TokenGrid.regular([[0.0, 0.7], [0.7, 1.3], [1.3, 2.0]], 5, 7)
    grid = TokenGrid.regular([[0.0, 0.5], [0.5, 1.0], [1.0, 2.0]], 16, 16)
    found = on_grid(source.volumes, source, grid)
    truth = on_grid(torch.arange(grid.num_tokens).reshape(grid.shape) * grid.volumes, grid, grid)
    assert agreement(found, truth, grid)["auc"] == 0.5
    assert found.mass.sum() == pytest.approx(float(source.volumes.sum()))


def test_cells_that_a_source_does_not_know_count_neither_for_nor_against_it():
    source = TokenGrid.regular([[0.0, 1.0]], 4, 4)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, :, 0] = False
    hidden = TokenGrid(source.spans, source.row_edges, source.column_edges, valid)
    mass = torch.zeros(1, 4, 4)
    mass[0, 1, 2], mass[0, :, 0] = 1, float("nan")
    truth = torch.zeros(1, 4, 4)
    truth[0, 1, 2] = truth[0, 1, 0] = 1
    got = agreement(on_grid(mass, hidden, source), on_grid(truth, source, source), source)
    assert got["auc"] == 1 and got["centre"] == 0 and got["known"] == 0.75


def test_the_centre_of_a_frame_without_mass_is_that_of_the_known_cells():
    grid = TokenGrid.regular([[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]], 2, 4)
    volume = grid.volumes.numpy()
    truth, found = np.zeros(grid.shape), np.zeros(grid.shape)
    truth[0, 0, 0] = truth[1, 0, 0] = found[0, 0, 2] = 1
    errors = centre_errors(GridMap(found, volume), GridMap(truth, volume), grid)
    assert errors[0] == pytest.approx(0.5)
    assert errors[1] == pytest.approx(math.hypot(0.5 - 0.125, 0.5 - 0.25))
    assert math.isnan(errors[2])


def test_a_truth_that_fills_the_frame_has_no_auc_and_no_nss():
    grid = TokenGrid.regular([[0.0, 1.0]], 2, 2)
    volume = grid.volumes.numpy()
    got = agreement(GridMap(volume * [[1, 0], [0, 0]], volume), GridMap(volume, volume), grid)
    assert math.isnan(got["auc"]) and math.isnan(got["nss"]) and got["kl"] > 0


def test_maps_with_nothing_in_common_are_refused():
    grid = TokenGrid.regular([[0.0, 1.0]], 1, 2)
    volume = grid.volumes.numpy()
    left, right = np.array([[[1.0, 0.0]]]), np.array([[[0.0, 1.0]]])
    with pytest.raises(SampleError, match="no cell with mass in common"):
        agreement(GridMap(left, volume * left), GridMap(right, volume), grid)


def test_kl_and_nss_by_hand():
    assert kl_divergence(np.array([0.5, 0.5]), np.array([1.0, 0.0]), np.ones(2)) == pytest.approx(
        0.995 * math.log(0.995 / 0.5) + 0.005 * math.log(0.005 / 0.5))
    assert nss(np.array([1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0]), np.ones(4)) == pytest.approx(math.sqrt(3))


def test_the_map_of_words_is_the_mean_of_theirs_each_of_mass_one():
    text = "the red disc moves"
    words = split_words(text)[1:]
    maps = torch.tensor([[3.0, 0], [0, 5.0], [2.0, 2.0]]).reshape(3, 1, 1, 2)
    prior = MotionPrior(text=text, words=words, maps=maps, grid=TokenGrid.regular([[0.0, 1.0]], 1, 2),
                        weight=torch.ones(3), provenance={"source": "test"})
    assert words_map(prior, words[:2]).flatten().tolist() == [0.5, 0.5]
    assert words_map(prior, words[1:]).flatten().tolist() == [0.25, 0.75]
    with pytest.raises(SampleError, match="none of the words blue"):
        words_map(prior, split_words("blue"))
