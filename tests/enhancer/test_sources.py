"""Motion sources: found by name, keys, controls that spoil the place only, and filling a store."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from enhancer.data.samples import Problem, Sample
from enhancer.sources import SourceContext, build_source, fill_store, shared_text, source_names
from enhancer.sources import shuffled
from enhancer.sources.shuffled import exchanged, next_in_cycle, rows_by_role
from enhancer.sources.uniform import flattened
from enhancer.sources.vdm import VdmSource
from enhancer.video.clip import Sampling
from vdm_priors.errors import ClipError, ModelError, UserError
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vdm_priors.settings import ExtractionSettings
from vdm_priors.store import PriorStore
from vdm_priors.words import split_words

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import write_video  # noqa: E402


def make_prior(text="the red ball rolls", seed=0, shape=(2, 3, 4), words=None):
    chosen = split_words(text)[:words]
    maps = torch.rand(len(chosen), *shape, generator=torch.Generator().manual_seed(seed))
    grid = TokenGrid.regular([(i, i + 1.0) for i in range(shape[0])], shape[1], shape[2])
    return MotionPrior(text, chosen, maps, grid, torch.ones(len(chosen)), {"source": "fake"})


@pytest.fixture
def samples(tmp_path):
    return [Sample(f"s{n}", write_video(tmp_path / f"{n}.mp4", seed=n), f"Where does ball {n} go?", "left") for n in range(3)]


@pytest.fixture
def context(samples, tmp_path):
    return SourceContext(samples=samples, store=PriorStore(tmp_path / "store"), sampling=Sampling(9), settings=ExtractionSettings(),
                         teacher_fingerprint="t", load_teacher=lambda: "teacher", batch_size=2)


def fake_extraction(monkeypatch, calls, bad=()):
    def extract(teacher, clips, texts, settings, size=None):
        calls.append(list(texts))
        if any(name in text for name in bad for text in texts):
            raise ModelError("NaN in layer 3")
        return [make_prior(text, seed=len(calls)) for text in texts]

    monkeypatch.setattr("enhancer.sources.vdm.extract_priors", extract)


def test_sources_are_found_by_name(context):
    assert {"vdm", "oracle", "uniform", "shuffled"} <= set(source_names())
    with pytest.raises(UserError, match="known: .*vdm"):
        build_source("nosuch", context)
    with pytest.raises(UserError, match="ground truth"):
        build_source("oracle", context)


def test_shared_text():
    sample = Sample("a", Path("v"), "Q w?", "A b")
    assert [shared_text(sample, mode) for mode in ("question", "answer", "question_answer")] == ["Q w?", "A b", "Q w?\nA b"]


def test_vdm_key_depends_on_what_determines_the_prior(context, samples):
    key = VdmSource(context).key(samples[0])
    assert key == VdmSource(replace(context, batch_size=7, seed=9)).key(samples[0])
    inert = ExtractionSettings(head_selection=False), ExtractionSettings(head_selection=False, head_ratio=0.25)
    assert len({VdmSource(replace(context, settings=settings)).key(samples[0]) for settings in inert}) == 1
    others = [VdmSource(replace(context, **change)).key(samples[0]) for change in (
        {"teacher_fingerprint": "u"}, {"text": "answer"}, {"sampling": Sampling(5)}, {"size": (16, 16)}, {"dtype": "bfloat16"},
        {"settings": ExtractionSettings(steps=3)})]
    assert len({key, VdmSource(context).key(samples[1]), *others}) == 8


def test_fill_store_batches_reuses_and_replaces_damaged_files(monkeypatch, context, samples):
    calls = []
    fake_extraction(monkeypatch, calls)
    source, seen = VdmSource(context), []
    report = fill_store(source, samples, context.store, progress=lambda done, total: seen.append((done, total)))
    assert (report.made, report.reused, [len(call) for call in calls]) == (3, 0, [2, 1])
    assert seen[-1] == (3, 3)
    context.store.path(report.rows[1][1]).write_bytes(b"damaged")
    again = fill_store(VdmSource(context), samples, context.store)
    assert (again.made, again.reused, again.replaced) == (1, 2, 1)


def test_what_is_finished_is_kept_when_interrupted(monkeypatch, context, samples):
    calls = []
    fake_extraction(monkeypatch, calls)
    put, stored = context.store.put, []

    def interrupted(key, prior):
        if stored:
            raise KeyboardInterrupt
        stored.append(key)
        put(key, prior)

    monkeypatch.setattr(context.store, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill_store(VdmSource(context), samples, context.store)
    monkeypatch.setattr(context.store, "put", put)
    report = fill_store(VdmSource(context), samples, context.store)
    assert (report.reused, report.made) == (1, 2)


def test_a_bad_sample_among_good_ones(monkeypatch, context, samples, tmp_path):
    calls = []
    fake_extraction(monkeypatch, calls, bad=["ball 1"])
    (tmp_path / "empty.mp4").touch()
    bad = Sample("empty", tmp_path / "empty.mp4", "What?", "x")
    report = fill_store(VdmSource(context), [bad, *samples], context.store)
    assert sorted((p.id, "NaN" in p.reason or "empty" in p.reason) for p in report.problems) == [("empty", True), ("s1", True)]
    assert [sample.id for sample, _ in report.rows] == ["s0", "s2"]


def test_two_samples_of_one_clip_and_text_share_a_prior(monkeypatch, context, samples):
    calls = []
    fake_extraction(monkeypatch, calls)
    report = fill_store(VdmSource(context), [samples[0], replace(samples[0], id="twin")], context.store)
    assert report.made == 1 and len(report.rows) == 2 and report.rows[0][1] == report.rows[1][1]


def test_a_teacher_that_cannot_be_loaded_stops_the_extraction(context, samples):
    def load():
        raise ModelError("no such folder")

    with pytest.raises(ModelError, match="no such folder"):
        fill_store(VdmSource(replace(context, load_teacher=load)), samples, context.store)


@pytest.mark.parametrize("count", [2, 3, 7, 20])
def test_cycle_is_a_derangement_and_the_same_each_time(count):
    videos = [Path(f"{n}.mp4") for n in range(count)]
    cycle = next_in_cycle(videos, 5)
    assert cycle == next_in_cycle(videos[::-1], 5)
    assert sorted(cycle.values()) == sorted(videos) and all(a != b for a, b in cycle.items())


def test_shuffled_gives_another_clips_maps_to_own_words(monkeypatch, context, samples):
    fake_extraction(monkeypatch, [])
    base = VdmSource(context)
    fill_store(base, samples, context.store)
    twin = replace(samples[0], id="twin", question=samples[0].question + " Say.")
    source = build_source("shuffled", replace(context, base=base, samples=[*samples, twin]))
    report = fill_store(source, samples, context.store)
    assert report.made == 3
    for sample, key in report.rows:
        prior, own = context.store.get(key), context.store.get(base.key(sample))
        donor = next(s for s in samples if s.id == prior.provenance["maps_of"])
        assert donor.video != sample.video and prior.text == sample.question and prior.words == own.words
        theirs = context.store.get(base.key(donor))
        # "Where does ball 0 go?" and "Where does ball 1 go?": each word takes its own word's map, the numbers each other's
        assert torch.equal(prior.maps, theirs.maps) and prior.provenance["rows_of"] == [word.text for word in theirs.words]


def typed_samples(tmp_path, types):
    return [Sample(f"s{n}", write_video(tmp_path / f"typed{n}.mp4", seed=n), f"Where does ball {n} go?", "left", question_type=kind)
            for n, kind in enumerate(types)]


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_exchanges_within_a_question_type_in_one_cycle(monkeypatch, context, tmp_path, seed):
    fake_extraction(monkeypatch, [])
    samples = typed_samples(tmp_path, ["MR", "LM", "MR", "LM", "MR", "LM", "RC"])
    base = VdmSource(context)
    fill_store(base, samples, context.store)
    context = replace(context, base=base, samples=samples, seed=seed)
    source = build_source("shuffled", context)
    donors = {sample.id: source._donor(sample)[0] for sample in samples}
    for kind in ("MR", "LM"):
        members = [sample for sample in samples if sample.question_type == kind]
        assert {donors[sample.id].question_type for sample in members} == {kind}
        assert sorted(donors[sample.id].id for sample in members) == [sample.id for sample in members]  # a permutation ...
        way = [members[0].id]
        while donors[way[-1]].id not in way:
            way.append(donors[way[-1]].id)
        assert len(way) == len(members)  # ... of one cycle
    assert donors["s6"].id != "s6"  # the only one of its type takes any other clip's
    backwards = build_source("shuffled", replace(context, samples=samples[::-1]))
    assert all(backwards._donor(sample)[0] == donors[sample.id] for sample in samples)
    report = fill_store(source, samples, context.store)
    told = {sample.id: context.store.get(key).provenance["same_question_type"] for sample, key in report.rows}
    assert told == {f"s{n}": n != 6 for n in range(7)}


def test_the_rule_of_exchange_is_part_of_the_key(monkeypatch, context, samples):
    fake_extraction(monkeypatch, [])
    base = VdmSource(context)
    fill_store(base, samples, context.store)
    source = build_source("shuffled", replace(context, base=base, samples=samples))
    key = source.key(samples[0])
    monkeypatch.setattr(shuffled, "RULE", shuffled.RULE + 1)
    assert source.key(samples[0]) != key


@pytest.mark.parametrize("own, donor, rows", [
    ("which way does the red disc move", "which way does the blue ball move", "which way does the blue ball move"),
    ("red disc Move", "move blue ball", "blue ball move"),  # in lower case, wherever it stands
    ("red disc moves", "moves blue", "blue blue moves"),  # too few others: from the first again
    ("the disc the ball the cube", "the ring the", "the ring the ring the ring"),  # each occurrence its own, then again
    ("red disc", "red", "red red"),  # nothing left: all of the donor's
])
def test_a_shared_word_takes_its_own_map_and_the_others_go_in_order(own, donor, rows):
    own, donor = split_words(own), split_words(donor)
    assert [donor[row].text for row in rows_by_role(own, donor)] == rows.split()
    if own[0].text == "the":
        assert rows_by_role(own, donor)[::2] == [0, 2, 0]
    with pytest.raises(UserError, match="without words"):
        rows_by_role(own, [])


def test_shuffled_needs_two_clips(monkeypatch, context, samples):
    fake_extraction(monkeypatch, [])
    base = VdmSource(context)
    fill_store(base, samples[:1], context.store)
    source = build_source("shuffled", replace(context, base=base, samples=samples[:1]))
    report = fill_store(source, samples[:1], context.store)
    assert "at least two clips" in report.problems[0].reason


def test_exchange_cycles_rows_and_keeps_mass_over_shapes():
    own, donor = make_prior(shape=(2, 3, 4)), make_prior("a big dog", seed=3, shape=(3, 6, 2), words=2)
    prior = exchanged(own, donor, {})
    prior.validate()
    mass = donor.maps.sum(dim=(1, 2, 3))
    assert torch.allclose(prior.maps.sum(dim=(1, 2, 3)), mass[[0, 1, 0, 1]], rtol=1e-4)


def test_uniform_has_equal_mass_on_valid_cells():
    prior = make_prior()
    prior.grid.valid[0, 0, 0] = False
    flat = flattened(prior, "vdm")
    flat.validate()
    assert (flat.maps[:, 0, 0, 0] == 0).all()
    assert torch.allclose(flat.maps[:, prior.grid.valid].std(dim=1), torch.zeros(4), atol=1e-6)
    assert torch.allclose(flat.maps.sum(dim=(1, 2, 3)), (prior.maps * prior.grid.valid).sum(dim=(1, 2, 3)))


def test_oracle_takes_words_with_evidence(context, samples):
    class Truth:
        def evidence(self, video, text, words, grid):
            maps = torch.zeros(len(words), *grid.shape)
            maps[[i for i, word in enumerate(words) if word.text == "ball"], :, 2, 3] = 1.0
            return maps

    source = build_source("oracle", replace(context, truth=Truth()))
    (sample, prior), *_ = source.extract(samples)
    prior.validate()
    assert [word.text for word in prior.words] == ["ball"] and prior.grid.shape == (9, 16, 16)
    silent = replace(samples[0], question="What is it?")
    assert isinstance(next(source.extract([silent]))[1], Problem)


def test_oracle_on_the_embedded_world(tmp_path):
    from enhancer.data.samples import load_samples
    from enhancer.world import WorldSettings, load_truth, make_world

    make_world(tmp_path, WorldSettings(train_clips=3, test_clips=0, frames=5, height=32, width=32))
    samples, _ = load_samples(tmp_path / "train.json", tmp_path)
    context = SourceContext(samples=samples, store=PriorStore(tmp_path / "store"), sampling=Sampling(5), truth=load_truth(tmp_path))
    report = fill_store(build_source("oracle", context), samples, context.store)
    assert report.made == 3, report.problems
    prior = context.store.get(report.rows[0][1])
    assert torch.allclose(prior.maps.sum(dim=(1, 2, 3)), torch.ones(len(prior.words)), atol=1e-2)


def test_clip_errors_name_the_file(tmp_path, context):
    missing = Sample("gone", tmp_path / "gone.mp4", "Where?", "x")
    report = fill_store(VdmSource(context), [missing], context.store)
    assert "gone.mp4" in report.problems[0].reason and issubclass(ClipError, UserError)
