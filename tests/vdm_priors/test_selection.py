"""The choice of heads and words, and the corner of the attention that makes the maps, against plain loops."""

from __future__ import annotations

from math import ceil
from types import SimpleNamespace

import pytest
import torch

from tests.vdm_priors.metric_loops import make_grid
from vdm_priors.heads import BandMask, MotionMask, sample_rows
from vdm_priors.selection import choose_heads, choose_words, motion_mask, read_text, text_maps
from vdm_priors.settings import ExtractionSettings

TEXT = "a red disc, it spins"
OFFSETS = [(0, 1), (2, 5), (6, 8), (8, 10), (10, 11), (12, 14), (15, 18), (18, 20), (0, 0), (0, 0)]  # di·sc, sp·ins
WORDS = {"a": [0], "red": [1], "disc": [2, 3], "it": [5], "spins": [6, 7]}  # not the comma, nor end and pads


def harvest_of(heads: int, tokens: int, cells: int, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    t2v, v2t = (torch.rand(2, heads, tokens, cells, generator=generator) for _ in range(2))
    v2v = torch.randn(2, heads, cells, cells, generator=generator).mul(2).softmax(-1)
    return SimpleNamespace(t2v=t2v, v2t=v2t, v2v=v2v, request=SimpleNamespace(row_taker=None))


@pytest.mark.parametrize("direction", ["t2v", "v2t", "both"])
@pytest.mark.parametrize("selected", [None, [True, False, True]])
def test_maps_are_the_heads_mean_of_the_corner_that_is_named(direction, selected):
    harvested, read = harvest_of(3, 10, 6), read_text(TEXT, OFFSETS)
    if direction == "t2v":
        harvested.v2t = None
    if direction == "v2t":
        harvested.t2v = None
    maps = text_maps(harvested, 1, None if selected is None else torch.tensor(selected), read, direction)
    heads = [h for h in range(3) if selected is None or selected[h]]

    def value(corner, token, cell):
        return sum(float(corner[1, h, token, cell]) for h in heads) / len(heads)

    own = sorted(sum(WORDS.values(), []))
    for token in range(10):
        for cell in range(6):
            if direction == "both":  # each corner with the same mass over the words' own tokens
                mass = [sum(value(c, t, s) for t in own for s in range(6)) for c in (harvested.t2v, harvested.v2t)]
                vision = value(harvested.v2t, token, cell) * mass[0] / mass[1]
                expected = (value(harvested.t2v, token, cell) + vision) / 2
            else:
                expected = value(harvested.t2v if direction == "t2v" else harvested.v2t, token, cell)
            assert maps[token, cell].item() == pytest.approx(expected, rel=1e-5)


def motion_score(map_fhw) -> float:
    """Mean over frames of the frame's mean, and of its changes (METHOD.md, step 3)."""
    frames = [sum(sum(row) for row in frame) / sum(len(row) for row in frame) for frame in map_fhw.tolist()]
    changes = [abs(b - a) for a, b in zip(frames, frames[1:], strict=False)]
    return sum(frames) / len(frames) + sum(changes) / len(changes)


@pytest.mark.parametrize("unit", ["token", "word"])
@pytest.mark.parametrize("selection", [True, False])
def test_function_words_can_be_left_out(unit, selection):
    maps = torch.rand(10, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    maps[[0, 5]] += 5  # `a` and `it` score highest
    settings = ExtractionSettings(token_unit=unit, token_ratio=0.5, token_selection=selection, words="content")
    words, kept, report = choose_words(maps, read_text(TEXT, OFFSETS), make_grid(3, 2, 2), settings)
    assert [entry["text"] for entry in report] == list(WORDS)  # scored all the same
    assert {word.text for word in words} <= {"red", "disc", "spins"}
    assert len(words) == (3 if not selection else len([e for e in report if e["selected"]])) == len(kept)
    only, *_ = choose_words(maps[:2], read_text("is it", [(0, 2), (3, 5)]), make_grid(3, 2, 2), settings)
    assert only  # nothing else is there
    settings = ExtractionSettings(token_unit=unit)
    everything = choose_words(maps, read_text(TEXT, OFFSETS), make_grid(3, 2, 2), settings)[0]
    assert {"a", "it"} & {word.text for word in everything}


@pytest.mark.parametrize("unit", ["token", "word"])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
def test_words_are_those_of_the_best_tokens_or_the_best_words(unit, ratio):
    maps = torch.rand(10, 3, 2, 2, generator=torch.Generator().manual_seed(4))
    maps[8:] += 5  # the end of the text and padding attract attention and are no candidates
    maps[4] += 5  # nor is the comma
    read = read_text(TEXT, OFFSETS)
    assert {w.text: t for w, t in zip(read.words, read.tokens, strict=True)} == WORDS
    grid, settings = make_grid(3, 2, 2), ExtractionSettings(token_unit=unit, token_ratio=ratio)
    words, kept_maps, report = choose_words(maps, read, grid, settings)
    of_word = {w: sum(maps[t] for t in tokens) / len(tokens) for w, tokens in WORDS.items()}
    if unit == "token":
        scores = {t: motion_score(maps[t]) for tokens in WORDS.values() for t in tokens}
        best = sorted(scores, key=lambda t: -scores[t])[: ceil(ratio * len(scores) - 1e-9)]
        expected = [w for w, tokens in WORDS.items() if set(tokens) & set(best)]
        told = {w: max(scores[t] for t in tokens) for w, tokens in WORDS.items()}
    else:
        told = {w: motion_score(map_fhw) for w, map_fhw in of_word.items()}
        best = sorted(told, key=lambda w: -told[w])[: ceil(ratio * len(told) - 1e-9)]
        expected = [w for w in WORDS if w in best]
    assert [w.text for w in words] == expected
    for word, found in zip(words, kept_maps, strict=True):
        torch.testing.assert_close(found, of_word[word.text])
    assert {entry["text"]: entry["score"] for entry in report} == pytest.approx(told, rel=1e-5)
    assert [entry["text"] for entry in report if entry["selected"]] == expected


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_the_report_of_heads_is_the_metrics_sum(ratio):
    grid, harvested = make_grid(3, 2, 3), harvest_of(5, 3, 18)
    settings = ExtractionSettings(head_ratio=ratio)
    selected, report = choose_heads(harvested, torch.arange(18), 1, grid, settings)
    scores = []
    for head in range(5):
        score = 0.0
        for name in ("dfc", "tcs", "dsr"):
            mean = sum(report[name]) / 5
            score += (report[name][head] - mean) / (sum((v - mean) ** 2 for v in report[name]) / 5) ** 0.5
        scores.append(score)
    assert report["score"] == pytest.approx(scores, abs=1e-4)
    best = sorted(range(5), key=lambda h: -scores[h])[: ceil(ratio * 5)]
    assert [h for h in range(5) if selected[h]] == sorted(best)
    assert report["selected"] == selected.tolist()
    other = choose_heads(harvested, torch.arange(18), 0, grid, settings)[1]
    assert other["dfc"] != report["dfc"]  # each clip is judged by its own attention
    rows = sample_rows(grid, 6, 0)
    harvested.v2v = harvested.v2v[:, :, rows]
    assert choose_heads(harvested, rows, 1, grid, settings)[1]["rows"] == [6, 18]
    assert choose_heads(harvested, rows, 1, grid, ExtractionSettings(head_selection=False)) == (None, None)


def test_settings_name_the_mask():
    assert motion_mask(ExtractionSettings()) == MotionMask(1, True)
    assert motion_mask(ExtractionSettings(mask_radius=3, mask_own_frame=False)) == MotionMask(3, False)
    band = ExtractionSettings(mask="band", band_width=5.0, band_unit="places", band_order="place", mask_own_frame=False)
    assert motion_mask(band) == BandMask(5.0, "places", "place", own_frame=False)
