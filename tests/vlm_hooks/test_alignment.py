"""Alignment: losses and aligners by plain formulas, batches by a plain loop, gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.vlm_hooks.tiny_student import make_clip, tiny_student
from vdm_priors.errors import UserError
from vdm_priors.grid import TokenGrid, regrid
from vdm_priors.prior import MotionPrior
from vdm_priors.words import Word, split_words
from vlm_hooks.aligners import ALIGNERS, build_aligner
from vlm_hooks.alignment import (
    LOSSES,
    align_batch,
    alignment_loss,
    normalize_rows,
    row_losses,
)
from vlm_hooks.capture import CaptureRequest, capture
from vlm_hooks.words import WordMatch, match_words


def make_grid(frames, rows, columns, duration=2.0, valid=None):
    edges = torch.linspace(0, duration, frames + 1, dtype=torch.float64)
    spans = torch.stack([edges[:-1], edges[1:]], dim=1)
    return TokenGrid.regular(spans, rows, columns, valid=valid)


def make_prior(words, grid, seed=0, weight=None):
    generator = torch.Generator().manual_seed(seed)
    text = " ".join(f"w{i}" for i in range(words))
    maps = torch.rand(words, *grid.shape, generator=generator)
    weight = torch.ones(words) if weight is None else torch.tensor(weight)
    return MotionPrior(text, split_words(text), maps, grid, weight)


class Captured:
    """Stands for a CaptureRequest after the forward."""

    def __init__(self, rows_brc):
        self.rows_brc = rows_brc

    def mean(self):
        return self.rows_brc


def test_sharpening_is_a_power_of_the_prior_and_keeps_the_best_row():
    student, prior = torch.rand(2, 2, 3, 3), torch.rand(2, 2, 3, 3) + 0.01
    powered = torch.stack([row**3 / (row**3).sum() for row in prior])
    expected = alignment_loss(student, powered, "mse")
    torch.testing.assert_close(alignment_loss(student, prior, "mse", sharpen=3.0), expected)
    tiny = prior * 1e-30  # a power of it would be 0
    torch.testing.assert_close(alignment_loss(student, tiny, "mse", sharpen=3.0), expected)
    with pytest.raises(UserError, match="sharpen"):
        alignment_loss(student, prior, "mse", normalize="none", sharpen=2.0)


# --- losses ------------------------------------------------------------------------------


def test_losses_equal_their_formulas():
    torch.manual_seed(0)
    a, p = (normalize_rows(torch.rand(3, 2, 4, 5)) for _ in range(2))
    for kind in LOSSES:
        got = row_losses(a, p, kind)
        for w in range(3):
            x, y = a[w].flatten().tolist(), p[w].flatten().tolist()
            middle = [(i + j) / 2 for i, j in zip(x, y, strict=True)]
            square = sum((i - j) ** 2 for i, j in zip(x, y, strict=True))

            def kl(first, second):
                return sum(i * math.log(i / j) for i, j in zip(first, second, strict=True))

            expected = {
                "l2": math.sqrt(square),
                "mse": square,
                "kl": kl(y, x),
                "js": (kl(y, middle) + kl(x, middle)) / 2,
                "cosine": 1
                - sum(i * j for i, j in zip(x, y, strict=True))
                / math.sqrt(sum(i * i for i in x) * sum(j * j for j in y)),
            }[kind]
            assert got[w].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_equal_rows_have_no_distance_and_a_finite_gradient(kind):
    rows = torch.rand(2, 1, 3, 3, requires_grad=True)
    loss = alignment_loss(rows, rows.detach() * 7, kind)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5) and rows.grad.isfinite().all()


def test_normalisation_none_compares_raw_mass():
    rows = torch.rand(2, 1, 3, 3)
    raw = alignment_loss(rows, rows * 2, "l2", normalize="none")
    assert raw == rows.flatten(1).norm(dim=1).mean()
    for kind in ("kl", "js"):
        with pytest.raises(UserError, match='normalize "row"'):
            alignment_loss(rows, rows, kind, normalize="none")


def test_weights_scale_words_and_are_not_divided_out():
    a, p = torch.rand(2, 1, 2, 2), torch.rand(2, 1, 2, 2)
    each = row_losses(normalize_rows(a), normalize_rows(p))
    got = alignment_loss(a, p, weight=torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(got, each[0] * 0.5 / 2)
    assert alignment_loss(a[:0], p[:0]) == 0


def test_wrong_names_and_shapes_are_refused():
    rows = torch.rand(1, 1, 2, 2)
    with pytest.raises(UserError, match="alignment loss 'l3': choose one of l2"):
        alignment_loss(rows, rows, "l3")
    with pytest.raises(UserError, match="normalisation 'rows'"):
        alignment_loss(rows, rows, normalize="rows")
    with pytest.raises(UserError, match="aligner 'mlp': choose one of pointwise"):
        build_aligner("mlp")
    with pytest.raises(UserError, match="grid shape"):
        build_aligner("row")
    with pytest.raises(ValueError, match="one grid"):
        alignment_loss(rows, torch.rand(1, 1, 2, 3))
    with pytest.raises(ValueError, match="reduction is one of mean, none"):
        alignment_loss(rows, rows, reduction="sum")


# --- aligners ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALIGNERS)
def test_aligners_start_as_identity_and_learn(kind):
    torch.manual_seed(0)
    aligner = build_aligner(kind, (2, 3, 4), hidden=16)
    rows = normalize_rows(torch.rand(5, 2, 3, 4)).requires_grad_()
    assert torch.equal(aligner(rows), rows)
    if kind == "identity":
        return
    target = normalize_rows(torch.rand(5, 2, 3, 4)) if kind == "row" else rows.detach() * 1.5
    optimizer = torch.optim.Adam(aligner.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = row_losses(aligner(rows), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in aligner.parameters())


def test_pointwise_treats_cells_alike_and_any_grid():
    torch.manual_seed(0)
    aligner = build_aligner("pointwise")
    torch.nn.init.normal_(aligner.net[-1].weight)
    rows = torch.rand(2, 1, 3, 4)
    turned = aligner(rows.flip(3)).flip(3)
    torch.testing.assert_close(aligner(rows), turned)
    assert aligner(torch.rand(1, 5, 2, 2)).shape == (1, 5, 2, 2)


def test_row_aligner_refuses_another_grid():
    with pytest.raises(UserError, match=r"\(2, 3, 4\) cells, but a prior has \(1, 2, 2\)"):
        build_aligner("row", (2, 3, 4))(torch.rand(1, 1, 2, 2))


# --- batches -------------------------------------------------------------------------------


def plain_align(rows_brc, matches, grids, priors, kind, normalize, mode):
    """The definition, word by word."""
    total, mass = 0.0, []
    for b, (match, prior) in enumerate(zip(matches, priors, strict=True)):
        if match is None or prior is None or not match.pairs:
            continue
        at, losses = 0, []
        for index, positions in match.pairs:
            tokens = rows_brc[b, at : at + len(positions)]
            at += len(positions)
            mass += tokens.sum(dim=1).tolist()
            row = tokens.mean(dim=0)[: grids[b].num_tokens].reshape(1, *grids[b].shape)
            row = normalize_rows(regrid(row, grids[b], prior.grid, mode), normalize)
            target = prior.maps[index : index + 1] * prior.grid.valid
            target = normalize_rows(target, normalize)
            losses.append(row_losses(row, target, kind)[0] * prior.weight[index])
        if match.answer is not None:
            mass.append(float(rows_brc[b, at].sum()))
            row = rows_brc[b, at, : grids[b].num_tokens].reshape(1, *grids[b].shape)
            row = normalize_rows(regrid(row, grids[b], prior.grid, mode), normalize)
            target = torch.zeros(1, *prior.grid.shape)
            for each, weight in zip(prior.maps * prior.grid.valid, prior.weight, strict=True):
                target += each / each.sum() * weight
            losses.append(row_losses(row, normalize_rows(target, normalize), kind)[0] * prior.weight.mean())
        total = total + torch.stack(losses).mean()
    return total / len(matches), sum(mass) / len(mass)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("mode", ["overlap", "trilinear"])
@pytest.mark.parametrize("answers", [0, 2])
def test_batch_equals_a_plain_loop(kind, mode, answers):
    torch.manual_seed(0)
    valid = torch.rand(3, 4, 4) > 0.2
    prior_grids = [make_grid(3, 4, 4, valid=valid), make_grid(2, 3, 5)]
    grids = [make_grid(4, 2, 3), make_grid(4, 2, 3), make_grid(2, 3, 3), make_grid(4, 2, 3)]
    priors = [
        make_prior(3, prior_grids[0], 0),
        make_prior(2, prior_grids[0], 1, [0.25, 1.0]),
        make_prior(2, prior_grids[1], 2),
        None,
    ]
    matches = [
        WordMatch([(0, [5]), (2, [7, 8, 9])], [1]),
        WordMatch([(0, [3, 4]), (1, [6])], []),
        WordMatch([(1, [2])], [0]),
        WordMatch([(0, [2])], []),
    ]
    matches = [replace(match, answer=10) if b < answers else match for b, match in enumerate(matches)]
    rows = torch.rand(4, 5, 24)
    rows[2, :, 18:] = 0  # a shorter grid: padded columns
    result = align_batch(Captured(rows), matches, grids, priors, None, kind, "row", mode)
    loss, mass = plain_align(rows, matches, grids, priors, kind, "row", mode)
    torch.testing.assert_close(result.loss, loss)
    assert result.video_mass.item() == pytest.approx(mass)
    assert (result.words_matched, result.words_total) == (5 + answers, 7 + answers)


def test_videos_of_a_sample_have_rows_and_columns_of_their_own():
    """Each by itself, then the mean over the words of a sample's videos; other words, grids and an answer's row."""
    torch.manual_seed(0)
    grids = [make_grid(2, 2, 3), make_grid(2, 1, 2), make_grid(2, 2, 3)]  # 12, 4 and 12 columns
    shapes = [(3, make_grid(2, 2, 2)), (2, make_grid(3, 2, 2)), (1, make_grid(2, 2, 2))]
    priors = [make_prior(words, grid, seed) for seed, (words, grid) in enumerate(shapes)]
    matches = [WordMatch([(0, [3]), (2, [5, 6])], [1]), WordMatch([(0, [4]), (1, [3])], [], answer=9),
               WordMatch([(0, [2])], [])]
    rows = torch.rand(2, 6, 16)
    rows[1, 1:], rows[1, :, 12:] = 0, 0  # padding
    result = align_batch(Captured(rows), matches, grids, priors, samples=[0, 0, 1])
    places = [(0, slice(0, 3), slice(0, 12)), (0, slice(3, 6), slice(12, 16)), (1, slice(0, 1), slice(0, 12))]
    alone = [align_batch(Captured(rows[b : b + 1, r, c]), [match], [grid], [prior]).loss
             for (b, r, c), match, grid, prior in zip(places, matches, grids, priors, strict=True)]
    expected = ((2 * alone[0] + 3 * alone[1]) / 5 + alone[2]) / 2
    torch.testing.assert_close(result.loss, expected)
    assert (result.words_matched, result.words_total) == (6, 7)
    without = align_batch(Captured(rows), [matches[0], None, matches[2]], grids, [priors[0], None, priors[2]],
                          samples=[0, 0, 1])
    torch.testing.assert_close(without.loss, (alone[0] + alone[2]) / 2)


def test_division_for_accumulation_does_not_change_the_loss():
    torch.manual_seed(0)
    grid, rows = make_grid(2, 2, 2), torch.rand(4, 3, 8)
    priors = [make_prior(3, grid, seed) for seed in range(3)] + [None]
    matches = [WordMatch([(i, [i]) for i in range(n)], []) for n in (1, 3, 2)] + [None]
    whole = align_batch(Captured(rows), matches, [grid] * 4, priors).loss
    parts = [
        align_batch(Captured(rows[b : b + 1]), matches[b : b + 1], [grid], priors[b : b + 1]).loss
        for b in range(4)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_no_words_give_a_zero_that_can_be_differentiated():
    rows = torch.rand(2, 0, 8, requires_grad=True)
    grid = make_grid(2, 2, 2)
    silent = make_prior(1, grid)
    silent.maps.zero_()
    cases = [([None, None], [None, None], 0), ([WordMatch([], [0])] * 2, [silent] * 2, 2)]
    for matches, priors, total in cases:
        result = align_batch(Captured(rows), matches, [grid] * 2, priors)
        result.loss.backward()
        assert result.loss == 0 and (result.words_matched, result.words_total) == (0, total)
    rows = torch.rand(1, 1, 8)
    result = align_batch(Captured(rows), [WordMatch([(0, [4])], [])], [grid], [silent])
    assert result.words_matched == 0 and result.loss == 0


def test_aligned_rows_have_a_smaller_loss_than_shuffled_ones():
    grid = make_grid(2, 4, 4)
    priors = [make_prior(2, grid, seed) for seed in range(3)]
    matches = [WordMatch([(0, [0]), (1, [1])], [])] * 3
    rows = torch.stack([prior.maps.flatten(1) for prior in priors]) * 0.01
    right = align_batch(Captured(rows), matches, [grid] * 3, priors).loss
    wrong = align_batch(Captured(rows.roll(1, 0)), matches, [grid] * 3, priors).loss
    swapped = align_batch(Captured(rows.flip(1)), matches, [grid] * 3, priors).loss
    assert right < 1e-6 < wrong and swapped > 1e-3


@pytest.mark.parametrize("kind", ["l2", "mse", "kl"])
def test_on_the_students_grid_resolution_of_the_prior_does_not_matter(kind):
    """A prior and the same prior on cells cut in eight give one loss there, but not on their own grids."""
    coarse, fine, student_grid = make_grid(2, 4, 4), make_grid(4, 8, 8), make_grid(2, 2, 2)
    prior = make_prior(1, coarse)
    cut = MotionPrior(prior.text, prior.words, regrid(prior.maps, coarse, fine), fine, prior.weight)
    rows = torch.rand(1, 1, student_grid.num_tokens)
    matches = [WordMatch([(0, [0])], [])]

    def loss(of, on):
        return align_batch(Captured(rows), matches, [student_grid], [of], kind=kind, compare_on=on).loss

    torch.testing.assert_close(loss(prior, "student"), loss(cut, "student"))
    if kind != "kl":
        assert loss(cut, "prior") < 0.5 * loss(prior, "prior")


def test_on_the_students_grid_cells_the_prior_did_not_see_are_left_out():
    """A prior of the left half: attention to the right half costs nothing, and the loss is that of the halves alone."""
    student_grid = make_grid(1, 2, 4)
    spans = student_grid.spans
    half = TokenGrid.regular(spans, 2, 2, box=(0.0, 0.0, 1.0, 0.5))
    prior = MotionPrior("w0", split_words("w0"), torch.tensor([[[[1.0, 0.0], [2.0, 1.0]]]]), half, torch.ones(1))
    matches = [WordMatch([(0, [0])], [])]
    row = torch.tensor([[1.0, 0.0, 5.0, 9.0], [2.0, 1.0, 7.0, 3.0]])
    same = align_batch(Captured(row.reshape(1, 1, 8)), matches, [student_grid], [prior], compare_on="student").loss
    assert same < 1e-6
    row[0, 0] = 3.0
    got = align_batch(Captured(row.reshape(1, 1, 8)), matches, [student_grid], [prior], compare_on="student").loss
    expected = (torch.tensor([3.0, 0.0, 2.0, 1.0]) / 6 - torch.tensor([1.0, 0.0, 2.0, 1.0]) / 4).norm()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("mode", ["overlap", "trilinear"])
def test_on_the_priors_grid_moments_the_student_did_not_see_are_left_out(kind, mode):
    """A flat prior of 0-4 s and flat attention to 0-2 s agree wherever both can."""
    student_grid, prior_grid = make_grid(2, 2, 2, duration=2.0), make_grid(4, 4, 4, duration=4.0)
    prior = MotionPrior("w0", split_words("w0"), torch.ones(1, 4, 4, 4), prior_grid, torch.ones(1))
    matches = [WordMatch([(0, [0])], [])]
    for aligner in (None, build_aligner("conv3d")):
        captured = Captured(torch.full((1, 1, 8), 0.1))
        loss = align_batch(captured, matches, [student_grid], [prior], aligner, kind, "row", mode).loss
        assert loss.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("on", ["prior", "student"])
def test_words_that_speak_only_of_unseen_moments_count_as_unmatched(on):
    """One of two words has its mass in seconds 2-4, which the student did not see: the mean is the other's distance."""
    student_grid, prior_grid = make_grid(2, 2, 2, duration=2.0), make_grid(4, 2, 2, duration=4.0)
    maps = torch.zeros(2, 4, 2, 2)
    maps[0, 3], maps[1, 0] = 1.0, 1.0
    prior = MotionPrior("w0 w1", split_words("w0 w1"), maps, prior_grid, torch.ones(2))
    matches, rows = [WordMatch([(0, [0]), (1, [1])], [])], torch.rand(1, 2, 8)
    both = align_batch(Captured(rows), matches, [student_grid], [prior], compare_on=on)
    one = align_batch(Captured(rows[:, 1:]), [WordMatch([(1, [1])], [])], [student_grid], [prior], compare_on=on)
    assert (both.words_matched, both.words_total) == (1, 2)
    torch.testing.assert_close(both.loss, one.loss)


