"""Which heads and which words make a prior: MHS and MTTI applied to one clip's harvest.

Legend: H heads, T text tokens, F×h×w token grid, S = F·h·w, N words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_priors.errors import SampleError
from vdm_priors.grid import TokenGrid
from vdm_priors.harvest import Harvest
from vdm_priors.head_errors import sampling_errors
from vdm_priors.heads import BandMask, MotionMask, RowStatistics, row_statistics, select_heads
from vdm_priors.settings import ExtractionSettings
from vdm_priors.tokens import motion_terms, select_tokens
from vdm_priors.words import Word, is_content_word, split_words, tokens_of_words


@dataclass(frozen=True)
class TeacherText:
    """A clip's text, its words, and the positions of the teacher's tokens of each word."""

    text: str
    words: list[Word]
    tokens: list[list[int]]
    last_token: int

    def not_covered(self) -> list[str]:
        """Words without a token: beyond the teacher's text limit."""
        pairs = zip(self.words, self.tokens, strict=True)
        return [word.text for word, tokens in pairs if not tokens]


def read_text(text: str, offsets: Sequence[tuple[int, int]]) -> TeacherText:
    """Words of a text and their tokens. Raises SampleError if no word has a token."""
    words = split_words(text)
    tokens = tokens_of_words(words, offsets)
    used = [token for of_word in tokens for token in of_word]
    if not used:
        raise SampleError(
            f"The text {text!r} has no word that the teacher could look for. Give a text with at "
            f"least one word."
        )
    return TeacherText(text, words, tokens, max(used))


def motion_mask(settings: ExtractionSettings) -> MotionMask | BandMask:
    """The mask M that settings name."""
    if settings.mask == "band":
        return BandMask(settings.band_width, settings.band_unit, settings.band_order, settings.mask_own_frame)
    return MotionMask(settings.mask_radius, settings.mask_own_frame)


def choose_heads(
    harvested: Harvest,
    rows: Tensor | None,
    clip: int,
    grid: TokenGrid,
    settings: ExtractionSettings,
) -> tuple[Tensor | None, dict[str, Any] | None]:
    """Bool [H] of the selected heads and their report; None for all (MHS off).

    The report has a list over heads of each metric, the score, and whether the head was selected; `rows`, how many
    query rows of how many cells they stand on; `error`, the metrics' and the score's standard errors, and
    `exchanged`, how many of the selected heads another draw of rows is expected to exchange (vdm_priors.head_errors;
    None where the rows are too few to tell).
    """
    if not settings.head_selection:
        return None, None
    if harvested.request.row_taker is None:
        statistics = row_statistics(harvested.v2v[clip], grid, motion_mask(settings), rows)
    else:
        statistics = RowStatistics.of_layers([taken.statistics() for taken in harvested.row_takers(clip)])
    metrics = statistics.metrics()
    errors = sampling_errors(statistics, settings.head_ratio)
    selected = select_heads(metrics, settings.head_ratio)
    report = {
        "dfc": _singles(metrics.dfc),
        "tcs": _singles(metrics.tcs),
        "dsr": _singles(metrics.dsr),
        "score": _singles(metrics.score()),
        "selected": selected.tolist(),
        "rows": [len(statistics.rows), int(grid.valid.sum())],
        "error": errors and {name: _singles(getattr(errors, name)) for name in ("dfc", "tcs", "dsr", "score")},
        "exchanged": errors and errors.exchanged,
    }
    return selected, report


def _singles(values: Tensor) -> list[float]:
    """In single precision, as a prior's file stores long lists: with layer_head, there are thousands of heads."""
    return values.float().tolist()


def text_maps(
    harvested: Harvest, clip: int, heads: Tensor | None, read: TeacherText, direction: str
) -> Tensor:
    """[T, S] on the CPU: the clip's text-vision attention in one direction, mean over the selected heads.

    For direction "both", the mean of the two corners with the vision rows' scaled to the text
    rows' total mass, for a text row spreads one unit of mass and each vision row another one.
    Masses are those of the tokens of `read`'s own words: T follows the longest text of the
    batch, so a sum over all of T would count the end and padding tokens of a shorter text.
    """

    def mean(of_bhts: Tensor) -> Tensor:
        of_hts = of_bhts[clip]
        return (of_hts if heads is None else of_hts[heads.to(of_hts.device)]).mean(dim=0).cpu()

    if direction != "both":
        return mean(harvested.t2v if direction == "t2v" else harvested.v2t)
    text_rows, vision_rows = mean(harvested.t2v), mean(harvested.v2t)
    own = sorted({token for of_word in read.tokens for token in of_word})
    return (text_rows + vision_rows * (text_rows[own].sum() / vision_rows[own].sum())) / 2


def choose_words(
    maps_tfhw: Tensor, read: TeacherText, grid: TokenGrid, settings: ExtractionSettings
) -> tuple[list[Word], Tensor, list[dict[str, Any]]]:
    """The motion-salient words, their maps [N, F, h, w], and the scores of all covered words.

    token_unit "token": the best ⌈ratio⌉ of the tokens that belong to a word are kept (the
    paper's T_m), and with each its word; the score reported is that of the word's best token.
    "word": words are scored by their maps, the mean of their tokens' rows. With words "content",
    function words are scored but never kept, unless there are no others.
    """
    covered = [i for i, tokens in enumerate(read.tokens) if tokens]
    candidates = [settings.words == "all" or is_content_word(read.words[i]) for i in covered]
    candidates = candidates if any(candidates) else [True] * len(covered)
    word_maps = torch.stack([maps_tfhw[read.tokens[i]].mean(dim=0) for i in covered])
    if settings.token_unit == "word":
        mean, fluctuation = motion_terms(word_maps, grid.valid)
        deciding = list(range(len(covered)))
        kept = select_tokens(mean + fluctuation, settings.token_ratio, torch.tensor(candidates))
    else:
        mean, fluctuation = motion_terms(maps_tfhw, grid.valid)
        score = mean + fluctuation
        deciding = [max(read.tokens[i], key=lambda t: float(score[t])) for i in covered]
        eligible = torch.zeros(len(score), dtype=torch.bool)
        eligible[[token for i, may in zip(covered, candidates, strict=True) if may for token in read.tokens[i]]] = True
        kept = select_tokens(score, settings.token_ratio, eligible)
    report = []
    for i, unit, may in zip(covered, deciding, candidates, strict=True):
        word = read.words[i]
        report.append(
            {
                "text": word.text,
                "start": word.start,
                "end": word.end,
                "score": float(mean[unit] + fluctuation[unit]),
                "mean": float(mean[unit]),
                "fluctuation": float(fluctuation[unit]),
                "selected": may and (bool(kept[unit]) or not settings.token_selection),
            }
        )
    chosen = [n for n, entry in enumerate(report) if entry["selected"]]
    return [read.words[covered[n]] for n in chosen], word_maps[chosen], report
