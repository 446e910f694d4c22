"""Benchmarks: their rows, published scores and files to hand in; free answers, continued, by several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from enhancer.benchmarks import BENCHMARKS, find_benchmark, published
from enhancer.benchmarks.submissions import write_submission
from enhancer.cli import app
from enhancer.commands.evaluate import as_choice
from enhancer.data.samples import Sample, load_samples
from enhancer.evaluation.answering import answer_all, read_parts
from enhancer.evaluation.answering import ask as ask_by_recipe
from enhancer.evaluation.generation import checkpoint_decoding, generate
from enhancer.evaluation.multiple_choice import evaluate
from enhancer.evaluation.parsing import RULES
from enhancer.evaluation.protocol import Protocol
from enhancer.evaluation.scores import summarise
from enhancer.processes import Process
from enhancer.recipe_schema import EvaluateSettings
from enhancer.runfolder import read_json, read_lines, write_json, write_lines
from enhancer.video.clip import FrameCache, Sampling
from tests.vlm_hooks.tiny_student import tiny_student
from vdm_priors.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import student_folder, write_video  # noqa: E402

SAMPLING = Sampling(frames=4)
LISTED = "Which way?\nA. left\nB. right\nC. up"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmark")
    (root / "videos").mkdir()
    write_video(root / "videos" / "v1.mp4")
    write_video(root / "videos" / "v2.mp4", seed=3)
    return root


def load(root, rows):
    path = root / "rows.json"
    path.write_text(json.dumps(rows))
    return load_samples(path, root)


# ---- rows ----------------------------------------------------------------------------------------

FLAT = {
    "video_id": "001",
    "duration": "short",
    "videoID": "v1",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "Which way?",
    "options": ["A. left", "B. right.", "C. up", "D. down"],
    "answer": "B",
}
NESTED = {
    "video_id": "v2",
    "duration": "long",
    "questions": [
        {
            "question_id": "v2-1",
            "task_type": "OCR",
            "question": "Which way?",
            "options": ["A. left", "B. right"],
            "answer": "A",
        },
        {"question_id": "v2-2", "task_type": "OCR", "question": "Where?", "options": ["here", "there"], "answer": "B"},
    ],
}


def test_videomme_rows_flat_and_in_the_official_template(root):
    samples, problems = load(root, [FLAT, NESTED])
    assert problems == [] and [s.id for s in samples] == ["001-1", "v2-1", "v2-2"]
    assert samples[0].options == ("left", "right.", "up", "down") and samples[0].answer == "right."
    assert [s.answer for s in samples[1:]] == ["left", "there"] and samples[0].video.name == "v1.mp4"
    assert samples[2].question_type == "OCR" and samples[0].meta["duration"] == "short"
    _, problems = load(
        root,
        [
            FLAT,
            {**FLAT, "question_id": "x", "videoID": "gone", "video_id": "gone too"},
            {**FLAT, "question_id": 3, "options": []},
        ],
    )
    assert (
        [p.id for p in problems] == ["x", "3"]
        and "gone too.mp4" in problems[0].reason
        and 'no "options"' in problems[1].reason
    )


def test_a_letter_answers_before_an_option_whose_text_is_that_letter(root):
    signs = {"uid": "u", "question": "Which letter is signed?\nA. C\nB. A\nC. B", "answer": "A"}
    row = {"key": "k", "question_type": "MR", "video_path": "v1.mp4", "qa": [signs]}
    samples, problems = load(root, [row])
    assert not problems and samples[0].options == ("C", "A", "B") and samples[0].answer == "C"
    samples, problems = load(root, [{**FLAT, "options": ["A. C", "B. A", "C. B"], "answer": "A"}])
    assert not problems and samples[0].answer == "C"


def test_plain_rows_of_emas_benchmark(root):
    row = {
        "id": "e1",
        "video": "v1.mp4",
        "question": "What happens?",
        "options": ["pouring into", "pouring out"],
        "answer": "pouring out",
        "type": "Linear",
    }
    samples, problems = load(root, [row])
    assert not problems and samples[0].question_type == "Linear" and samples[0].answer == "pouring out"
    assert find_benchmark("auto", {"plain"}, {"Linear", "Contact"}).name == "ema_motionbench"


def test_questions_that_list_their_options_in_the_text_become_choices(root):
    sample = Sample("m", root / "videos" / "v1.mp4", LISTED, "B. right")
    choice = as_choice(sample)
    assert (choice.question, choice.options, choice.answer) == ("Which way?", ("left", "right", "up"), "right")
    open_question = Sample("o", sample.video, LISTED, "it turns twice")
    assert as_choice(open_question) is open_question


@pytest.mark.parametrize(
    "forms, types, name",
    [
        ({"motionbench"}, {"Motion Recognition", "Action Order"}, "motionbench"),
        ({"motionbench"}, {"MR", "RC"}, "motionbench"),
        ({"favor"}, {"Action Sequence", "NSM"}, "favor"),
        ({"videomme"}, {"OCR"}, "videomme"),
        ({"conversations"}, {"MR"}, None),
        ({"plain", "favor"}, {"Linear"}, None),
        ({"motionbench"}, {"something else"}, None),
        ({"motionbench"}, set(), None),
    ],
)
def test_benchmarks_are_told_by_their_rows_and_types(forms, types, name):
    found = find_benchmark("auto", forms, types)
    assert (found.name if found else None) == name


def test_benchmarks_by_name():
    assert find_benchmark("favor", set(), set()).size == 8184 and BENCHMARKS["motionbench"].size == 4018
    assert (
        BENCHMARKS["motionbench"].short("motion recognition") == "MR" and BENCHMARKS["favor"].short("other") == "other"
    )
    with pytest.raises(UserError, match="did you mean 'motionbench'"):
        find_benchmark("motionbensh", set(), set())


@pytest.mark.parametrize("name", ["motionbench", "favor"])
def test_published_rows_agree_with_themselves(name):
    """Average and Overall of a published row follow from its types and the benchmark's counts, to the last digit."""
    benchmark, table = BENCHMARKS[name], published(name)
    assert len(table["rows"]) == 10 and table["source"] and table["protocol"]
    for row in table["rows"]:
        assert set(row["types"]) == set(benchmark.types), row["model"]
        expected = sum(benchmark.counts[kind] * value for kind, value in row["types"].items()) / benchmark.size
        assert row["average"] == pytest.approx(sum(row["types"].values()) / len(row["types"]), abs=0.011), row["model"]
        assert row["overall"] == pytest.approx(expected, abs=0.011), row["model"]


