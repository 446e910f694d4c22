from __future__ import annotations

import json

import pytest

from enhancer.data.formats import CAPTION_QUESTION
from enhancer.data.files import assumed_rates
from enhancer.data.samples import Picture, Sample, load_samples, split_options
from enhancer.video.footage import Footage
from vdm_priors.errors import SampleError


@pytest.fixture
def root(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    return tmp_path


def talk(id="one", video="videos/a.mp4", question="<video>\nWhat moves?", answer="the ball", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": id, "video": video, "conversations": turns, **more}


def load(root, rows, lines=False, **how):
    path = root / "data.json"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return load_samples(path, root, **how)


def test_conversations_with_options_and_meta(root):
    samples, problems = load(root, [talk(options=["the ball", "the cube"], question_type="MR", scene=7)])
    assert problems == []
    file = (root / "videos/a.mp4").resolve()
    assert samples == [Sample("one", file, "What moves?", "the ball", ("the ball", "the cube"), "MR")]
    assert samples[0].meta == {"scene": 7}


def test_later_turns_become_questions_of_their_own(root):
    row = talk()
    row["conversations"] += [{"from": "human", "value": "And then?"}, {"from": "gpt", "value": "it stops"}]
    samples, _ = load(root, [row], lines=True)
    assert [(s.id, s.question) for s in samples] == [("one", "What moves?"), ("one#2", "And then?")]
    assert [s.answer for s in samples] == ["the ball", "it stops"]


@pytest.mark.parametrize("content", ["<video>Where?", [{"type": "video"}, {"type": "text", "text": "Where?"}]])
def test_messages(root, content):
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "left"}]
    row = {"messages": turns, "videos": ["videos/a.mp4"]}
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


def favor(name="a.mp4", **more):
    """A row of FAVOR-Bench's video_perspective.json."""
    asked = {"question": "How does it move?", "options": ["to the left", "in a circle"], "task_type": "HAC"}
    return {
        "video_name": name, "questions": [{**asked, "correct_answer": "in a circle"}, {**asked, "correct_answer": "B"}],
        "caption": "A ball rolls.", "camera_motion": "static", "subject_attributes": [], "motion_list": [],
        "chronological_motion_list": [], **more,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a.mp4", "a", "videos/a"])
def test_favor_bench_gives_a_sample_a_question(root, name):
    samples, problems = load(root, [favor(name)])
    assert not problems and [s.id for s in samples] == [f"{name}#1", f"{name}#2"]
    assert {s.answer for s in samples} == {"in a circle"} and {s.question_type for s in samples} == {"HAC"}
    assert samples[0].video == (root / "videos/a.mp4").resolve() and samples[0].options[0] == "to the left"
    assert samples[0].meta["caption"] == "A ball rolls."


def test_captions_are_answers_to_one_question(root):
    samples, problems = load(root, [{"video_path": "a.mp4", "motion_caption": " It rolls. "}], lines=True)
    assert not problems and (samples[0].question, samples[0].answer) == (CAPTION_QUESTION, "It rolls.")


def test_llava_video_marks_its_video_as_an_image(root):
    samples, _ = load(root, [talk(question="<image>\nWhat moves?")])
    assert samples[0].question == "What moves?"


BOTH = "<video>\n<image>\n<video>\nWhich is it?"


@pytest.fixture
def more(root):
    """Another video and a picture."""
    (root / "videos/b.mp4").touch()
    (root / "p.png").touch()
    return root


def parts(*content, **row):
    """A row of "messages" whose question is in parts."""
    told = [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "left"}]
    return {"messages": told, **row}


