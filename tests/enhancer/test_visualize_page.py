"""The page's data and text: what is encoded can be read back, nothing of a clip becomes markup, and it stays small."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from enhancer.visualize.drawing import not_drawn, overlaid
from enhancer.visualize.encode import CEILING, OCTAVES, Blobs, encode
from enhancer.visualize.figures import heads_figure, inversion_figure, sample_figure
from enhancer.visualize.page import as_json, page
from enhancer.visualize.pieces import _scale, _titled, map_film, score_figure
from enhancer.visualize.views import MapSet, density
from tests.enhancer.fake_run import HOSTILE
from tests.enhancer.fake_views import fake_view, large_page
from vdm_priors.errors import UserError
from vdm_priors.grid import TokenGrid


def part(blobs: Blobs, number: int, kind: type = np.uint8) -> np.ndarray:
    return np.frombuffer(base64.b64decode(blobs.parts[number]), kind)


def test_maps_are_read_back_within_a_byte():
    view, blobs = fake_view(), Blobs()
    view.maps[1].maps[0, 0, 0, 0] = np.nan
    encoded = encode([view], blobs)["clips"][0]
    for one, written in zip(view.maps, encoded["maps"], strict=True):
        level = part(blobs, written["all"]["blob"]).reshape(one.maps.shape).astype(float)
        back = np.where(level > 0, CEILING * ((level - 1) / 254) ** 2, np.nan)
        expected = np.clip(one.maps, 0, CEILING)
        assert np.array_equal(np.isnan(back), np.isnan(one.maps))
        assert np.nanmax(np.abs(np.sqrt(back) - np.sqrt(expected))) <= 0.5 * np.sqrt(CEILING) / 254 + 1e-6
        assert written["spans"] == np.round(one.grid.spans.numpy(), 5).tolist()


def test_attention_and_the_bits_of_runs_are_read_back():
    """`above` [U, n, F, F] against a plain loop over the attention between places."""
    view, blobs = fake_view(), Blobs()
    written = encode([view], blobs)["clips"][0]["heads"]["maps"][0]
    maps = view.heads.maps[0]
    count, frames = len(maps.places), view.heads.grid.frames
    bits = np.unpackbits(part(blobs, written["above"]).reshape(len(maps.attention), -1), axis=1)
    level = part(blobs, written["attention"]).reshape(maps.attention.shape).astype(float)
    back = 2 ** (OCTAVES * ((level - 1) / 127 - 1))
    assert (
        np.abs(np.log2(back) - np.log2(np.clip(maps.attention, 2.0**-OCTAVES, 2.0**OCTAVES))).max()
        <= 0.5 * OCTAVES / 127 + 1e-6
    )
    for unit in (0, len(maps.attention) - 1):
        for place in range(count):
            for a in range(frames):
                for b in range(frames):
                    value = maps.attention[unit, a * count + place, b * count + place]
                    assert bits[unit, (place * frames + a) * frames + b] == (value > maps.threshold[unit])
    mask = np.unpackbits(part(blobs, written["mask"]))[: maps.inside.size]
    assert np.array_equal(mask, maps.inside.ravel())


@settings(max_examples=20, deadline=None)
@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_json_holds_any_text_and_no_markup(value):
    text = as_json(value)
    assert not set("<>&") & set(text) and json.loads(text) == value


def test_nothing_of_a_clip_becomes_markup():
    view = fake_view(text=f"What does {HOSTILE} do?", name=HOSTILE)
    view.answer = view.question = HOSTILE
    view.facts.append((HOSTILE, HOSTILE))
    view.lacks("codec", HOSTILE)
    made = page([view], HOSTILE, HOSTILE)
    assert "evil.example" in made and "<img" not in made.split("<script>")[0].split('id="data"')[1]
    assert made.count("<script") == 2 + len(re.findall('id="blob', made)) and HOSTILE not in made
    plain = page([fake_view()], "title")
    assert re.sub(r"sha256-[^']+|(?s:<script type.*?</script>)", "", made) == re.sub(
        r"sha256-[^']+|(?s:<script type.*?</script>)", "", plain
    )


def test_the_policy_allows_this_script_and_style_only():
    made = page([fake_view()], "title")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', made).group(1)
    for name, tag in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        digest = hashlib.sha256(re.search(tag, made, re.DOTALL).group(1).encode()).digest()
        assert f"{name}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "default-src 'none'" in policy and "http" not in policy and "unsafe" not in policy


def test_a_large_prior_makes_a_page_of_at_most_15_mb():
    assert 5_000_000 < len(large_page().encode()) <= 15_000_000


def test_an_empty_map_is_unknown_and_density_means_one():
    grid = TokenGrid.regular([(0, 1), (1, 3)], 2, 3)
    values = np.random.default_rng(0).uniform(0, 1, (2, *grid.shape))
    values[1] = 0
    found = density(values, grid)
    seconds = np.array([1, 2])[:, None, None]
    assert (found[0] * seconds).sum() / (seconds.sum() * 6) == pytest.approx(1, rel=1e-5)
    assert np.isnan(found[1]).all()


def test_a_figures_map_lies_where_the_grid_says():
    """Left half at the first second only: those pixels, and no others, take the colour of the scale's top."""
    grid = TokenGrid.regular([(0, 1), (1, 2)], 1, 2)
    maps = np.zeros((1, 2, 1, 2), np.float32)
    maps[0, 0, 0, 0] = 8
    frames = np.zeros((3, 10, 10, 3), np.uint8)
    drawn = overlaid(frames, MapSet("m", "teacher", grid, maps), 0, [0.0, 0.5, 1.5])
    assert drawn[0, 0, 0].tolist() == [round(0.6 * 253), round(0.6 * 231), round(0.6 * 37)]  # viridis' last colour
    assert (drawn[2] == drawn[0, 0, 9]).all() and drawn[0, 0, 9].tolist() != drawn[0, 0, 0].tolist()


