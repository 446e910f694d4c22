from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from enhancer.data.samples import Sample
from enhancer.evaluation import multiple_choice
from enhancer.evaluation.multiple_choice import evaluate
from enhancer.evaluation.scores import summarise
from enhancer.training import AlignmentSettings, TrainSettings, train
from enhancer.video.clip import FrameCache, Sampling
from tests.enhancer.test_training import write_video
from tests.vlm_hooks.tiny_student import tiny_student
from vdm_priors.errors import UserError

SAMPLING = Sampling(frames=4)
TEXTS = ("up", "down", "to the left")
SINGLE = ("u", "d", "l")  # one byte, one token of the small vocabulary


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4", 0)


def ask(video, id="q", options=TEXTS, answer=None, question="Where to?"):
    return Sample(id, video, question, answer or options[0], tuple(options), "MR")


def reference(student, sample, options, prompt, ending):
    """Log-probability of each option by a forward of its own, token by token."""
    clip = FrameCache().get(sample.video, SAMPLING)
    scores = []
    for option in options:
        inputs = student.encode([clip], [prompt], [option]).inputs
        labels = inputs.pop("labels")[0]
        with torch.no_grad():
            logprobs = student.model(**inputs).logits[0].log_softmax(-1)
        places = (labels != -100).nonzero()[:, 0].tolist()
        scores.append(sum(float(logprobs[p - 1, labels[p]]) for p in (places if ending else places[:-1])))
    return scores


@pytest.mark.parametrize("options, ending", [(TEXTS, True), (SINGLE, False)])
def test_option_text_is_the_answers_log_probability(video, options, ending):
    student, sample = tiny_student(), ask(video, options=options)
    row = evaluate(student, [sample], SAMPLING)[0]
    expected = reference(student, sample, options, student.prompt(sample.question).text, ending)
    assert row["scores"] == pytest.approx(expected, abs=1e-4)
    best = options[max(range(3), key=expected.__getitem__)]
    assert row["chosen"] == best and row["correct"] == (best == sample.answer)
    assert row["question_type"] == "MR" and row["options"] == list(options) and row["answer"] == options[0]


def test_letter_compares_letters_after_a_prompt_with_the_options(video):
    student, sample = tiny_student(), ask(video)
    row = evaluate(student, [sample], SAMPLING, protocol="letter")[0]
    expected = reference(student, sample, "ABC", student.prompt(sample.question, TEXTS).text, ending=False)
    assert row["scores"] == pytest.approx(expected, abs=1e-4) and row["chosen"] in TEXTS


def test_a_batch_scores_as_each_alone_and_keeps_the_order(video):
    student = tiny_student()
    samples = [
        ask(video, "a", question="Where does it go in the end?"),
        ask(video, "b", SINGLE),
        ask(video, "e", question="Where does it go in the dark"),
        ask(video, "c", ("yes, twice", "no"), question="Well?"),
        ask(video, "d", SINGLE, question="So where?"),
    ]
    ticks = []
    together = evaluate(student, samples, SAMPLING, batch_size=2, progress=lambda *tick: ticks.append(tick[:2]))
    alone = [evaluate(student, [sample], SAMPLING)[0] for sample in samples]
    for one, other in zip(together, alone, strict=True):
        assert one["id"] == other["id"] and one["scores"] == pytest.approx(other["scores"], abs=1e-4)
    assert ticks == [(5, 5)]


def test_the_video_is_seen_once_a_question(video, monkeypatch):
    student = tiny_student()
    calls = []
    forward = student.model.forward
    monkeypatch.setattr(student.model, "forward", lambda **inputs: calls.append(len(inputs["input_ids"])) or forward(**inputs))
    evaluate(student, [ask(video, str(n), SINGLE) for n in range(4)], SAMPLING)
    assert calls == [4]
    evaluate(student, [ask(video, str(n)) for n in range(4)], SAMPLING)
    assert calls == [4, 4, 12]  # the prompts, then their options


def test_hidden_answers_and_errors_are_not_scored(video, tmp_path):
    student = tiny_student()
    samples = [
        ask(video, "hidden", answer="NA"),
        replace(ask(video, "gone"), video=tmp_path / "none.mp4"),
        ask(video, "long", question="why " * 600),
        ask(video, "token", question="<|im_end|>"),
        replace(ask(video, "open"), options=()),
        ask(video, "good"),
    ]
    rows = {row["id"]: row for row in evaluate(student, samples, SAMPLING)}
    assert rows["hidden"]["correct"] is None and rows["hidden"]["chosen"] in TEXTS and "error" not in rows["hidden"]
    for id, reason in [("gone", "none.mp4"), ("long", "max_length"), ("token", "control token"), ("open", "no options")]:
        assert reason in rows[id]["error"] and rows[id]["correct"] is None and rows[id]["scores"] is None
    assert rows["good"]["correct"] is not None
    summary = summarise(list(rows.values()))
    assert summary["overall"]["n"] == 1 and summary["not_scored"] == 1 and not summary["complete"]
    assert {error["id"] for error in summary["errors"]} == {"gone", "long", "token", "open"}


def test_the_model_keeps_its_mode_and_weights(video):
    student = tiny_student()
    student.model.train()
    evaluate(student, [ask(video)], SAMPLING)
    assert student.model.training
    with pytest.raises(UserError, match="protocol 'loud' is unknown"):
        evaluate(student, [], protocol="loud")
    assert multiple_choice.evaluate(student, []) == []


def test_a_student_that_learnt_the_answer_chooses_it(video, tmp_path):
    student, sample = tiny_student(), ask(video, answer="down")
    settings = TrainSettings(steps=25, batch_size=1, learning_rate_llm=1e-2, learning_rate_merger=1e-3, learning_rate_vision=2e-4,
                             warmup=0.0, alignment=AlignmentSettings(weight=0.0))
    train(student, [sample], settings, tmp_path, sampling=SAMPLING)
    row = evaluate(student, [sample], SAMPLING)[0]
    assert row["correct"] and row["scores"][1] > -0.5