def test_emas_published_rows_agree_with_their_types():
    """Its paper's Avg. is the types' mean, but in one row that of all questions."""
    counts = BENCHMARKS["ema_motionbench"].counts
    for row in published("ema_motionbench")["rows"]:
        plain = sum(row["types"].values()) / 4
        weighted = sum(counts[kind] * value for kind, value in row["types"].items()) / 2300
        assert min(abs(row["average"] - plain), abs(row["average"] - weighted)) < 0.06, row["model"]


# ---- files to hand in ----------------------------------------------------------------------------


def answered(sample, chosen):
    return {
        "id": sample.id,
        "options": list(sample.options),
        "chosen": chosen,
        "question_type": "",
        "correct": None,
        "answer": "",
    }


def test_submissions_have_the_benchmarks_own_form(root, tmp_path):
    rows = [
        {
            "key": "k",
            "question_type": "MR",
            "video_path": "v1.mp4",
            "qa": [{"uid": "u1", "question": LISTED, "answer": "B"}, {"uid": "u2", "question": LISTED, "answer": "NA"}],
        }
    ]
    samples, _ = load(root, rows)
    out = tmp_path / "s.json"
    assert (
        write_submission(out, BENCHMARKS["motionbench"], root / "rows.json", [answered(s, "up") for s in samples]) == 0
    )
    assert json.loads(out.read_text()) == {"u1": "C", "u2": "C"}  # the hidden split's too

    samples, _ = load(root, [FLAT, {**FLAT, "question_id": "001-2"}, NESTED])
    left = write_submission(
        out, BENCHMARKS["videomme"], root / "rows.json", [answered(samples[0], "up"), answered(samples[3], None)]
    )
    first, second = json.loads(out.read_text())
    assert left == 1 and [q["response"] for q in first["questions"]] == ["C", ""] and first["duration"] == "short"
    assert [q["response"] for q in second["questions"]] == ["", ""] and first["questions"][0]["answer"] == "B"

    favor = [
        {
            "video_name": "v1",
            "questions": [{"question": "Which?", "options": ["a", "b"], "correct_answer": "a", "task_type": "AS"}],
        }
    ]
    samples, _ = load(root, favor)
    write_submission(out, BENCHMARKS["favor"], root / "rows.json", [answered(samples[0], "b")])
    assert json.loads(out.read_text())[0]["questions"][0]["prediction"] == "b"


