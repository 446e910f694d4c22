"""Which settings change a prior, and which of them stand in its key."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.vdm_priors.tiny_teacher import random_clip, tiny_teacher
from vdm_priors.errors import RecipeError
from vdm_priors.extract import ExtractionSettings, extract_priors
from vdm_priors.settings import MODES

TEXT = "The red circle's moving left, then stops."
FAST = ExtractionSettings(steps=2, reconstruction=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"direction": "v2t"},
        {"direction": "both"},
        {"harvest_at": "inversion"},
        {"harvest_at": "noise"},
        {"guidance": 1.0},
        {"memory": False},
        {"memory_from": "inversion"},
        {"guidance": 1.0, "memory": False},
        {"memory_columns": "own"},
        {"rows": 5},
        {"rows": "all", "mask_radius": 0, "mask_own_frame": False},
        {"rows": "all", "mask": "band", "band_width": 1.0},
        {"layers": [-1]},
        {"steps": 3},
    ],
)
def test_every_option_changes_the_prior(changes):
    teacher = tiny_teacher()
    base = replace(FAST, token_selection=False, head_selection="rows" in changes)
    one, other = (
        extract_priors(teacher, [random_clip()], [TEXT], settings)[0]
        for settings in (base, replace(base, **changes))
    )
    assert other.maps.isfinite().all() and (other.maps >= 0).all()
    if "rows" in changes:  # which head wins may be the same; what it won by is not
        assert one.provenance["head_scores"]["dfc"] != other.provenance["head_scores"]["dfc"]
    else:
        assert (one.maps - other.maps).abs().max() > 1e-6
    assert other.provenance["settings"] == replace(base, **changes).effective()


INERT = [  # where these settings hold, the keys behind them decide nothing
    ({"harvest_at": "inversion"}, {"guidance": 3.0, "memory": False, "memory_columns": "own"}),
    ({"harvest_at": "noise"}, {"memory_from": "inversion"}),
    ({"memory": False}, {"memory_columns": "own", "memory_from": "inversion"}),
    ({"guidance": 1.0}, {"guidance": 0.5}),
    ({"head_selection": False}, {"rows": 7, "head_ratio": 0.25, "mask_radius": 2, "mask_own_frame": False, "seed": 3,
                                 "mask": "band", "band_width": 1.0, "band_unit": "places", "band_order": "place"}),
    ({"mask": "place"}, {"band_width": 1.0, "band_unit": "places", "band_order": "place"}),
    ({"mask": "band"}, {"mask_radius": 2}),
    ({"layers": [0, 1]}, {"layers": [1, 0, 1]}),
    ({"rows": "all"}, {"seed": 3}),
    ({"token_selection": False}, {"token_ratio": 0.25}),
]


@pytest.mark.parametrize("where, inert", INERT)
def test_settings_that_decide_nothing_are_not_in_the_key(where, inert):
    base = replace(FAST, **where)
    other = replace(base, **inert)
    assert other.effective() == base.effective()
    one, two = (extract_priors(tiny_teacher(), [random_clip()], [TEXT], settings)[0] for settings in (base, other))
    assert torch.equal(one.maps, two.maps) and one.words == two.words
    assert one.provenance == two.provenance  # who writes a key twice writes the same content


def test_settings_that_decide_something_are_in_the_key():
    for name, value in (("guidance", 3.0), ("memory", False), ("memory_columns", "own"),
                        ("memory_from", "inversion"), ("rows", 7), ("seed", 3),
                        ("head_ratio", 0.25), ("token_ratio", 0.25), ("reconstruction", False), ("steps", 4),
                        ("mask", "band"), ("layers", [0]), ("confidence", "both"), ("words", "content")):
        assert replace(ExtractionSettings(), **{name: value}).effective() != ExtractionSettings().effective(), name
    measured = ExtractionSettings(harvest_at="inversion")  # its PSNR is that of a guided denoising
    for name, value in (("guidance", 3.0), ("memory_from", "inversion")):
        assert replace(measured, **{name: value}).effective() != measured.effective(), name
    assert replace(measured, memory_columns="own").effective() == measured.effective()
    band = ExtractionSettings(mask="band")
    changes = (("band_width", 1.0), ("band_unit", "places"), ("band_order", "place"), ("mask_own_frame", False))
    for name, value in changes:
        assert replace(band, **{name: value}).effective() != band.effective(), name


def test_options_that_came_later_leave_the_defaults_keys_as_they_were():
    """Stores that were filled before these options existed remain in use."""
    later = {"mask", "layers", "confidence", "words", "memory_from", "mask_radius", "band_width", "band_unit",
             "band_order"}
    assert not (later - {"mask_radius"}) & set(ExtractionSettings().effective())
    used = ExtractionSettings(mask="band", layers=[0], confidence="both", words="content",
                              memory_from="inversion").effective()
    assert later - {"mask_radius"} <= set(used)


@pytest.mark.parametrize("name", MODES)
def test_a_mode_is_a_name_for_keys(name):
    named = ExtractionSettings(mode=name, steps=3)
    assert named == ExtractionSettings(steps=3, **MODES[name])
    assert "mode" not in named.effective()
    assert len({str(ExtractionSettings(**keys).effective()) for keys in MODES.values()}) == len(MODES)  # no two are one


def test_a_mode_and_a_key_against_it_are_refused():
    with pytest.raises(RecipeError, match="mode: inversion stands for harvest_at: inversion.*harvest_at: noise"):
        ExtractionSettings(mode="inversion", harvest_at="noise")
    with pytest.raises(RecipeError, match="mode must be one of paper"):
        ExtractionSettings(mode="quick")
    assert ExtractionSettings(mode="paper", guidance=3.0).guidance == 3.0


@pytest.mark.parametrize("name, value", [("harvest_at", None), ("direction", "sideways"), ("steps", 0), ("rows", "few")])
def test_values_that_are_none_of_an_options_are_refused(name, value):
    with pytest.raises(RecipeError, match=f"Extraction settings: {name} must .*not {value!r}"):
        replace(FAST, **{name: value}).validate()


def test_layers_of_a_teacher():
    assert ExtractionSettings().layers_of(3) == [0, 1, 2]
    assert ExtractionSettings(layers=[2, -1, 0]).layers_of(3) == [0, 2]
    for layers, message in (([], "names no layer"), ([0, 3], r"names \[3\], .* layers 0 to 2 \(-3 to -1"), ([-4], "-4")):
        with pytest.raises(RecipeError, match=message):
            ExtractionSettings(layers=layers).layers_of(3)