def test_several_videos_and_a_picture_keep_their_order(more):
    a, b, picture = ((more / name).resolve() for name in ("videos/a.mp4", "videos/b.mp4", "p.png"))
    named = [{"type": "video", "video": "videos/a.mp4", "video_end": 2}, {"type": "image", "image": "p.png"},
             {"type": "video", "video": "videos/b.mp4"}, {"type": "text", "text": "Which is it?"}]
    rows = [talk(id="listed", video=["videos/a.mp4", "videos/b.mp4"], question=BOTH, image="p.png"), parts(*named),
            talk(id="after", videos=["videos/b.mp4", "videos/a.mp4"], question="Which is it? <video> <video>", video=None)]
    del rows[2]["video"]
    rows[0]["conversations"] += [{"from": "human", "value": "And why?"}, {"from": "gpt", "value": "it stops"}]
    samples, problems = load(more, rows, several=True)
    cut = Footage((a,), 0.0, 2.0)
    assert not problems and {s.question for s in samples} == {"Which is it?", "And why?"}
    shown = (a, Picture(picture), b)
    assert [s.shown for s in samples] == [shown, shown, (cut, Picture(picture), b), (b, a)]
    assert [s.video for s in samples] == [a, a, cut, b] and samples[2].kinds == ["video", "image", "video"]
    views = samples[0].views()
    assert [(v.id, v.video, v.question, v.shown) for v in views] == [
        ("listed", a, "Which is it?", ()), ("listed@2", b, "Which is it?", ())]
    assert load(more, [talk()], several=True)[0][0].views() == load(more, [talk()])[0]


@pytest.mark.parametrize("row, reason", [
    (talk(video=["videos/a.mp4", "videos/b.mp4"]), "has 1 <video> and 0 <image>, but the row names 2 videos"),
    (talk(question=BOTH, image="p.png"), "has 2 <video> and 1 <image>, but the row names 1 videos and 1 pictures"),
    (talk(question="<video>\n<image>\nIs it this one?"), "0 pictures; put one for each"),
    (talk(images=["p.png"]), "has 1 <video> and 0 <image>, but the row names 1 videos and 1 pictures"),
    (talk(question="Is <video> like <image>?", images=["p.png"]), "stand between words; put them all before"),
    (talk(question="<video> <image> Q?", images=["no.png"]), "'no.png' is not in"),
    (talk(question="<video> <image> Q?", images=[3]), "a picture that is no path"),
    (talk(question=BOTH, image="p.png", video=["videos/a.mp4", "videos/b.mp4"], video_end=1), "one video_start or"),
    (parts({"type": "audio"}), "only text, video and image are read"),
    ({"id": "good@2", **talk(id="good@2")}, "are called good@2, and other rows too"),
])  # fmt: skip
def test_several_videos_that_cannot_be_told_apart_are_refused(more, row, reason):
    good = talk(id="good", question=BOTH, image="p.png", video=["videos/a.mp4", "videos/b.mp4"])
    samples, problems = load(more, [row, good, talk(id="plain")], several=True)
    assert len(problems) == 1 and reason in problems[0].reason and len(samples) == 2


def test_several_videos_are_refused_where_one_is_asked_about(more):
    rows = [talk(), talk(id="two", video=["videos/a.mp4", "videos/b.mp4"], question="<video><video>Q?"),
            talk(id="beside", question="<video><image>Q?", images=["p.png"])]
    samples, problems = load(more, rows)
    assert [s.id for s in samples] == ["one"] and [p.id for p in problems] == ["two", "beside"]
    assert "shows 2 videos and 0 pictures; here a sample is one question about one video" in problems[0].reason
    assert "shows 1 videos and 1 pictures" in problems[1].reason and "join what" in problems[1].reason


def test_rows_of_all_formats_in_one_file(root):
    motionbench = {"key": "k", "video_path": "a.mp4", "qa": [{"uid": "u", "question": "Q?\nA. x\nB. y", "answer": "A"}]}
    captions = {"video_path": "a.mp4", "motion_caption": "It rolls."}
    samples, problems = load(root, [talk(), favor(), motionbench, captions])
    assert not problems and [s.id for s in samples] == ["one", "a.mp4#1", "a.mp4#2", "u", "row 4"]
    samples, problems = load(root, [talk(), favor()], format="favor")
    assert len(samples) == 2 and 'row 1' in problems[0].reason and '"questions" is not a list' in problems[0].reason