# ---- answers -------------------------------------------------------------------------------------


def questions(root, count=5):
    videos = [root / "videos" / "v1.mp4", root / "videos" / "v2.mp4"]
    return [
        Sample(f"q{n}", videos[n % 2], "Which way" + "?" * (n % 3 + 1), "left", ("left", "right"), "MR")
        for n in range(count)
    ]


def test_a_batch_answers_freely_as_each_question_alone(root):
    student, cache = tiny_student(), FrameCache()
    samples = [*questions(root, 3), Sample("open", root / "videos" / "v1.mp4", "What moves?", "the square")]
    bad = Sample("gone", root / "videos" / "gone.mp4", "Where?", "left", ("left", "right"))
    together = generate(student, [*samples, bad], SAMPLING, cache, batch_size=5, new_tokens=3)
    alone = [generate(student, [sample], SAMPLING, cache, batch_size=1, new_tokens=3)[0] for sample in samples]
    assert together[:4] == alone
    assert together[3]["correct"] is None and together[3]["response"] is not None and "error" not in together[3]
    assert (
        together[4]["correct"] is None and "cannot be read" in together[4]["error"] and together[4]["response"] is None
    )
    assert all(row["correct"] is (row["chosen"] == "left") for row in together[:3])


@pytest.mark.parametrize("protocol", ["generate", "letter", "option_text"])
def test_a_recipes_protocol_is_what_is_asked_by(root, protocol):
    settings = EvaluateSettings(protocol=protocol, batch_size=2, new_tokens=2)
    student, samples, cache, seen = tiny_student(), questions(root, 3), FrameCache(), []
    rows = ask_by_recipe(student, samples, settings, SAMPLING, cache, lambda done, *_: seen.append(done))
    if protocol == "generate":
        assert rows == generate(student, samples, SAMPLING, cache, 2, new_tokens=2) and seen == [2, 3]
        assert summarise(rows)["unparsed"] == sum(row["chosen"] is None for row in rows)
    else:
        assert rows == evaluate(student, samples, SAMPLING, cache, 2, protocol) and seen == [3]


def test_what_a_checkpoint_adds_to_greedy_decoding_is_known_and_works(root, monkeypatch):
    student, samples = tiny_student(), questions(root, 1)
    assert checkpoint_decoding(student) == {}
    plain = generate(student, samples, SAMPLING, FrameCache(), 1, new_tokens=8)[0]["response"]
    for name, value in {"repetition_penalty": 50.0, "do_sample": True, "temperature": 5.0}.items():
        monkeypatch.setattr(student.model.generation_config, name, value)
    assert checkpoint_decoding(student) == {"repetition_penalty": 50.0}
    penalised = [generate(student, samples, SAMPLING, FrameCache(), 1, new_tokens=8)[0]["response"] for _ in range(2)]
    assert penalised[0] == penalised[1] != plain


