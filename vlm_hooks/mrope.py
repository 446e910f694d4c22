"""Multimodal rotary positions (M-RoPE, Qwen2-VL, section 2.1) of sequences with a stream of visual tokens.

Where a family counts seconds, or frames, on the temporal axis, all visual tokens of the stream share one origin and the
temporal position is the true time. The text between them (labels) lies at the time of what it names, in order along
the other two axes, so that it neither shifts what follows in time nor loses its own order. Where a family tells time in
text (Qwen3-VL), each row in time is a block of its own, as in its stock sequences.

Legend: S sequence positions; the three rows of positions are time, row and column.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlm_hooks.streams import StreamPlaces


def timed_positions(places: StreamPlaces, ticks: Callable[[Tensor], Tensor]) -> Tensor:
    """Positions [3, S] on one origin. ticks: seconds [n] after the stream's first to steps [n] of the temporal axis."""
    stream, visual = places.stream, places.visual
    before = int(stream.nonzero()[0])
    after = int(stream.nonzero()[-1]) + 1
    positions = torch.arange(len(stream)).expand(3, -1).clone()
    row, column = places.row.clone(), places.column.clone()
    count = 0  # of label tokens since the last visual one
    for index in range(before, after):
        count = 0 if visual[index] else count + 1
        if count:
            row[index] = column[index] = count - 1
    positions[0, before:after] = before + ticks(places.time[before:after])
    positions[1, before:after] = before + row[before:after]
    positions[2, before:after] = before + column[before:after]
    # the stock rule: what follows a video goes on behind its rows and columns, however long it lasts
    extent = 1 + int(torch.maximum(row, column)[before:after].max())
    positions[:, after:] = before + extent + torch.arange(len(stream) - after)
    return positions


def block_positions(places: StreamPlaces) -> Tensor:
    """Positions [3, S] with each row in time (block) at the place that the sequence has come to, as text would be."""
    pieces, current, index = [], 0, 0
    visual, block = places.visual.tolist(), places.block.tolist()
    while index < len(visual):
        end = index + 1
        while end < len(visual) and visual[end] == visual[index] and (not visual[index] or block[end] == block[index]):
            end += 1
        if visual[index]:
            row, column = places.row[index:end], places.column[index:end]
            pieces.append(current + torch.stack([torch.zeros_like(row), row, column]))
            current += 1 + int(torch.maximum(row, column).max())
        else:
            pieces.append((current + torch.arange(end - index)).expand(3, -1))
            current += end - index
        index = end
    return torch.cat(pieces, dim=1)
