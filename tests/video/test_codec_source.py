"""The codec as a motion source: where the mass lies, with the camera still and moving, and what cannot be had."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from enhancer.data.samples import Problem, Sample, load_samples
from enhancer.filling import fill_store
from enhancer.sources import SourceContext, build_source, source_names
from enhancer.video.camera import camera_motion
from enhancer.video.clip import Sampling
from enhancer.world import WorldSettings, load_truth, make_world
from tests.video.clips import panned, texture, write
from vdm_priors.store import PriorStore

TEXT = "Which way does the red ball roll?"


def context(tmp_path, samples=(), **changes):
    return SourceContext(samples=list(samples), store=PriorStore(tmp_path / "store"), sampling=Sampling(5), **changes)


def prior_of(tmp_path, pictures, text=TEXT, source="codec"):
    sample = Sample("a", write(tmp_path / "a.mp4", pictures, options={"preset": "medium", "crf": "16"}), text, "left")
    ((_, prior),) = build_source(source, context(tmp_path)).extract([sample])
    return prior


def square_over(pictures, motion=3):
    """A textured square, 24 pixels wide, from the left to the right over the clip."""
    found = pictures.copy()
    for n in range(len(found)):
        left = 8 + motion * n
        found[n, 24:48, left : left + 24] = np.clip(255 - 1.4 * texture()[100:124, 100:124, None], 0, 255).astype(
            np.uint8
        )
    return found


@pytest.mark.parametrize(
    "source, camera",
    [
        ("codec", (0.0, 0.0)),
        ("codec", (-1.5, 0.75)),
        ("flow", (0.0, 0.0)),
        ("flow", (-1.5, 0.75)),
        ("residual", (0.0, 0.0)),
        ("frame_difference", (0.0, 0.0)),
    ],
)
def test_the_mass_is_on_what_moves_by_itself(tmp_path, source, camera):
    prior = prior_of(tmp_path, square_over(panned(13, camera, (72, 96))), source=source)
    prior.validate()
    assert [word.text for word in prior.words] == ["way", "red", "ball", "roll"] and prior.provenance[
        "source"
    ] == source
    assert prior.grid.shape == (5, 16, 21) and torch.equal(prior.maps[0], prior.maps[3])
    assert prior.maps[0].sum() == pytest.approx(1, abs=1e-5) and 0.6 < prior.weight[0] <= 1
    on = prior.maps[0].sum(dim=0)[4:12].sum()  # its rows, a block's width around them; 0.5 by chance
    assert on > 0.8
    columns = (prior.maps[0].sum(dim=1) * torch.arange(21)).sum(dim=1) / prior.maps[0].sum(dim=(1, 2)).clamp_min(1e-9)
    assert columns[4] > columns[1] + 4  # it goes to the right


def test_a_moving_camera_alone_is_the_motion_and_a_still_is_none(tmp_path):
    panning = prior_of(tmp_path, panned(13, (2.0, 0.0), (72, 96)))
    assert panning.provenance["of"] == "camera" and (panning.maps[0, 2] > 0).float().mean() > 0.9
    for source in ("codec", "flow", "frame_difference"):
        still = prior_of(tmp_path, panned(13, (0.0, 0.0), (72, 96)), source=source)
        assert isinstance(still, Problem) and f"as far as the source {source} tells" in still.reason
    silent = prior_of(tmp_path, panned(13, (2.0, 0.0), (72, 96)), text="What is it?")
    assert isinstance(silent, Problem) and "content word" in silent.reason


@pytest.mark.parametrize("zoom, turn", [(0.0, 0.0), (0.02, 0.0), (0.0, -0.03), (0.01, 0.02)])
def test_the_camera_is_fitted_beside_things_that_move(zoom, turn):
    x, y = np.arange(20) * 8 + 4.0, np.arange(12) * 8 + 4.0
    across, down = np.meshgrid(x - x.mean(), y - y.mean())
    camera = np.stack([1.5 + zoom * across - turn * down, -0.5 + zoom * down + turn * across], axis=-1).astype(
        np.float32
    )
    seen = np.round(camera * 4) / 4
    seen[2:7, 3:10] += (4.0, -2.0)
    valid = np.ones((12, 20), bool)
    valid[0, :5] = False
    seen[0, :5] = np.nan
    assert np.abs(camera_motion(seen, valid, x, y) - camera).max() < 0.15
    assert not camera_motion(seen, np.zeros_like(valid), x, y).any()


def test_on_the_world_it_finds_the_things_that_move(tmp_path):
    """Mean area under the ROC curve of the maps against the moving things' true places; 0.5 is chance."""
    settings = WorldSettings(train_clips=0, test_clips=10, questions={"LM": 1.0})
    make_world(tmp_path / "world", settings)
    samples, _ = load_samples(tmp_path / "world" / "test.json", tmp_path / "world")
    truth = load_truth(tmp_path / "world")
    sources = context(tmp_path, samples, truth=truth)
    report = fill_store(build_source("codec", sources), samples, sources.store)
    assert report.made == 10 and "codec" in source_names(), report.problems
    found = []
    for sample, key in report.rows:
        prior, scene = sources.store.get(key), truth.scene(sample.video.name)
        moving = {n for n, thing in enumerate(scene.things) if thing.motion.kind != "rest"}
        mentioned = [m.thing for m in truth.mentions(sample.video.name, prior.text)]
        if mentioned and mentioned[0] in moving:
            words = [
                word
                for word in prior.words
                if any(word.start < m.end and m.start < word.end for m in truth.mentions(sample.video.name, prior.text))
            ]
            seen = truth.evidence(sample.video.name, prior.text, words[:1], prior.grid)[0][prior.grid.valid]
            where, mass = seen > seen.max() / 4, prior.maps[0][prior.grid.valid]
            higher = (mass[where][:, None] > mass[~where][None]).float() + 0.5 * (
                mass[where][:, None] == mass[~where][None]
            ).float()
            found.append(float(higher.mean()))
    assert len(found) >= 8 and np.mean(found) > 0.75, found


def test_the_key_depends_on_the_clip_its_sampling_and_the_text(tmp_path):
    pictures = panned(6, (1.0, 0.0))
    one, two = (
        Sample(n, write(tmp_path / f"{n}.mp4", pictures[:, :, ::step]), TEXT, "left")
        for n, step in (("a", 1), ("b", -1))
    )
    source = build_source("codec", context(tmp_path))
    other = build_source("codec", replace(context(tmp_path), sampling=Sampling(4)))
    keys = {source.key(one), source.key(two), other.key(one), source.key(replace(one, question="Why?"))}
    assert len(keys) == 4 and source.key(replace(one, id="c")) == source.key(one)