@pytest.mark.parametrize("protocol", ["generate", "letter", "option_text"])
def test_another_tools_last_line_ends_the_prompts_that_list_options(root, tmp_path, protocol, monkeypatch):
    seen, student, request = [], tiny_student(), "Reply with A, B or C alone."
    plain = type(student).encode

    def encode(self, clips, prompts, *rest, **named):
        seen.extend(prompts)
        return plain(self, clips, prompts, *rest, **named)

    monkeypatch.setattr(type(student), "encode", encode)
    asked = questions(root, 2)
    made = list(answer_all(lambda: student, asked, protocol, SAMPLING, FrameCache(), 2, 2, None, request=request))
    assert len(made) == 2 and len(seen) == 2
    assert all((f"B. right\n{request}<" in prompt) is (protocol != "option_text") for prompt in seen)


class Answers:
    """A student whose answers are counted, in place of a model."""

    def __init__(self, monkeypatch):
        self.asked: list[str] = []
        monkeypatch.setattr("enhancer.evaluation.answering.generate", self.generate)

    def generate(self, student, samples, *rest, request):
        self.asked += [sample.id for sample in samples]
        return [
            {"id": s.id, "chosen": "left", **({"error": "unreadable"} if student == "broken" and s.id == "q3" else {})}
            for s in samples
        ]


def ask(folder, samples, process=Process(), student="model"):
    return list(answer_all(lambda: student, samples, "generate", SAMPLING, None, 2, 8, folder, process))


def test_answers_continue_where_a_kill_left_them_and_errors_are_asked_again(root, tmp_path, monkeypatch):
    answers, samples = Answers(monkeypatch), questions(root, 6)
    ask(tmp_path, samples[:4], student="broken")
    part = tmp_path / "parts" / "0.jsonl"
    part.write_bytes(part.read_bytes() + b'{"id": "q4", "chos')  # killed while it wrote
    assert sorted(read_parts(tmp_path)) == ["q0", "q1", "q2", "q3"]
    ask(tmp_path, samples)
    assert answers.asked == ["q0", "q1", "q2", "q3", "q3", "q4", "q5"]
    found = read_parts(tmp_path)
    assert sorted(found) == [f"q{n}" for n in range(6)] and not any("error" in row for row in found.values())
    assert ask(tmp_path, samples) == [] and len(answers.asked) == 7


def test_an_answer_may_hold_what_other_readers_take_for_a_line_end(root, tmp_path, monkeypatch):
    hostile = "left\u2028\x85\x0b\x1c\r\n{}\ud800"
    answers, samples = Answers(monkeypatch), questions(root, 2)
    plain = answers.generate

    def generate(*asked, **named):
        return [{**row, "response": hostile} for row in plain(*asked, **named)]

    monkeypatch.setattr("enhancer.evaluation.answering.generate", generate)
    ask(tmp_path, samples)
    found = read_parts(tmp_path)
    assert sorted(found) == ["q0", "q1"] and found["q0"]["response"] == hostile.replace("\ud800", "?")
    assert ask(tmp_path, samples) == [] and len(answers.asked) == 2
    write_lines(tmp_path / "answers.jsonl", [{**found["q0"], "id": "\u2028"}])
    assert read_lines(tmp_path / "answers.jsonl")[0]["response"] == hostile.replace("\ud800", "?")


def test_rows_whose_texts_hold_a_line_separator(root):
    row = {"key": "k", "question_type": "MR", "video_path": "v1.mp4",
           "qa": [{"uid": "u", "question": "Which\u2028way?\nA. left\nB. right", "answer": "B"}]}  # fmt: skip
    path = root / "rows.jsonl"
    other = {**row, "qa": [{**row["qa"][0], "uid": "w"}]}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(other) + "\n")
    samples, problems = load_samples(path, root)
    assert not problems and [s.id for s in samples] == ["u", "w"] and samples[0].options == ("left", "right")


