"""Motion masks against their definitions, cell by cell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vdm_priors.metric_loops import in_mask, make_grid
from vdm_priors.masks import BandMask, MotionMask


def in_band(query: int, key: int, grid, mask: BandMask) -> bool:
    """SparseVideoGen's temporal band, from the two layouts' indices."""
    places = grid.rows * grid.columns
    (qf, qp), (kf, kp) = divmod(query, places), divmod(key, places)
    valid = grid.valid.flatten()
    if not (valid[query] and valid[key]) or (qf == kf and not mask.own_frame):
        return False
    if mask.order == "frame":
        width = mask.width if mask.unit == "places" else mask.width * places // grid.frames
        return abs(qp - kp) < max(width, 1)
    width = mask.width * (places if mask.unit == "frames" else grid.frames)  # tokens of the place-major layout
    return abs((qp * grid.frames + qf) - (kp * grid.frames + kf)) < max(width, grid.frames)


@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("own_frame", [True, False])
def test_the_place_mask_is_its_definition_and_never_wraps(radius, own_frame):
    valid = torch.ones(3, 3, 4, dtype=torch.bool)
    valid[1, 2, 3] = valid[2, 0, 0] = False
    grid = make_grid(3, 3, 4, valid)
    queries = torch.tensor([0, 3, 4, 12, 23, 24, 35])
    mask = MotionMask(radius, own_frame)(queries, grid)
    assert mask.shape == (7, 36) and mask.dtype == torch.bool
    for row, query in zip(mask, queries.tolist(), strict=True):
        assert row.tolist() == [in_mask(query, k, grid, radius, own_frame) for k in range(36)]
    assert not MotionMask(1)(torch.tensor([3]), grid)[0, 4]  # end of a row, start of the next


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)),
    st.sampled_from([0.3, 1.0, 1.5, 2.0, 3.0]),
    st.sampled_from(["frames", "places"]),
    st.sampled_from(["frame", "place"]),
    st.booleans(),
    st.booleans(),
)
def test_the_band_is_sparse_videogens(seed, shape, width, unit, order, own_frame, holes):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(shape, generator=generator) > 0.2 if holes else torch.ones(shape, dtype=torch.bool)
    grid = make_grid(*shape, valid)
    queries = torch.randperm(grid.num_tokens, generator=generator)[:6]
    mask = BandMask(width, unit, order, own_frame)
    for row, query in zip(mask(queries, grid), queries.tolist(), strict=True):
        assert row.tolist() == [in_band(query, k, grid, mask) for k in range(grid.num_tokens)]


def test_the_place_order_is_a_plain_band_of_the_permuted_tokens():
    """|j_q − j_k| < width·P of j = p·F + f, built as SparseVideoGen does: in that layout, then permuted back."""
    grid = make_grid(4, 2, 3)
    j = torch.arange(24)
    band = (j[:, None] - j).abs() < 2 * 6
    back = band.reshape(6, 4, 6, 4).permute(1, 0, 3, 2).reshape(24, 24)
    assert torch.equal(BandMask(2.0, "frames", "place")(torch.arange(24), grid), back)


def test_the_two_orders_differ_at_the_bands_edges_only():
    grid = make_grid(3, 4, 4)
    rows = torch.arange(48)
    frame = BandMask(3.0, "places", "frame")(rows, grid)
    place = BandMask(3.0, "places", "place")(rows, grid)
    places = rows % 16
    apart = (places[:, None] - places).abs()
    assert (frame != place).any()
    assert ((frame == place) | (apart == 3) | (apart == 2)).all()


def test_a_band_runs_on_at_a_rows_end_and_the_place_mask_does_not():
    grid = make_grid(1, 2, 4)
    near = BandMask(2.0, "places")(torch.tensor([3]), grid)[0]
    assert near.nonzero().flatten().tolist() == [2, 3, 4]
    assert not MotionMask(1)(torch.tensor([3]), grid)[0, 4]


def test_masks_know_invalid_settings():
    with pytest.raises(ValueError, match="radius"):
        MotionMask(-1)
    with pytest.raises(ValueError, match="width must be positive"):
        BandMask(0.0)
    with pytest.raises(ValueError, match="unit must be one of frames, places"):
        BandMask(unit="pixels")
    with pytest.raises(ValueError, match="order must be one of frame, place"):
        BandMask(order="columns")