def test_unknown_grid_to_compare_on_is_refused():
    with pytest.raises(UserError, match="compare on"):
        align_batch(Captured(torch.rand(1, 0, 8)), [None], [make_grid(2, 2, 2)], [None], compare_on="teacher")


# --- through the model -----------------------------------------------------------------------


@pytest.mark.parametrize("aligner_kind", ["pointwise", "identity", "conv3d"])
def test_gradient_reaches_every_captured_layer(aligner_kind):
    student = tiny_student()
    question = "Does the ball roll?"
    prompt = student.prompt(question)
    clips = [make_clip(4), make_clip(5, 48, 32)]
    encoding = student.encode(clips, [prompt.text] * 2, ["yes", "no"])
    grids, columns = student.grids(encoding.inputs, clips)
    ball = question.index("ball")
    words = [Word("ball", ball, ball + 4), Word("roll", ball + 5, ball + 9)]
    prior_grid = make_grid(3, 4, 4)
    priors = [
        MotionPrior(question, words, torch.rand(2, 3, 4, 4), prior_grid, torch.ones(2))
        for _ in clips
    ]
    matches = [
        match_words(words, question, text, offsets, prompt.question_start)
        for text, offsets in zip(encoding.texts, encoding.offsets, strict=True)
    ]
    request = CaptureRequest.from_positions([m.rows for m in matches], columns)
    with capture(student.model):
        student.model(**encoding.inputs, motion_capture=request)
    aligner = build_aligner(aligner_kind)
    result = align_batch(request, matches, grids, priors, aligner)
    assert (result.words_matched, result.words_total) == (4, 4)
    assert 0 < result.video_mass < 1
    result.loss.backward()
    for layer in student.model.model.language_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            assert projection.weight.grad.abs().max() > 0
    visual = student.model.model.visual
    assert visual.merger.mlp[0].weight.grad.abs().max() > 0
    assert visual.patch_embed.proj.weight.grad.abs().max() > 0