def test_a_question_whose_answer_is_lost_makes_the_score_incomplete(root, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "enhancer.commands.evaluate.answer_all",
        lambda load, samples, *rest: iter([{**answered(samples[0], "left"), "correct": True, "question_type": "MR"}]),
    )
    row = {"video": "v1.mp4", "question": "Which way?", "options": ["left", "right"], "answer": "left"}
    data = root / "two.json"
    data.write_text(json.dumps([{**row, "id": "a"}, {**row, "id": "b"}]))
    command = ["evaluate", "--model", str(student_folder()), "--data", str(data)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 3 and "b could not be asked: its answer is not there" in result.output, result.output


def test_processes_share_the_questions_and_any_number_of_them_may_go_on(root, tmp_path, monkeypatch):
    answers, samples = Answers(monkeypatch), questions(root, 6)
    first = ask(tmp_path, samples, Process(0, 3, 0))
    assert [row["id"] for row in first] == ["q0", "q3"]
    ask(tmp_path, samples, Process(1, 2, 1))
    ask(tmp_path, samples)
    assert sorted(answers.asked) == [f"q{n}" for n in range(6)] == sorted(read_parts(tmp_path))


def test_launched_processes_finish_what_a_killed_call_left_as_one_process_does(root, tmp_path):
    row = {"video": "v1.mp4", "question": "Which way?", "options": ["left", "right"], "answer": "left"}
    data = root / "seven.json"
    data.write_text(json.dumps([{**row, "id": f"q{n}", "video": f"v{n % 2 + 1}.mp4"} for n in range(7)]))
    asked = ["evaluate", "--model", str(student_folder()), "--data", str(data), "--frames", "4"]
    asked += ["--batch-size", "1"]  # sums differ in their last digit with the number of rows
    alone = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "alone")], env={"COLUMNS": "200"})
    assert alone.exit_code == 0, alone.output
    shutil.copytree(tmp_path / "alone", tmp_path / "two")
    (tmp_path / "two" / "answers.jsonl").unlink()
    part = tmp_path / "two" / "parts" / "0.jsonl"
    part.write_bytes(b"".join(part.read_bytes().splitlines(keepends=True)[:2]) + b'{"id": "q2", "ans')
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "enhancer", *asked, "--out", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in part.parent.iterdir()) == ["0.jsonl", "1.jsonl"]
    for name in ("answers.jsonl", "scores.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "alone" / name).read_text(), name


def test_answers_of_another_protocol_are_never_mixed(tmp_path):
    def protocol(**changes):
        return Protocol(
            **{
                "benchmark": None,
                "model": {"name": "m"},
                "data": {"file": "d"},
                "protocol": "letter",
                "request": "Which letter?",
                "frames": 8,
                "fps": None,
                "new_tokens": None,
                "dtype": "float32",
                "batch_size": 4,
                **changes,
            }
        )

    protocol().keep(tmp_path)
    protocol(batch_size=8, example={"prompt": "p"}).keep(tmp_path)
    assert read_json(tmp_path / "protocol.json", {})["example"] == {"prompt": "p"}
    with pytest.raises(UserError, match="(?s)made otherwise.*frames: 8 -> 16.*--fresh"):
        protocol(frames=16).keep(tmp_path)
    with pytest.raises(UserError, match="(?s)made otherwise.*request: .*Just the letter"):
        protocol(request="Just the letter.").keep(tmp_path)
    assert asdict(protocol())["decoding"].startswith("likelihood of every option's letter")


def test_answers_read_by_older_rules_are_never_mixed_with_newer_ones(tmp_path):
    protocol = Protocol(None, {"name": "m"}, {"file": "d"}, "generate", "Which letter?", 8, None, 16, "float32", 4)
    protocol.keep(tmp_path)
    kept = read_json(tmp_path / "protocol.json", {})
    older = kept["decoding"].replace(f"version {RULES}", "version 1")
    write_json(tmp_path / "protocol.json", {**kept, "decoding": older})
    with pytest.raises(UserError, match="made otherwise"):
        protocol.keep(tmp_path)


def test_evaluate_a_benchmark_with_a_missing_video(root, tmp_path):
    rows = [
        {
            "key": f"k{n}",
            "question_type": "Motion Recognition",
            "video_path": video,
            "qa": [{"uid": f"u{n}", "question": LISTED, "answer": a}],
        }
        for n, (video, a) in enumerate([("v1.mp4", "A"), ("gone.mp4", "B"), ("v2.mp4", "NA")])
    ]
    data = root / "video_info.meta.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    command = [
        "evaluate",
        "--model",
        str(student_folder()),
        "--data",
        str(data),
        "--protocol",
        "generate",
        "--new-tokens",
        "2",
        "--frames",
        "4",
        "--out",
        str(tmp_path / "out"),
        "--submission",
        str(tmp_path / "s.json"),
    ]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    assert result.exit_code == 3, result.output
    said = " ".join(result.output.split())
    for expected in (
        "u1 could not be asked: line 2: the video 'gone.mp4' is not in",
        "The score is incomplete: 1 questions could not be asked",
        "1 of the benchmark's 4018 questions were scored",
        "1 answers are hidden",
        "Qwen2.5-VL-3B* 1 fps 53.56 49.45 59.54 53.11 38.44 70.14 40.46 35.00 + MotionEnhancer 1 fps 56.60",
        "yours (incomplete) 4 ",
        "Yours: generate, float32. Theirs: MotionEnhancer",
    ):
        assert expected in said, (expected, said)
    scores, protocol = (read_json(tmp_path / "out" / name, {}) for name in ("scores.json", "protocol.json"))
    assert scores["complete"] is False and scores["overall"]["n"] == 1 and set(scores["types"]) == {"MR"}
    assert (
        protocol["benchmark"] == "motionbench"
        and protocol["new_tokens"] == 2
        and protocol["decoding"].startswith("greedy")
    )
    assert "Which way?" in protocol["example"]["prompt"] and "B. right" in protocol["example"]["prompt"]
    assert (
        protocol["example"]["checkpoint_decoding"] == {}
        and protocol["example"]["frames"] == 4
        and protocol["example"]["pixels"] == [32, 32]
        and len(protocol["example"]["visual_tokens"]) == 3
    )
    assert {row["id"] for row in read_lines(tmp_path / "out" / "answers.jsonl")} == {"u0", "u1", "u2"}
    assert set(json.loads((tmp_path / "s.json").read_text())) <= {"u0", "u2"}


