"""Motion sources: found by name, keys, controls that spoil the place only, and filling a store."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from enhancer.console import Console
from enhancer.data.samples import Problem, Sample
from enhancer.extraction import needed_sources, source_contexts, used_teachers, with_own_frames
from enhancer.preflight import Preflight
from enhancer.preflight_models import check_further_teachers
from enhancer.recipe import build
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import RunFolder
from enhancer.filling import fill_store
from enhancer.sources import SourceContext, SourceSpec, build_source, build_spec, shared_text, source_names
from enhancer.sources import shuffled
from enhancer.sources.ensemble import averaged
from enhancer.sources.shuffled import exchanged, next_in_cycle, rows_by_role
from enhancer.sources.uniform import flattened
from enhancer.sources.vdm import VdmSource
from enhancer.video.clip import Sampling
from enhancer.video.footage import Footage
from vdm_priors.errors import ClipError, ModelError, RecipeError, StoreError, UserError
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vdm_priors.settings import ExtractionSettings
from vdm_priors.store import PriorStore
from vdm_priors.words import split_words

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import teacher_folder, write_video  # noqa: E402


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
    assert {"vdm", "oracle", "uniform", "shuffled", "ensemble"} <= set(source_names())
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


def test_spans_of_one_file_and_pictures_are_clips_of_their_own():
    file, pictures = Path("a.mp4"), tuple(Path(f"{n}.png") for n in range(3))
    videos = [file, Footage((file,), 0, 2.5), Footage((file,), 2.5), Path("b.mp4"), Footage(pictures, fps=2.0)]
    cycle = next_in_cycle(videos, 1)
    assert cycle == next_in_cycle(videos[::-1], 1) and set(cycle) == set(cycle.values()) == set(videos)
    assert all(a != b for a, b in cycle.items())


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


# ---- decoding and writing beside the compute -----------------------------------------------------

def test_clips_are_decoded_one_batch_ahead_and_no_further(monkeypatch, context, tmp_path):
    samples = [Sample(f"s{n}", write_video(tmp_path / f"more{n}.mp4", seed=n), f"Where does ball {n} go?", "left") for n in range(8)]
    decoded, seen = [], []
    get = context.frames.get
    monkeypatch.setattr(context.frames, "get", lambda path, sampling: (decoded.append(path), get(path, sampling))[1])

    def extract(teacher, clips, texts, settings, size=None):
        time.sleep(0.2)  # long enough for the thread to go as far as it may
        seen.append(len(decoded))
        return [make_prior(text) for text in texts]

    monkeypatch.setattr("enhancer.sources.vdm.extract_priors", extract)
    report = fill_store(VdmSource(context), samples, context.store)
    assert report.made == 8 and seen[0] == 4 and all(found <= 2 * (n + 2) for n, found in enumerate(seen))


def test_errors_of_both_threads_come_to_the_right_sample(monkeypatch, context, samples, tmp_path):
    fake_extraction(monkeypatch, [])
    bad = Sample("bad", tmp_path / "bad.mp4", "Where?", "x")
    bad.video.write_bytes(b"not a video")
    report = fill_store(VdmSource(context), [samples[0], bad, *samples[1:]], context.store)
    assert [p.id for p in report.problems] == ["bad"] and [sample.id for sample, _ in report.rows] == ["s0", "s1", "s2"]
    source = VdmSource(replace(context, store=PriorStore(tmp_path / "other")))
    full, put = source.key(samples[1]), PriorStore.put

    def on_a_full_disk(store, key, prior):
        if key == full:
            raise StoreError(f"The prior {key} cannot be written (No space left on device).")
        put(store, key, prior)

    monkeypatch.setattr(PriorStore, "put", on_a_full_disk)
    with pytest.raises(StoreError, match=f"{full}.*No space left"):
        fill_store(source, samples, PriorStore(tmp_path / "other"))
    assert full not in PriorStore(tmp_path / "other").keys()


def test_a_write_under_way_is_finished_when_the_teacher_fails(monkeypatch, context, samples):
    put = context.store.put
    monkeypatch.setattr(context.store, "put", lambda key, prior: (time.sleep(0.2), put(key, prior)))

    def extract(teacher, clips, texts, settings, size=None):
        if len(texts) == 1:  # the second batch
            raise RuntimeError("the teacher failed")
        return [make_prior(text) for text in texts]

    monkeypatch.setattr("enhancer.sources.vdm.extract_priors", extract)
    with pytest.raises(RuntimeError, match="the teacher failed"):
        fill_store(VdmSource(context), samples, context.store)
    assert len(context.store.keys()) == 2


# ---- ensembles -----------------------------------------------------------------------------------

def mean_by_loops(priors, gate):
    """The rule of enhancer.sources.ensemble, cell by cell, for members on one grid: {word: (map, weight, agreement)}."""
    found = {}
    for word in {word for prior in priors for word in prior.words}:
        maps, weights = [], []
        for prior in priors:
            if word in prior.words:
                row = prior.words.index(word)
                maps.append(prior.maps[row].double() / float(prior.maps[row].double().sum()))
                weights.append(float(prior.weight[row]))
        cosines, volumes = [], priors[0].grid.volumes
        for a in range(len(maps)):
            for b in range(a):
                product = left = right = 0.0
                for cell in range(maps[a].numel()):
                    x, y, v = (float(t.flatten()[cell]) for t in (maps[a], maps[b], volumes))
                    product, left, right = product + x * y / v, left + x * x / v, right + y * y / v
                cosines.append(product / (left * right) ** 0.5)
        agreement = sum(cosines) / len(cosines) if cosines else None
        weight = sum(weights) / len(weights) * ((agreement or 0.0) if gate == "agreement" else 1.0)
        found[word] = sum(maps) / len(maps), weight, agreement
    return found


def choose(prior, rows):
    return replace(prior, words=[prior.words[n] for n in rows], maps=prior.maps[rows], weight=prior.weight[rows])


@pytest.mark.parametrize("gate", ["none", "agreement"])
def test_ensemble_is_the_mean_over_the_members_that_have_a_word(gate):
    spans = [(0.0, 0.5), (0.5, 2.0)]  # frames of unlike length: agreement is of densities
    grid = TokenGrid.regular(spans, 3, 4)
    members = [replace(make_prior(seed=n), grid=grid, weight=torch.full((4,), 0.5 + 0.1 * n)) for n in range(3)]
    members = [members[0], choose(members[1], [0, 2]), choose(members[2], [2])]
    prior = averaged(dict(zip("abc", members, strict=True)), gate)
    prior.validate()
    expected = mean_by_loops(members, gate)
    assert [word.text for word in prior.words] == ["the", "red", "ball", "rolls"]
    for n, word in enumerate(prior.words):
        maps, weight, agreement = expected[word]
        assert torch.allclose(prior.maps[n].double(), maps, atol=1e-7)
        assert abs(float(prior.weight[n]) - weight) < 1e-6
        told = prior.provenance["agreement_of_words"][n]
        assert told == agreement or abs(told - agreement) < 1e-6
    facts = prior.provenance
    assert facts["members_of_words"] == [["a", "b"], ["a"], ["a", "b", "c"], ["a"]]
    assert facts["words_lacked"] == {"a": 0, "b": 2, "c": 3} and facts["agreement_of_words"][1] is None
    assert 0 < facts["agreement"] < 1 and facts["gate"] == gate


@given(st.integers(0, 10**6), st.integers(2, 4), st.permutations(range(3)))
@settings(max_examples=15, deadline=None)
def test_ensemble_keeps_mass_and_does_not_depend_on_scale_or_order(seed, frames, order):
    fine = make_prior(seed=seed, shape=(frames, 4, 6))
    members = {"fine": fine, "coarse": make_prior(seed=seed + 1, shape=(1, 2, 3)), "same": make_prior(seed=seed + 2, shape=(frames, 4, 6))}
    members["coarse"].grid = TokenGrid.regular([(0.0, float(frames))], 2, 3)
    prior = averaged(members)
    assert prior.grid == fine.grid and torch.allclose(prior.maps.sum(dim=(1, 2, 3)), torch.ones(4), atol=1e-5)
    scaled = {label: replace(member, maps=member.maps * (n + 2)) for n, (label, member) in enumerate(members.items())}
    again = averaged({label: scaled[label] for label in [list(members)[n] for n in order]})
    assert torch.allclose(again.maps, prior.maps, atol=1e-6)
    assert abs(again.provenance["agreement"] - prior.provenance["agreement"]) < 1e-6
    alone = averaged({"one": fine, "two": fine})
    assert alone.provenance["agreement"] == pytest.approx(1.0) and alone.words == fine.words


def test_members_that_see_elsewhere_do_not_agree_and_weigh_nothing():
    left, right = make_prior(words=2), make_prior(words=2)
    left.maps[..., 2:], right.maps[..., :2] = 0.0, 0.0
    prior = averaged({"left": left, "right": right}, "agreement")
    assert prior.provenance["agreement_of_words"] == [0.0, 0.0] and prior.weight.tolist() == [0.0, 0.0]


def test_what_cannot_be_averaged_is_told():
    one, other = make_prior(words=1), make_prior("the dog", words=None)
    with pytest.raises(UserError, match="of one text"):
        averaged({"one": one, "other": other})
    with pytest.raises(UserError, match="texts are: none"):
        averaged({})
    late = replace(make_prior(), grid=TokenGrid.regular([(9.0, 10.0), (10.0, 11.0)], 3, 4))
    alone = averaged({"early": make_prior(), "late": late})  # the late one's mass is nowhere on the early one's grid
    assert alone.provenance["words_lacked"] == {"early": 0, "late": 4} and alone.provenance["agreement"] is None
    with pytest.raises(UserError, match="no word is in two members"):
        averaged({"early": make_prior(), "late": late}, "agreement")
    with pytest.raises(UserError, match="no word of its members' priors has mass"):
        averaged({"one": replace(one, maps=torch.zeros_like(one.maps))})


def test_ensemble_of_stored_priors(monkeypatch, context, samples):
    fake_extraction(monkeypatch, [])
    other = replace(context, teacher_fingerprint="u", settings=ExtractionSettings(seed=5))
    contexts = {"": context, "second": other}
    spec = SourceSpec("ensemble", (SourceSpec("vdm"), SourceSpec("vdm", teacher="second")))
    first, second = (build_spec(part, contexts) for part in spec.of)
    source = build_spec(spec, contexts)
    with pytest.raises(UserError, match="none of the ensemble's members"):
        source.key(samples[0])
    fill_store(first, samples, context.store)
    lone = source.key(samples[0])
    fill_store(second, samples[:2], context.store)
    assert source.key(samples[0]) != lone  # another member has come
    report = fill_store(source, samples, context.store)
    assert report.made == 3
    priors = [context.store.get(key) for _, key in report.rows]
    assert [prior.provenance["lacking"] for prior in priors] == [[], [], ["second"]]
    assert priors[0].provenance["members"] == ["vdm", "second"] and priors[2].provenance["agreement"] is None
    gated = build_spec(replace(spec, gate="agreement"), contexts)
    assert gated.key(samples[0]) != source.key(samples[0])
    report = fill_store(gated, samples, context.store)
    assert [p.id for p in report.problems] == ["s2"] and "no word is in two members" in report.problems[0].reason
    agreed = context.store.get(report.rows[0][1])
    assert torch.allclose(agreed.weight, torch.tensor(agreed.provenance["agreement_of_words"]), atol=1e-6)


# ---- what arms ask for ---------------------------------------------------------------------------

def recipe_of(*arms, **more):
    return build(EnhanceRecipe, {"name": "t", "world": {}, "arms": [{"name": f"a{n}", **arm} for n, arm in enumerate(arms)], **more})


def test_arms_with_ensembles_and_further_teachers():
    gated = {"source": "ensemble", "members": ["vdm", "oracle", "wan"], "gate": "agreement"}
    recipe = recipe_of({"source": "shuffled", "base": "ensemble", "members": ["vdm", "oracle"]}, gated, {"source": "vdm", "teacher": "wan"},
                       {"source": "uniform", "teacher": "wan"}, {"source": "vdm"}, {"source": "oracle"}, {"source": "none"},
                       teachers=[{"name": "wan", "model": "some/wan"}, {"name": "unused", "model": "some/other"}])
    labels = [spec.label for spec in needed_sources(recipe)]
    assert set(labels[:3]) == {"vdm", "oracle", "wan"} and len(set(labels)) == len(labels)
    assert labels.index("ensemble(vdm+oracle)") < labels.index("shuffled(ensemble(vdm+oracle))")
    assert set(labels[3:]) == {"ensemble(vdm+oracle)", "shuffled(ensemble(vdm+oracle))", "uniform(wan)",
                               "ensemble(vdm+oracle+wan, gate agreement)"}
    assert list(used_teachers(recipe)) == ["", "wan"]
    assert list(used_teachers(recipe_of({"source": "vdm", "teacher": "wan"}, teachers=[{"name": "wan"}]))) == ["wan"]


@pytest.mark.parametrize("arm, fault", [
    ({"source": "ensemble", "members": ["vdm"]}, "arms.a0.members: an ensemble needs two or more different members"),
    ({"source": "ensemble", "members": ["vdm", "vdm"]}, "two or more different members"),
    ({"source": "ensemble", "members": ["vdm", "wann"]}, "no source or teacher 'wann'; known: codec, flow, frame_difference, oracle, residual, vdm, wan"),
    ({"source": "ensemble", "members": ["vdm", "uniform"]}, "no source or teacher 'uniform'"),
    ({"source": "vdm", "members": ["vdm", "oracle"]}, "members and gate are keys of the source ensemble, not of vdm"),
    ({"source": "vdm", "gate": "agreement"}, "members and gate are keys of the source ensemble"),
    ({"source": "oracle", "teacher": "wan"}, "only the source vdm has a teacher"),
    ({"source": "vdm", "teacher": "gone"}, "no teacher 'gone'; known: wan"),
    ({"source": "ensemble", "members": ["vdm", "oracle"], "gate": "maybe"}, "must be one of none, agreement")])
def test_arms_that_make_no_sense_are_told(arm, fault):
    with pytest.raises(RecipeError, match=re.escape(fault)):
        recipe_of(arm, teachers=[{"name": "wan"}])


@pytest.mark.parametrize("teacher, fault", [
    ({"name": "oracle"}, "teachers.oracle: the name is a source's"), ({"name": "w", "text": "answer"}, "give the same `text`"),
    ({"name": "w", "store": "x"}, "leave `store` out"), ({"name": "w", "size": [8]}, "teachers.w.size"), ({}, "required")])
def test_teachers_that_make_no_sense_are_told(teacher, fault):
    with pytest.raises(RecipeError, match=re.escape(fault)):
        recipe_of({"source": "vdm"}, teachers=[teacher])


def test_each_teacher_has_its_own_settings(tmp_path):
    recipe = recipe_of({"source": "ensemble", "members": ["vdm", "second"]}, output=str(tmp_path), teacher={
        "model": str(teacher_folder())}, teachers=[{"name": "second", "model": str(teacher_folder()), "size": [16, 16],
                                                    "batch_size": 3, "sampling": {"frames": 5}}])
    full = with_own_frames(recipe)
    assert (full.teacher.sampling.frames, full.teachers[0].sampling.frames) == (9, 5) and with_own_frames(full) is full
    contexts = source_contexts(tmp_path, full, [], None, Console(quiet=True))
    assert [contexts[name].size for name in ("", "second")] == [None, (16, 16)] and contexts["second"].batch_size == 3
    assert contexts[""].store is contexts["second"].store
    assert contexts["second"].load_teacher().transformer is not None


def test_faults_of_further_teachers_are_found_before_the_run(tmp_path):
    (tmp_path / "hollow").mkdir()
    recipe = recipe_of({"source": "ensemble", "members": ["oracle", "hollow", "odd"]}, {"source": "oracle"}, teachers=[
        {"name": "hollow", "model": str(tmp_path / "hollow")}, {"name": "unused", "model": "no such"},
        {"name": "odd", "model": str(teacher_folder()), "sampling": {"frames": 8}}])
    report = Preflight()
    check_further_teachers(recipe, report)
    assert [fault.split(": ")[0] for fault in report.faults] == ["teachers.hollow", "teachers.odd"]
    assert "no weights" in report.faults[0] and "not 8" in report.faults[1]


def test_a_run_folder_of_an_older_version_goes_on(tmp_path):
    """Keys that have come since, at their defaults, do not make another recipe of it."""
    recipe = recipe_of({"source": "vdm"})
    run = RunFolder.open(tmp_path / "t", recipe)
    path = tmp_path / "t" / "recipe.yaml"
    old = yaml.safe_load(path.read_text())
    del old["teachers"], old["arms"][0]["members"], old["arms"][0]["gate"], old["arms"][0]["teacher"]
    path.write_text(yaml.safe_dump(old))
    assert RunFolder.open(tmp_path / "t", recipe).folder == run.folder
    changed = recipe_of({"source": "vdm", "weight": 0.5})
    with pytest.raises(UserError, match="arms.a0.weight: None -> 0.5"):
        RunFolder.open(tmp_path / "t", changed)
