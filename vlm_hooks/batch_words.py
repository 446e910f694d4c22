"""Which of a batch's captured rows are whose: the words of each video, and the rows and columns that are theirs.

Legend: B samples, N videos of them, R captured rows, C captured columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vlm_hooks.words import WordMatch

WHOLE = -1  # in the place of a word's index: what the words say together, for the answer's row


class Place(NamedTuple):
    """Where a video's rows and columns begin among those captured of its sample."""

    sample: int
    row: int
    column: int


def video_places(
    samples: Sequence[int], matches: Sequence[WordMatch | None], student_grids: Sequence[TokenGrid]
) -> list[Place]:
    """Places [N] of the videos, which follow each other in their samples."""
    places: list[Place] = []
    ends: dict[int, tuple[int, int]] = {}
    for sample, match, grid in zip(samples, matches, student_grids, strict=True):
        row, column = ends.get(sample, (0, 0))
        places.append(Place(sample, row, column))
        ends[sample] = (row + (0 if match is None else len(match.rows)), column + grid.num_tokens)
    return places


def matched_words(
    matches: Sequence[WordMatch | None], priors: Sequence[MotionPrior | None], videos: Sequence[Place], num_rows: int
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Words (video, index in its prior or WHOLE), flat token rows b·R + r, and each token's word."""
    words: list[tuple[int, int]] = []
    tokens: list[int] = []
    token_word: list[int] = []
    for video, (match, prior) in enumerate(zip(matches, priors, strict=True)):
        if match is None or prior is None:
            continue
        masses = (prior.maps * prior.grid.valid).flatten(1).sum(dim=1).tolist()
        row = videos[video].sample * num_rows + videos[video].row
        for index, positions in match.pairs:
            if masses[index] > 0:
                tokens.extend(range(row, row + len(positions)))
                token_word.extend([len(words)] * len(positions))
                words.append((video, index))
            row += len(positions)
        if match.answer is not None and max(masses) > 0:
            tokens.append(row)
            token_word.append(len(words))
            words.append((video, WHOLE))
    return words, tokens, token_word


def groups_of_words(
    words: Sequence[tuple[int, int]],
    student_grids: Sequence[TokenGrid],
    priors: Sequence[MotionPrior | None],
    videos: Sequence[Place],
) -> list[list[int]]:
    """Indices of the words whose videos have equal grids on both sides and begin at the same captured column."""
    groups: dict[tuple, list[int]] = {}
    keys: dict[int, tuple] = {}
    for index, (video, _) in enumerate(words):
        if video not in keys:
            keys[video] = (videos[video].column, *_key(student_grids[video]), *_key(priors[video].grid))
        groups.setdefault(keys[video], []).append(index)
    return list(groups.values())


def _key(grid: TokenGrid) -> tuple:
    parts = (grid.spans, grid.row_edges, grid.column_edges, grid.valid)
    return tuple(part.numpy().tobytes() for part in parts)
