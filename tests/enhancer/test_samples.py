from __future__ import annotations

import json

import pytest

from enhancer.data.samples import Sample, load_samples, split_options
from vdm_priors.errors import SampleError


@pytest.fixture
def root(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    return tmp_path


def talk(id="one", video="videos/a.mp4", question="<video>\nWhat moves?", answer="the ball", **more):
    return {"id": id, "video": video, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def load(root, rows, lines=False, **how):
    path = root / "data.json"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return load_samples(path, root, **how)


def test_conversations_with_options_and_meta(root):
    samples, problems = load(root, [talk(options=["the ball", "the cube"], question_type="MR", scene=7)])
    assert problems == []
    assert samples == [Sample("one", (root / "videos/a.mp4").resolve(), "What moves?", "the ball", ("the ball", "the cube"), "MR")]
    assert samples[0].meta == {"scene": 7}


def test_later_turns_become_questions_of_their_own(root):
    row = talk()
    row["conversations"] += [{"from": "human", "value": "And then?"}, {"from": "gpt", "value": "it stops"}]
    samples, _ = load(root, [row], lines=True)
    assert [(s.id, s.question, s.answer) for s in samples] == [("one", "What moves?", "the ball"), ("one#2", "And then?", "it stops")]


@pytest.mark.parametrize("content", ["<video>Where?", [{"type": "video"}, {"type": "text", "text": "Where?"}]])
def test_messages(root, content):
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "left"}], "videos": ["videos/a.mp4"]}
    samples, problems = load(root, [row])
    assert not problems and (samples[0].id, samples[0].question, samples[0].answer) == ("row 1", "Where?", "left")


def test_motionbench_letters_become_texts_and_hidden_answers_stay(root):
    question = "Which way?\nA. left\nB. right (up)\nC. down"
    row = {
        "key": "k", "question_type": "MR", "video_type": "web", "video_path": "a.mp4", "video_info": {"fps": 25},
        "qa": [{"uid": 1, "question": question, "answer": "B"}, {"uid": 2, "question": question, "answer": "NA"}],
    }  # fmt: skip
    samples, problems = load(root, [row], lines=True)
    assert not problems and [s.answer for s in samples] == ["right (up)", "NA"]
    assert samples[0].options == ("left", "right (up)", "down") and samples[0].question == "Which way?"
    assert samples[0].question_type == "MR" and samples[0].meta["video_type"] == "web"


def test_option_lines_must_follow_the_alphabet():
    assert split_options("Q?\nB. not an option\nA. yes\nB) no") == ("Q?\nB. not an option", ["yes", "no"])


@pytest.mark.parametrize("answer, text", [("b", None), ("B", "cube"), ("(B)", "cube"), ("B. cube", "cube"), ("B. ball", None), ("D", None), ("cube", "cube"), ("NA", "NA")])
def test_answers_of_multiple_choice(root, answer, text):
    samples, problems = load(root, [talk(id="ok"), talk(answer=answer, options=["ball", "cube", "ring"])])
    if text is None:
        assert [p.id for p in problems] == ["one"] and "none of the" in problems[0].reason
    else:
        assert samples[1].answer == text


BAD = {
    "no <video>": talk(question="What moves?"),
    "has 2 <video>": talk(question="<video><video>What?"),
    "question is empty": talk(question="<video>\n "),
    "answer is empty": talk(answer=" "),
    "used before": talk(id="good"),
    "is not in": talk(video="videos/none.mp4"),
    "leaves the data folder": talk(video="../secret.mp4"),
    "names no video": {k: v for k, v in talk().items() if k != "video"},
    "exactly one": talk(video=["a", "b"]),
    "by 'system'": {**talk(), "conversations": [{"from": "system", "value": "x"}]},
    "a question and its answer": {**talk(), "conversations": [{"from": "human", "value": "<video>x"}]},
    "is not a list of turns": {**talk(), "conversations": "hello"},
    "two of the options": talk(options=["the ball", "the ball"]),
    "needs 2 to": talk(options=["the ball"]),
    "list of texts": talk(options=[1, 2]),
    "none of the keys": {"id": "x"},
    "a list of questions": {"key": "x", "qa": []},
    "no option lines": {"key": "x", "video_path": "a.mp4", "qa": [{"question": "Why?", "answer": "A"}]},
    "not an object": 3,
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_listed_and_the_rest_loads(root, reason):
    samples, problems = load(root, [talk(id="good"), BAD[reason]])
    assert [s.id for s in samples] == ["good"]
    assert len(problems) == 1 and reason in problems[0].reason


def test_a_broken_line_is_listed(root):
    path = root / "data.jsonl"
    path.write_text(json.dumps(talk()) + "\n\n{broken\n")
    samples, problems = load_samples(path)
    assert len(samples) == 1 and problems[0].id == "line 3"


def test_absolute_paths_inside_the_root_and_links_out_of_it(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "b.mp4"
    elsewhere.touch()
    (root / "videos" / "link.mp4").symlink_to(elsewhere)
    samples, problems = load(root, [talk(video=str(root / "videos/a.mp4")), talk(id="two", video="videos/link.mp4")])
    assert [s.id for s in samples] == ["one"] and "leaves" in problems[0].reason


def test_a_file_without_a_usable_row_fails_as_a_whole(root):
    for content, message in [("[]", "no rows"), ("[{", "not valid JSON"), (json.dumps([talk(answer="")]), "answer is empty")]:
        (root / "data.json").write_text(content)
        with pytest.raises(SampleError, match=message):
            load_samples(root / "data.json")
    with pytest.raises(SampleError, match="cannot be read"):
        load_samples(root / "none.json")
    with pytest.raises(SampleError, match="format 'xml' is unknown"):
        load(root, [talk()], format="xml")
