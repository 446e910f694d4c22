"""Which words share the map of a source that tells places alone: content words, parts of speech, or the teacher's."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from enhancer.data.samples import Problem, Sample
from enhancer.extraction import needed_sources
from enhancer.parts_of_speech import PARTS, parts_of_speech
from enhancer.recipe import build
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.filling import fill_store
from enhancer.sources import SourceContext, SourceSpec, build_source
from enhancer.video.clip import Sampling
from enhancer.world.sampling import draw_scene
from enhancer.world.text import TYPES
from tests.enhancer.test_sources import make_prior
from tests.enhancer.tiny_run import write_video
from vdm_priors.errors import RecipeError
from vdm_priors.store import PriorStore
from vdm_priors.words import is_content_word, split_words

TEXT = "Which way does the red ball roll first?"


@pytest.mark.parametrize("text, expected", [
    (TEXT, "way:noun red:adjective ball:noun roll:verb first:adverb"),
    ("How many times does the disc jump?", "many:adjective times:noun disc:noun jump:verb"),
    ("Does the dancer make a quick turn before the jump?",
     "dancer:noun make:verb quick:adjective turn:noun before:adverb jump:noun"),
    ("In which direction is the spinning wheel carried?", "direction:noun spinning:verb wheel:noun carried:verb"),
    ("What does he grab, and whom's he slowly waving to?", "grab:verb slowly:adverb waving:verb"),
    ("The dog's ball stops 3 times; two jumps",
     "dog's:noun ball:noun stops:verb 3:number times:noun two:number jumps:noun"),
    ("Куда катится мяч?", "Куда:noun катится:noun мяч:noun")])
def test_parts_of_speech(text, expected):
    words = split_words(text)
    told = zip(words, parts_of_speech(words), strict=True)
    assert " ".join(f"{word.text}:{part}" for word, part in told if part) == expected


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="abdeginrsty '-0123\u2019.", max_size=40))
def test_every_content_word_of_any_text_has_a_part_and_grammar_none(text):
    words = split_words(text)
    parts = parts_of_speech(words)
    assert [bool(part) for part in parts] == [is_content_word(word) for word in words] and set(parts) <= {"", *PARTS}


def test_of_the_worlds_questions_the_words_that_speak_of_motion_are_verbs_adverbs_or_way_and_times():
    for number, kind in enumerate([*TYPES] * 3):
        _, question = draw_scene(np.random.default_rng([3, number]), kind, "test")[:2]
        words = split_words(question.text)
        for word, part in zip(words, parts_of_speech(words), strict=True):
            for mention in question.mentions:
                if mention.start < word.end and word.start < mention.end:
                    moving = part in ("verb", "adverb") or word.text in ("way", "times")
                    assert moving == mention.moving, (question.text, word.text, part)


# ---- sources -------------------------------------------------------------------------------------

@pytest.fixture
def sample(tmp_path):
    return Sample("s", write_video(tmp_path / "a.mp4"), TEXT, "left")


@pytest.fixture
def context(sample, tmp_path):
    return SourceContext(samples=[sample], store=PriorStore(tmp_path / "store"), sampling=Sampling(4))


def words_of(context, sample):
    ((_, prior),) = build_source("frame_difference", context).extract([sample])
    prior.validate()
    assert all(torch.equal(found, prior.maps[0]) for found in prior.maps)
    assert prior.provenance["words"] == list(context.words)
    return [word.text for word in prior.words]


def test_a_list_of_parts_of_speech_chooses_the_words(context, sample):
    assert words_of(context, sample) == ["way", "red", "ball", "roll", "first"]
    assert words_of(replace(context, words=("verb", "adverb")), sample) == ["roll", "first"]
    assert words_of(replace(context, words=("noun",)), sample) == ["way", "ball"]
    nameless = replace(sample, question="Where does he roll?")
    ((_, problem),) = build_source("frame_difference", replace(context, words=("noun", "number"))).extract([nameless])
    assert problem == Problem("s", "its text has no noun or number that motion could belong to")


class Teacher:
    """A base that has one prior, of two words."""

    name = "vdm"

    def key(self, sample):
        return f"of{sample.id}"

    def extract(self, samples):
        return ((sample, make_prior(sample.question, words=2)) for sample in samples if sample.id == "s")


def test_the_teachers_words_where_it_has_a_prior_and_a_problem_where_not(context, sample):
    fill_store(Teacher(), [sample], context.store)
    of_teacher = replace(context, words=("vdm",), base=Teacher())
    assert words_of(of_teacher, sample) == ["Which", "way"]
    ((_, problem),) = build_source("frame_difference", of_teacher).extract([replace(sample, id="t")])
    assert problem == Problem("t", "the teacher has no prior of it to take the words from")


def test_the_rule_is_part_of_the_key(context, sample):
    rules = [{}, {"words": ("verb",)}, {"words": ("verb", "noun")}, {"words": ("vdm",), "base": Teacher()}]
    keys = [build_source("codec", replace(context, **rule)).key(sample) for rule in rules]
    assert len(set(keys)) == 4
    assert build_source("codec", replace(context, words=("noun", "verb"))).key(sample) == keys[2]


# ---- recipe --------------------------------------------------------------------------------------

def recipe_of(words, *arms):
    return build(EnhanceRecipe, {"name": "t", "world": {}, "sources": {"words": words},
                                 "arms": [{"name": f"a{n}", **arm} for n, arm in enumerate(arms)]})


def test_with_the_teachers_words_its_priors_are_made_first():
    ensemble = {"source": "ensemble", "members": ["flow", "oracle"]}
    arms = {"source": "codec"}, ensemble, {"source": "shuffled", "base": "codec"}
    assert SourceSpec("vdm") not in needed_sources(recipe_of(["content"], *arms))
    needed = needed_sources(recipe_of(["vdm"], *arms))
    codec, flow = (SourceSpec(name, (SourceSpec("vdm"),)) for name in ("codec", "flow"))
    assert set(needed) == {SourceSpec("vdm"), SourceSpec("oracle"), codec, flow, SourceSpec("shuffled", (codec,)),
                           SourceSpec("ensemble", (flow, SourceSpec("oracle")))}
    for spec in needed:
        assert all(needed.index(part) < needed.index(spec) for part in spec.of)
    assert [spec.label for spec in (codec, SourceSpec("shuffled", (codec,)))] == ["codec", "shuffled(codec)"]


@pytest.mark.parametrize("words", [["content", "verb"], ["vdm", "content"], ["noun", "noun"], [], ["nouns"]])
def test_rules_that_make_no_sense_are_told(words):
    fault = "must be one of" if words == ["nouns"] else "words must be [content], [vdm], or one or more different"
    with pytest.raises(RecipeError, match=re.escape(fault)):
        recipe_of(words, {"source": "codec"})