# ---- other tools ---------------------------------------------------------------------------------


def test_an_export_loads_and_answers_as_lmms_eval_and_vlmevalkit_load_it(tmp_path):
    """lmms-eval's qwen2_5_vl and VLMEvalKit's Qwen2VLChat: stock classes, a folder's name that tells the model, a chat
    with the system's text as a plain string, frames as a tensor, greedy generation with the tokenizer's own tokens."""
    import torch
    from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    from vlm_hooks.export import export

    folder = tmp_path / "Qwen2.5-VL-mine"
    export(tiny_student(), folder)
    named = json.loads((folder / "config.json").read_text())["architectures"]
    assert "qwen2_5" in str(named).lower()  # by which VLMEvalKit chooses the class
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, torch_dtype="auto", device_map="cpu").eval()
    processor = AutoProcessor.from_pretrained(folder, max_pixels=1605632, min_pixels=28 * 28)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": LISTED}]},
    ]
    texts = [processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)]
    frames = torch.randint(0, 256, (4, 3, 56, 56), generator=torch.Generator().manual_seed(0)).float()
    inputs = processor(text=texts, images=None, videos=[frames], padding=True, return_tensors="pt")
    out = model.generate(
        **inputs,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        temperature=None,
        top_p=None,
        num_beams=1,
        max_new_tokens=3,
        use_cache=True,
    )
    new = [o[len(i) :] for i, o in zip(inputs.input_ids, out)]
    answers = processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert len(answers) == 1 and out.shape[1] > inputs.input_ids.shape[1]
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) > 0
