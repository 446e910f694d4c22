"""The alignment of the student's attention with the motion prior.

Per word: student row --regrid--> prior's grid --normalise--> aligner --> distance to the
prior's map; or, with compare_on "student", the prior is carried to the student's grid instead.
(MotionEnhancer Eq. 15: L = L_AR + λ ‖Aligner(A_VLM) − A_VDM‖₂.)

Legend: B samples, N videos of them, W words (of one or many videos), R captured rows, C captured columns,
F×H×W cells of a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vdm_priors.errors import UserError
from vdm_priors.grid import TokenGrid, covered_share, regrid
from vdm_priors.prior import MotionPrior
from vlm_hooks.batch_words import WHOLE, groups_of_words, matched_words, video_places
from vlm_hooks.capture import CaptureRequest
from vlm_hooks.words import WordMatch

LOSSES = ("l2", "mse", "kl", "js", "cosine")
NORMALIZATIONS = ("none", "row")
GRIDS = ("prior", "student")
REDUCTIONS = ("mean", "none")
LEAST_COVERED = 0.5  # a cell counts where the other side's cells cover at least this share of it
TINY = 1e-12


def normalize_rows(rows_wfhw: Tensor, how: str = "row") -> Tensor:
    """Rows [W, F, H, W] as they are ("none") or each divided by its mass ("row")."""
    if how == "none":
        return rows_wfhw
    if how == "row":
        mass = rows_wfhw.sum(dim=(1, 2, 3), keepdim=True)
        return rows_wfhw / mass.clamp(min=TINY)
    raise UserError(f"Unknown normalisation {how!r}: choose one of {', '.join(NORMALIZATIONS)}.")


def row_losses(student_wfhw: Tensor, prior_wfhw: Tensor, kind: str = "l2") -> Tensor:
    """Distance [W] of each word's row from its prior.

    l2: ‖a − p‖₂ (Eq. 15); mse: its square (Eq. 20), summed over cells, not averaged; kl:
    KL(p ‖ a) and js: Jensen-Shannon divergence in nats, both sides made distributions;
    cosine: 1 − cos. Raises UserError for an unknown kind.
    """
    student, prior = student_wfhw.flatten(1), prior_wfhw.flatten(1)
    if kind == "l2":
        return torch.linalg.vector_norm(student - prior, dim=1)
    if kind == "mse":
        return (student - prior).square().sum(dim=1)
    if kind == "kl":
        return _divergence(_distribution(prior), _distribution(student))
    if kind == "js":
        student, prior = _distribution(student), _distribution(prior)
        middle = (student + prior) / 2
        return (_divergence(prior, middle) + _divergence(student, middle)) / 2
    if kind == "cosine":
        return 1 - nn.functional.cosine_similarity(student, prior, dim=1, eps=TINY)
    raise UserError(f"Unknown alignment loss {kind!r}: choose one of {', '.join(LOSSES)}.")


def _distribution(rows: Tensor) -> Tensor:
    # an aligner's output may be negative; TINY keeps the logarithm finite
    rows = rows.clamp(min=0) + TINY
    return rows / rows.sum(dim=1, keepdim=True)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(dim=1)


def alignment_loss(
    student: Tensor,
    prior: Tensor,
    kind: str = "l2",
    weight: Tensor | None = None,
    normalize: str = "row",
    valid: Tensor | None = None,
    aligner: nn.Module | None = None,
    reduction: str = "mean",
    sharpen: float = 1.0,
) -> Tensor:
    """weight × distance of rows [W, F, H, W] on one grid: its mean over words, or [W] for reduction "none".

    Both sides are cut to the `valid` cells [F, H, W] (default all) before they are normalised; the
    aligner acts on the student's normalised rows. sharpen: exponent γ of the prior's cells before
    they are normalised, p^γ / Σ p^γ; above 1 a diffuse prior gathers at its peaks. weight [W]
    (confidence, default 1) scales a word's distance and is not divided out again: words of low
    confidence align less. No words have the mean 0. Raises UserError for unknown names and for what
    needs normalised rows (kl, js, sharpen) without them, ValueError for rows of two shapes.
    """
    _check(kind, normalize, sharpen)
    if student.shape != prior.shape or student.ndim != 4:
        raise ValueError(
            f"alignment_loss: student {list(student.shape)} and prior {list(prior.shape)} must "
            "be rows [W, F, H, W] of one grid."
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"alignment_loss: reduction is one of {', '.join(REDUCTIONS)}, not {reduction!r}.")
    if valid is not None:
        student, prior = student * valid, prior * valid
    if sharpen != 1:
        peak = prior.amax(dim=(1, 2, 3), keepdim=True)  # relative to it: a power of small numbers would vanish
        prior = (prior / torch.where(peak > 0, peak, 1.0)) ** sharpen
    student, prior = normalize_rows(student, normalize), normalize_rows(prior, normalize)
    if aligner is not None:
        student = aligner(student)
        if valid is not None:  # an aligner may put something into cells that do not count
            student = student * valid
    losses = row_losses(student, prior, kind)
    if weight is not None:
        losses = losses * weight
    if reduction == "none":
        return losses
    return losses.mean() if len(losses) else losses.sum()


def _check(kind: str, normalize: str, sharpen: float) -> None:
    if kind in ("kl", "js") and normalize != "row":
        raise UserError(f'The alignment loss "{kind}" compares distributions: set normalize "row".')
    if sharpen != 1 and normalize != "row":
        raise UserError('sharpen loses the scale of a prior: set normalize "row", or leave sharpen at 1.')


@dataclass(frozen=True)
class AlignmentResult:
    """Alignment of one batch: `loss` (scalar, differentiable) and what it stands on.

    words_matched of words_total prior words took part, an answer's row counting as one;
    video_mass: the share of the matched tokens' attention that falls on the captured columns,
    before any normalisation (mean).
    """

    loss: Tensor
    words_matched: int
    words_total: int
    video_mass: Tensor


def align_batch(
    captured: CaptureRequest,
    matches: Sequence[WordMatch | None],
    student_grids: Sequence[TokenGrid],
    priors: Sequence[MotionPrior | None],
    aligner: nn.Module | None = None,
    kind: str = "l2",
    normalize: str = "row",
    regrid_mode: str = "overlap",
    compare_on: str = "prior",
    sharpen: float = 1.0,
    samples: Sequence[int] | None = None,
) -> AlignmentResult:
    """Alignment loss of a batch of B samples from captured rows.

    captured: the request whose rows of sample b were `matches[b].rows` and whose columns were
    its visual tokens, in the order of `student_grids[b]`; a None match or prior leaves the
    sample out. Where samples show several videos, matches, grids and priors are of the N videos
    and `samples` [N] says of which sample each is: a sample's rows and columns are then those of
    its videos, one video after the other, and a video's prior is compared with its own columns
    alone. A word's row is the mean of its tokens' rows; an answer's row is compared with
    what the words say together (`together`). The loss is the mean over words
    of weight × distance within a sample, then the mean over all B samples (one without words
    counts 0), so that it does not depend on how a batch is divided for accumulation. A word
    whose prior has no mass in the cells that are compared says nothing and counts as unmatched.

    compare_on "prior": the student's rows are carried to the prior's grid (the paper). An l2
    distance there shrinks as that grid gets finer, and detail within a visual token, which the
    student cannot follow, damps its gradient. "student": the priors are carried to the
    student's grid, where sources of any resolution count alike. Either way, cells of the grid
    that the other side covers by less than half (moments or borders that it did not see) are
    left out on both sides before normalising. Raises UserError for unknown names.
    """
    _check(kind, normalize, sharpen)
    if compare_on not in GRIDS:
        raise UserError(f"Unknown grid {compare_on!r} to compare on: choose one of {', '.join(GRIDS)}.")
    attention_brc = captured.mean()
    device = attention_brc.device
    videos = video_places(range(len(matches)) if samples is None else samples, matches, student_grids)
    words, tokens, token_word = matched_words(matches, priors, videos, attention_brc.shape[1])
    words_total = sum(len(prior.words) for prior in priors if prior is not None)
    words_total += sum(match is not None and match.answer is not None for match in matches)
    if not words:
        nothing = attention_brc.sum() * 0.0
        return AlignmentResult(nothing, 0, words_total, nothing.detach())

    # mean of each word's token rows: [number of words, C]
    token_rows = attention_brc.flatten(0, 1)[torch.tensor(tokens, device=device)]
    owner = torch.tensor(token_word, device=device)
    counts = torch.bincount(owner, minlength=len(words)).to(token_rows.dtype)
    summed = token_rows.new_zeros(len(words), token_rows.shape[1])
    rows_wc = summed.index_add(0, owner, token_rows) / counts[:, None]
    video_mass = token_rows.detach().sum(dim=1).mean()

    losses, order, says = [], [], []
    for members in groups_of_words(words, student_grids, priors, videos):
        first = words[members[0]][0]
        column = videos[first].column
        student_grid, prior = student_grids[first], priors[first]
        chosen = [(priors[words[m][0]], words[m][1]) for m in members]
        prior_rows = torch.stack([together(p) if n == WHOLE else p.maps[n] for p, n in chosen])
        weights = torch.stack([p.weight.mean() if n == WHOLE else p.weight[n] for p, n in chosen])
        rows = rows_wc[torch.tensor(members, device=device), column : column + student_grid.num_tokens]
        rows = rows.reshape(-1, *student_grid.shape)
        if compare_on == "prior":
            rows = regrid(rows, student_grid, prior.grid, regrid_mode)
            valid = prior.grid.valid & (covered_share(student_grid, prior.grid) >= LEAST_COVERED)
        else:
            prior_rows = regrid(prior_rows, prior.grid, student_grid, regrid_mode)
            valid = student_grid.valid & (covered_share(prior.grid, student_grid) >= LEAST_COVERED)
        losses.append(alignment_loss(rows, prior_rows.to(device), kind, weights.to(device), normalize,
                                     valid.to(device), aligner, "none", sharpen))
        says.append((prior_rows * valid).sum(dim=(1, 2, 3)) > 0)
        order += members
    says = torch.cat(says)
    batch = len(attention_brc)
    sample_of = torch.tensor([videos[words[m][0]].sample for m in order])
    heard = torch.bincount(sample_of, weights=says.double(), minlength=batch)  # words of each sample that count
    share = torch.where(says, 1 / heard[sample_of].clamp(min=1), 0.0).to(device, attention_brc.dtype) / batch
    loss = (torch.cat(losses) * share).sum()
    return AlignmentResult(loss, int(says.sum()), words_total, video_mass)


def together(prior: MotionPrior) -> Tensor:
    """What a prior's words say together, [F, H, W]: the mean of their maps, each of equal mass, by their weights."""
    weight = prior.weight if prior.weight.sum() > 0 else torch.ones_like(prior.weight)
    share = weight / weight.sum()
    maps = prior.maps * prior.grid.valid
    return (normalize_rows(maps) * share[:, None, None, None]).sum(dim=0) * maps.sum(dim=(1, 2, 3)).mean()
