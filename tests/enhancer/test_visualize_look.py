"""Asking the teacher again: what it finds is what the prior was made of, by independent routes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from enhancer.video.clip import Sampling, read_clip
from enhancer.visualize.look_again import look_again
from enhancer.visualize.steps import places_shown
from enhancer.visualize.views import density
from tests.enhancer.tiny_run import QUESTIONS, teacher_folder, write_video
from tests.vdm_priors.tiny_families import FAMILIES, FRAMES, SIZE, tiny_family
from tests.vdm_priors.tiny_teacher import random_clip
from vdm_priors.errors import ModelError
from vdm_priors.extract import ExtractionSettings, extract_priors, run_teacher
from vdm_priors.families import load_teacher
from vdm_priors.grid import TokenGrid
from vdm_priors.harvest import HarvestRequest

TEXT = QUESTIONS[0]
MODES = {
    "paper": ExtractionSettings(steps=2, reconstruction=False),
    "noise": ExtractionSettings(
        steps=2, reconstruction=False, harvest_at="noise", direction="v2t", head_scope="layer_head", token_unit="word"
    ),
    "inversion": ExtractionSettings(
        steps=2, reconstruction=False, harvest_at="inversion", guidance=1.0, frame_weight="token", layers=[1]
    ),
}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(teacher_folder())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return read_clip(write_video(tmp_path_factory.mktemp("clip") / "a.mp4"), Sampling(frames=9))


@pytest.fixture(scope="module", params=MODES)
def looked(request, teacher, clip):
    settings = MODES[request.param]
    prior = extract_priors(teacher, [clip], [TEXT], settings)[0]
    before = dict(teacher.attention_models[0].attn_processors)
    look = look_again(teacher, clip, prior, settings)
    after = dict(teacher.attention_models[0].attn_processors)
    assert all(before[key] is after[key] for key in before), "the model's processors are not back"
    return settings, prior, look


def test_the_mean_of_the_steps_is_the_prior(looked, teacher, clip):
    """Of every word, also of those that the prior left out: their maps are those of a prior of all words."""
    settings, prior, look = looked
    everything = extract_priors(teacher, [clip], [TEXT], replace(settings, token_selection=False))[0]
    assert [word.text for word in look.words] == [word.text for word in everything.words]
    assert 0 < sum(word.selected for word in look.words) < len(look.words)
    assert np.allclose(look.maps.maps, density(everything.maps.numpy(), everything.grid), rtol=1e-4, atol=1e-5)
    curves = np.array([word.curve for word in look.words])
    weights = (
        everything.maps.flatten(2).mean(dim=2).numpy() / curves
    )  # the prior's frames carry the seconds they stand for
    assert np.allclose(weights, weights[:1], rtol=1e-4)
    assert look.maps.step_names[0] != look.maps.step_names[1] and not np.allclose(
        look.maps.steps[0], look.maps.steps[1]
    )


def test_a_single_layer_is_the_whole(looked):
    settings, prior, look = looked
    if settings.layers is None:
        assert not np.allclose(look.maps.layers[0], look.maps.layers[1])
    else:
        own = [n for n, word in enumerate(look.words) if word.selected]
        assert np.allclose(look.maps.layers[0][own], look.maps.maps[own], rtol=1e-4)


def test_word_scores_follow_from_the_curves(looked):
    """With words as units, mean and fluctuation are those of the curve that is drawn (METHOD.md, step 3)."""
    settings, prior, look = looked
    for word in look.words:
        assert word.score == pytest.approx(word.mean + word.fluctuation, rel=1e-5)
        if settings.token_unit == "word":
            curve = np.array(word.curve)
            assert word.mean == pytest.approx(curve.mean(), rel=1e-4)
            assert word.fluctuation == pytest.approx(np.abs(np.diff(curve)).mean(), rel=1e-3)


def test_heads_attention_is_that_of_a_plain_harvest(looked, teacher, clip):
    """The kept rows and columns, against a harvest that keeps every row of every head at once."""
    settings, prior, look = looked
    grid = teacher.token_grid(clip.times, clip.duration, clip.box, None)
    request = HarvestRequest(
        text_tokens=1,
        rows=torch.arange(grid.num_tokens),
        batch_index=[0],
        head_scope="layer_head",
        layers=settings.layers or "all",
    )
    embeds, _ = teacher.encode_text([TEXT])
    latents = teacher.encode_video(teacher.prepare_frames(clip.frames))
    harvested, _, _ = run_teacher(teacher, latents, embeds, request, settings)
    whole = harvested.v2v[0]
    heads = look.heads
    by_layer = heads.maps[-1]
    tokens = (np.arange(grid.frames)[:, None] * grid.rows * grid.columns + by_layer.places).ravel()
    expected = whole[:, tokens][:, :, tokens].numpy() * grid.num_tokens
    assert np.allclose(by_layer.attention, expected, rtol=1e-4, atol=1e-5)
    assert np.allclose(by_layer.threshold, whole.mean(dim=(1, 2)).numpy() * grid.num_tokens, rtol=1e-4)
    if settings.head_scope == "head":
        count = heads.selected.shape[1]
        mean = whole.unflatten(0, (-1, count)).mean(dim=0)[:, tokens][:, :, tokens].numpy() * grid.num_tokens
        assert np.allclose(heads.maps[0].attention, mean, rtol=1e-4, atol=1e-5)


def test_layers_metrics_are_those_of_judging_every_layer(looked, teacher, clip):
    settings, prior, look = looked
    apart = extract_priors(teacher, [clip], [TEXT], replace(settings, head_scope="layer_head"))[0].provenance[
        "head_scores"
    ]
    rows = slice(0 if settings.head_scope == "layer_head" else 1, None)
    for name in (
        "tcs",
        "dsr",
    ):  # DFC of streamed rows is of the steps' mean energies, not of the mean map's (settings.rows)
        assert np.allclose(look.heads.metrics[name][rows].ravel(), apart[name], rtol=1e-4, atol=1e-6)
    stored = prior.provenance["head_scores"]
    first = look.heads.metrics["score"].ravel()[: len(stored["score"])]
    assert np.allclose(first, stored["score"])
    assert look.heads.selected.ravel()[: len(stored["selected"])].tolist() == stored["selected"]


def test_inversion_has_every_frames_psnr(looked, teacher, clip):
    settings, prior, look = looked
    quality = extract_priors(teacher, [clip], [TEXT], replace(settings, reconstruction=True))[0].provenance[
        "reconstruction"
    ]
    view = look.inversion
    assert view.psnr_db == pytest.approx(quality["psnr_db"], abs=1e-3)
    assert view.relative_l2 == pytest.approx(quality["latent_relative_l2"], rel=1e-4)
    for n, value in enumerate(view.frame_psnr()):
        total = 0.0
        for a, b in zip(view.frames[n].ravel().tolist(), view.reconstruction[n].ravel().tolist(), strict=True):
            total += (a / 255 - b / 255) ** 2
        assert value == pytest.approx(-10 * np.log10(total / view.frames[n].size), abs=1e-6)


def test_another_teachers_prior_is_refused(teacher, clip):
    settings = MODES["noise"]
    prior = extract_priors(teacher, [clip], [TEXT], settings)[0]
    prior.provenance["head_scores"]["selected"] = [True] * 7
    with pytest.raises(ModelError, match="chosen among 7, and this teacher has 2 layers of 2 heads"):
        look_again(teacher, clip, prior, settings)


@pytest.mark.parametrize(("units", "room", "least"), [(4, 2_500_000, 64), (2016, 1_200_000, 2), (48, 2_500_000, 17)])
def test_places_fit_their_room(units, room, least):
    shape = (3, 8, 8) if units == 4 else (13, 30, 45)
    grid = TokenGrid.regular([(n, n + 1.0) for n in range(shape[0])], *shape[1:])
    places = places_shown(grid, units, room)
    assert least <= len(places) <= shape[1] * shape[2] and len(places.unique()) == len(places)
    assert len(places) == 2 or units * (len(places) * shape[0]) ** 2 <= room


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "wan22"])
def test_every_family_can_be_looked_at_again(name):
    """Joint and separate text, DDIM and flow, padding frames: maps of all words are those of a prior of all words."""
    teacher, clip = tiny_family(name), random_clip(FRAMES[name])
    settings = ExtractionSettings(steps=2, reconstruction=False, token_selection=False, direction="v2t")
    prior = extract_priors(teacher, [clip], [TEXT], settings, size=SIZE)[0]
    none = replace(
        prior, words=[], maps=torch.zeros(0, *prior.grid.shape), weight=torch.ones(0)
    )  # nothing to copy maps from
    look = look_again(teacher, clip, none, settings, size=SIZE)
    assert np.allclose(look.maps.maps, density(prior.maps.numpy(), prior.grid), rtol=1e-3, atol=1e-4, equal_nan=True)
    assert look.heads.maps[0].attention.shape[1] == prior.grid.frames * len(look.heads.maps[0].places)


def test_models_of_two_stages_are_refused_with_a_reason():
    teacher, clip = tiny_family("wan22"), random_clip(FRAMES["wan22"])
    settings = ExtractionSettings(steps=2, reconstruction=False)
    prior = extract_priors(teacher, [clip], [TEXT], settings, size=SIZE)[0]
    with pytest.raises(ModelError, match="two stages"):
        look_again(teacher, clip, prior, settings, size=SIZE)