def test_hidden_answers_are_asked_and_never_trained_on(root):
    hidden = talk(id="two", answer="NA", options=["ball", "cube"])
    assert len(load(root, [talk(), hidden])[0]) == 2
    samples, problems = load(root, [talk(), hidden, talk(id="three", answer="NA")], training=True)
    assert [s.id for s in samples] == ["one", "three"], "an open answer may well be NA"
    assert [p.id for p in problems] == ["two"] and "is hidden" in problems[0].reason


def test_spans_of_a_video(root):
    part = {"type": "video", "video": "videos/a.mp4", "video_start": 1, "video_end": 2.5}
    said = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Q?"}]},
                         {"role": "assistant", "content": "left"}]}  # fmt: skip
    samples, problems = load(root, [talk(video_start=1, video_end=2.5), talk(id="two", video_end=3), said])
    file = (root / "videos/a.mp4").resolve()
    assert not problems
    spans = [(1.0, 2.5), (0.0, 3.0), (1.0, 2.5)]
    assert [s.video for s in samples] == [Footage((file,), *span) for span in spans]
    assert samples[0].meta == {}


def test_a_span_that_is_the_whole_file_is_the_file(root):
    assert load(root, [talk(video_start=0, video_end=None)])[0][0].video == (root / "videos/a.mp4").resolve()


@pytest.mark.parametrize("rate, fps", [({}, 2.0), ({"fps": 4}, 4.0), ({"sample_fps": 1.5}, 1.5)])
@pytest.mark.parametrize("key", ["video", "videos"])
def test_lists_of_pictures(root, key, rate, fps):
    for n in range(3):
        (root / f"{n}.JPG").touch()
    row = {k: v for k, v in talk(**rate).items() if k != "video"}
    names = [f"{n}.JPG" for n in (2, 0, 1)]
    samples, problems = load(root, [{**row, key: names if key == "video" else [names]}])
    video = samples[0].video
    assert not problems and video == Footage(tuple((root / name).resolve() for name in names), fps=fps)
    warned = assumed_rates([video, video, root / "a.mp4"])
    assert video.assumed == (not rate) and bool(warned) == video.assumed
    assert all("1 list of pictures has no \"fps\": 2 pictures a second are assumed" in line for line in warned)


def test_option_lines_must_follow_the_alphabet():
    assert split_options("Q?\nB. not an option\nA. yes\nB) no") == ("Q?\nB. not an option", ["yes", "no"])


@pytest.mark.parametrize("answer, text", [
    ("b", None), ("B", "cube"), ("(B)", "cube"), ("B. cube", "cube"), ("B. ball", None), ("D", None), ("cube", "cube"),
    ("NA", "NA"),
])  # fmt: skip
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
    "preference pair": {"question": "Q?", "video": "a.mp4", "chosen": "x", "rejected": "y"},
    '"questions" is not a list': favor(questions={}),
    'no "options"': favor(questions=[{"question": "Why?", "correct_answer": "A"}]),
    "no caption": {"video_path": "a.mp4", "motion_caption": 3},
    'key "video_name"': favor(name=None),
    "must lie after": talk(video_start=2, video_end=2),
    "video_end is nan": talk(video_end=float("nan")),
    "video_start is '1'": talk(video_start="1"),
    "video_start is True": talk(video_start=True),
    "fps is 0": talk(video=["a.png"], fps=0),
    "'../b.png' leaves": talk(video=["../b.png"]),
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
    unanswered = json.dumps([talk(answer="")])
    for content, message in [("[]", "no rows"), ("[{", "not valid JSON"), (unanswered, "answer is empty")]:
        (root / "data.json").write_text(content)
        with pytest.raises(SampleError, match=message):
            load_samples(root / "data.json")
    with pytest.raises(SampleError, match="cannot be read"):
        load_samples(root / "none.json")
    with pytest.raises(SampleError, match="format 'xml' is unknown"):
        load(root, [talk()], format="xml")
