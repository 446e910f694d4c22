"""Motion scores against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm_priors.tokens import motion_scores, motion_terms, select_tokens


def terms_by_loops(t2v, valid):
    means, fluctuations = [], []
    for token in t2v:
        per_frame = []
        for frame, mask in zip(token, valid, strict=True):
            cells = frame[mask].tolist()
            if cells:
                per_frame.append(sum(cells) / len(cells))
        means.append(sum(per_frame) / len(per_frame))
        changes = [abs(b - a) for a, b in zip(per_frame, per_frame[1:], strict=False)]
        fluctuations.append(sum(changes) / len(changes) if changes else 0.0)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(fluctuations, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.booleans())
def test_motion_terms_are_the_papers(seed, frames, holes):
    generator = torch.Generator().manual_seed(seed)
    t2v = torch.rand(4, frames, 2, 3, generator=generator, dtype=torch.float64)
    valid = torch.ones(frames, 2, 3, dtype=torch.bool)
    if holes:
        valid = torch.rand(frames, 2, 3, generator=generator) > 0.7
        valid[0, 0, 0] = True
    mean, fluctuation = motion_terms(t2v, valid if holes else None)
    expected = terms_by_loops(t2v, valid)
    torch.testing.assert_close(mean, expected[0])
    torch.testing.assert_close(fluctuation, expected[1])
    torch.testing.assert_close(motion_scores(t2v, valid if holes else None), sum(expected))


def test_one_frame_does_not_fluctuate():
    mean, fluctuation = motion_terms(torch.rand(3, 1, 2, 2))
    assert (fluctuation == 0).all() and (mean > 0).all()


def test_invalid_cells_may_hold_anything():
    t2v = torch.rand(2, 3, 2, 2)
    valid = torch.ones(3, 2, 2, dtype=torch.bool)
    valid[1, 0, 0] = False
    expected = motion_scores(t2v, valid)
    t2v[:, 1, 0, 0] = torch.nan
    assert torch.equal(motion_scores(t2v, valid), expected)


def test_motion_terms_say_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\[T, F, H, W\]"):
        motion_terms(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"valid must be \[F, H, W\]"):
        motion_terms(torch.rand(2, 3, 2, 2), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no cell is valid"):
        motion_terms(torch.rand(2, 3, 2, 2), torch.zeros(3, 2, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.5, [0, 1, 3]), (0.2, [1]), (0.21, [1, 3]), (1.0, [0, 1, 2, 3, 4])]
)
def test_select_tokens_keeps_the_best_and_the_earlier_of_equals(ratio, kept):
    scores = torch.tensor([0.5, 0.9, 0.5, 0.7, 0.1])
    assert select_tokens(scores, ratio).nonzero().flatten().tolist() == kept


def test_only_eligible_tokens_are_selected_and_counted():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    eligible = torch.tensor([False, True, False, True])
    assert select_tokens(scores, 0.5, eligible).tolist() == [False, True, False, False]
    assert not select_tokens(scores, 0.5, torch.zeros(4, dtype=torch.bool)).any()
    assert select_tokens(torch.zeros(0)).tolist() == []


@given(st.integers(1, 200), st.integers(1, 100))
def test_the_number_kept_is_the_ceiling(count, percent):
    kept = select_tokens(torch.zeros(count), percent / 100)
    assert int(kept.sum()) == -(-count * percent // 100)


def test_select_tokens_refuses_nonsense():
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        select_tokens(torch.rand(3), 0.0)
    with pytest.raises(ValueError, match="finite"):
        select_tokens(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="eligible"):
        select_tokens(torch.rand(3), 0.5, torch.ones(2, dtype=torch.bool))
