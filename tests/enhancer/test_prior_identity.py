"""A prior belongs to one text and one piece of footage: another's is refused, and made anew by the next extraction."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from enhancer.arms import StoredPriors
from enhancer.data.samples import Sample
from enhancer.recipe import build
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.filling import fill_store
from enhancer.sources import SourceContext, build_source
from enhancer.video.clip import Sampling
from enhancer.video.footage import Footage
from tests.enhancer.test_clip import write_video
from vdm_priors.errors import StoreError
from vdm_priors.store import PriorStore


@pytest.fixture
def sample(tmp_path):
    return Sample("one", write_video(tmp_path / "a.mp4"), "the grey square rolls", "it rolls")


def filled(samples, tmp_path):
    store = PriorStore(tmp_path / "priors")
    source = build_source("frame_difference", SourceContext(samples, store, Sampling(frames=4)))
    return source, store, fill_store(source, samples, store)


@pytest.mark.parametrize("name", ["vdm", "frame_difference", "codec"])
def test_the_key_takes_span_and_text_in(sample, tmp_path, name):
    context = SourceContext([sample], PriorStore(tmp_path / "priors"), Sampling(frames=4))
    if name == "vdm":
        from vdm_priors.settings import ExtractionSettings

        context.settings = ExtractionSettings()
    source = build_source(name, context)
    others = [replace(sample, video=Footage((sample.video,), 0.25)), replace(sample, question="the cube rolls"),
              replace(sample, video=Footage((sample.video,), 0.25, 0.5)),
              replace(sample, video=write_video(tmp_path / "b.mp4", frames=7))]
    assert len({source.key(s) for s in [sample, *others]}) == 1 + len(others)
    assert source.key(replace(sample, id="two", answer="else")) == source.key(sample)


def test_a_span_has_the_evidence_of_its_own_seconds(sample, tmp_path):
    span = replace(sample, id="two", video=Footage((sample.video,), 0.25, 0.75))
    _, store, report = filled([sample, span], tmp_path)
    seconds = [store.get(key).provenance["seconds"] for _, key in report.rows]
    assert seconds == [[0.125, 0.375, 0.625, 0.875], [0.25, 0.375, 0.5, 0.625]]


@pytest.mark.parametrize("other", ["text", "clip"])
def test_a_prior_under_anothers_key_is_refused_and_made_anew(sample, tmp_path, other):
    second = replace(sample, id="two", question="the cube rolls") if other == "text" else replace(
        sample, id="two", video=write_video(tmp_path / "b.mp4", frames=7))
    samples = [sample, second]
    source, store, report = filled(samples, tmp_path)
    own, others = (key for _, key in report.rows)
    shutil.copy(store.path(others), store.path(own))

    (tmp_path / "priors.json").write_text(json.dumps([{"sample_id": "one", "key": own, "source": "frame_difference"}]))
    recipe = build(EnhanceRecipe, {"name": "x", "arms": [{"name": "a"}], "data": {"root": str(tmp_path)}}, "test")
    priors = StoredPriors(tmp_path, recipe, "frame_difference")
    with pytest.raises(StoreError, match="made for another text or clip.*Run the same command again"):
        priors(sample)
    assert priors(second) is None

    again = fill_store(source, samples, store)
    assert (again.made, again.reused, again.replaced) == (1, 1, 1)
    assert priors(sample).provenance["key"] == own and priors(sample).text == sample.question