def test_figures_show_hostile_and_mathematical_texts_as_text(tmp_path):
    view = fake_view(text=f"Why $\\frac{{x}}$ and {HOSTILE} $ moves?")
    for n, made in enumerate(
        [sample_figure(view), heads_figure(view.heads), inversion_figure(view), score_figure(view.heads)]
    ):
        made.savefig(tmp_path / f"{n}.svg")
        assert "<script" not in (tmp_path / f"{n}.svg").read_text().lower()
    import av

    with av.open(str(map_film(view, 0, tmp_path / "film.mp4"))) as film:
        assert sum(1 for _ in film.decode(video=0)) == len(view.times)


def test_a_film_names_its_panels_and_has_their_scale(tmp_path):
    """Titles of any alphabet that the font has, and below the panels the colours that `overlaid` uses."""
    assert (_titled(np.zeros((9, 90, 3), np.uint8), "λ = 0") != _titled(np.zeros((9, 90, 3), np.uint8), "? = 0")).any()
    scale = _scale(600)
    assert scale.shape[1] == 600 and scale[8, 4].tolist() == [68, 1, 84] and scale[8, 259].tolist() == [253, 231, 37]
    assert (scale[8, 262:] == 255).all()


def test_long_and_equal_words_fit_a_figure(tmp_path):
    """A word of 300 letters, and the two best words the same: each keeps a row of its own, and the figure its width."""
    view = fake_view(text=f"red {'x' * 300} red moves")
    for word, score in zip(view.words, (3.0, 1.0, 2.0, 0.5), strict=True):
        word.score, word.selected = score, word.text == "red"
    made = sample_figure(view)
    made.savefig(tmp_path / "sample.png", dpi=50, bbox_inches="tight")
    assert [axis.get_ylabel() for axis in made.axes if axis.get_ylabel()].count("“red”") == 2
    assert Image.open(tmp_path / "sample.png").width < 1.2 * 50 * made.get_figwidth()


def test_characters_that_a_font_lacks_are_known():
    assert not_drawn("Wohin rollt der Ball? λ ≥ 8×") == [] and not_drawn("球 rolls 球") == ["球"]


def test_figures_say_what_they_lack():
    view = fake_view()
    view.inversion, view.heads = None, None
    for word in view.words:
        word.score = None
    for draw, reason in (
        (inversion_figure, "shows an inversion"),
        (sample_figure, "shows motion scores"),
        (lambda v: heads_figure(v.heads), "shows heads' attention"),
    ):
        with pytest.raises(UserError, match=reason):
            draw(view)
