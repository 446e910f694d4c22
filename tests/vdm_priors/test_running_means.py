"""Sums that become means in place, and the parts of a map that are worked on at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm_priors import attention_rows
from vdm_priors.attention_rows import tiles
from vdm_priors.errors import ModelError
from vdm_priors.running_means import RunningMeans

SHAPE = (2, 3, 4, 5)


def layers_and_forwards() -> torch.Tensor:
    """[layer, forward, B, heads, rows, columns]"""
    return torch.randn(3, 2, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("by_layer", [False, True])
def test_means_are_the_same_before_and_after_closing(by_layer):
    values, means = layers_and_forwards(), RunningMeans(by_layer)
    for forward in (0, 1):
        for layer in (2, 0, 1):  # layers are kept in order, whichever came first
            # in parts of rows, as a harvest comes
            parts = [((slice(None), slice(None), row), values[layer, forward][:, :, row]) for row in range(SHAPE[2])]
            means.add("t2v", layer, SHAPE, values.device, parts)
    expected = values.mean(dim=1).transpose(0, 1).flatten(1, 2) if by_layer else values.mean(dim=(0, 1))
    before = means.mean("t2v")
    torch.testing.assert_close(before, expected)
    means.close()
    assert torch.equal(means.mean("t2v"), before)


def test_one_large_sum_is_not_copied():
    means = RunningMeans(by_layer=False)
    for layer, value in enumerate((4.0, 2.0)):
        means.add("v2v", layer, SHAPE, torch.device("cpu"), [(..., torch.full(SHAPE, value))])
    means.close()
    assert (means.mean("v2v") == 3).all()
    assert means.mean("v2v").data_ptr() == means.mean("v2v").data_ptr()


def test_refusals():
    means = RunningMeans(by_layer=False)
    with pytest.raises(ModelError, match="nothing was recorded"):
        means.mean("t2v")
    means.add("t2v", 0, SHAPE, torch.device("cpu"), [(..., torch.zeros(SHAPE))])
    with pytest.raises(ModelError, match=r"\[2, 3, 4, 5\], and is \[2, 3, 4, 6\] in a later forward"):
        means.add("t2v", 1, (2, 3, 4, 6), torch.device("cpu"), [])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 60), st.integers(1, 2000))
def test_tiles_cover_every_number_once(batch, heads, rows, columns, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_rows, "TILE_ELEMENTS", {"cpu": limit})
        patch.setattr(attention_rows, "TILE_ROWS", 8)
        patch.setattr(attention_rows, "TILE_COLUMNS", 4)
        seen = torch.zeros(batch, heads, rows, columns)
        for where in tiles(seen.shape, seen.device):
            tile = seen[where]
            assert tile.numel() <= max(limit, batch * 8 * 4)
            tile += 1
    assert (seen == 1).all()
