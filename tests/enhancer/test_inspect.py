"""`enhancer inspect`: the page shows the grid's cells and the words' tokens as they are, and nothing else."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.inspection import inspect_clip, teacher_tokens, write_page
from enhancer.shipped import teacher_path
from enhancer.video.clip import Clip
from tests.vlm_hooks.tiny_families import family_student
from tests.vlm_hooks.tiny_student import make_clip
from vdm_priors.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import student_folder, write_video  # noqa: E402

VIDEO = Path("a<i>.mp4")
TEXT = "Does the <u>red</u> ball & the trampolinist stop?"


class Page(HTMLParser):
    """Elements with their attributes and text, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), ""))

    def handle_data(self, data):
        if self.found:
            tag, attrs, text = self.found[-1]
            self.found[-1] = (tag, attrs, text + data)

    def of(self, tag, kind=None):
        return [(attrs, text) for name, attrs, text in self.found if name == tag and kind in (None, attrs.get("class"))]


def clip_of(frames=3, height=32, width=48, box=(0.1, 0.2, 0.9, 0.8)):
    drawn = make_clip(frames, height, width)
    return Clip(VIDEO, drawn.frames, drawn.times, drawn.duration, box=box, notes=["one <script> note"])


@pytest.fixture(scope="module")
def tokens():
    return teacher_tokens(teacher_path("world"), TEXT)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "llava_onevision"])
def test_the_page_draws_every_token_in_its_cell(name, tokens, tmp_path):
    clip = clip_of()
    shown = inspect_clip(family_student(name), VIDEO, clip, TEXT, tokens)
    page = Page(write_page(shown, tmp_path / "page.html").read_text(encoding="utf-8"))
    frames, rows, columns = shown.grid.shape
    cells, numbers = page.of("rect", "cell"), page.of("text", "number")
    assert len(page.of("img")) == len(clip.times) and len(cells) == len(numbers) == len(clip.times) * rows * columns
    assert len(page.of("rect", "unseen")) == (2 * len(clip.times) if name == "llava_onevision" else 0)
    height = 1000 * 32 / 48
    for place, ((attrs, _), (_, number)) in enumerate(zip(cells, numbers, strict=True)):
        frame, cell = divmod(place, rows * columns)
        time = clip.times[frame]
        token = int(number)
        (start, end), (top, left, bottom, right) = shown.grid.cell(token)
        assert start <= time < end and token % (rows * columns) == cell
        x, y, wide, high = (float(attrs[key]) for key in ("x", "y", "width", "height"))
        assert x == pytest.approx(1000 * (left - 0.2) / 0.6, abs=0.02)
        assert y == pytest.approx(height * (top - 0.1) / 0.8, abs=0.02)
        assert wide == pytest.approx(1000 * (right - left) / 0.6, abs=0.02)
        assert high == pytest.approx(height * (bottom - top) / 0.8, abs=0.02)
    captions = [text.strip() for _, text in page.of("figcaption")]
    assert captions == [f"frame {n + 1}, shown at {time:.2f} s" for n, time in enumerate(clip.times)]


def test_words_stand_beside_the_tokens_of_both_sides(tokens, tmp_path):
    student = family_student("internvl", "bytes")
    shown = inspect_clip(student, VIDEO, clip_of(), TEXT, tokens)
    assert [row.word.text for row in shown.words] == "Does the u red u ball the trampolinist stop".split()
    ids = student.encode([clip_of()], [student.prompt(TEXT).text]).inputs["input_ids"][0]
    for row in shown.words:
        assert "".join(piece for _, piece in row.student).strip() == row.word.text and not row.missing
        assert "".join(row.teacher).replace("\u2581", "").strip("<>/") == row.word.text
        assert all(student.tokenizer.decode([ids[position]]) == piece for position, piece in row.student)
    assert len(shown.words[7].teacher) > 1

    cut = inspect_clip(student, VIDEO, clip_of(), TEXT, tokens[:5])
    assert [row.word.text for row in cut.words if row.missing] and not cut.words[0].missing
    text = write_page(cut, tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("no token of the teacher") == sum(row.missing == "teacher" for row in cut.words)


def test_attention_is_the_words_own(tokens):
    student, eager = family_student("qwen3_vl"), family_student("qwen3_vl", attn="eager")
    shown = inspect_clip(student, VIDEO, clip_of(), TEXT, tokens, attention=True)
    inputs = student.encode([clip_of()], [student.prompt(TEXT).text]).inputs
    with torch.no_grad():
        dense = torch.stack(eager.model(**inputs, output_attentions=True).attentions).mean(dim=(0, 2))[0]
    for word, got in zip(shown.attended, shown.attention, strict=True):
        (row,) = [row for row in shown.words if row.word == word]
        expected = dense[[position for position, _ in row.student]][:, shown.positions].mean(dim=0)
        torch.testing.assert_close(got.flatten(), expected, atol=1e-6, rtol=0)


def test_hostile_names_and_texts_stay_text(tokens, tmp_path):
    shown = inspect_clip(family_student("qwen3_vl"), VIDEO, clip_of(), TEXT, tokens, True)
    page = write_page(shown, tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<i>" not in page and "<u>" not in page
    assert "&lt;u&gt;red&lt;/u&gt;" in page and "one &lt;script&gt; note" in page
    assert "default-src 'none'" in page and not re.search(r"(?:src|href)=\"(?!data:)", page)
    with pytest.raises(UserError, match="give another --out"):
        write_page(shown, tmp_path)


def test_the_command_writes_the_page_and_lists_the_tokens(tmp_path):
    video = write_video(tmp_path / "clip.mp4")
    options = {"--model": student_folder(), "--video": video, "--frames": 4, "--text": "Which way does the ball go?",
               "--out": tmp_path / "page.html"}  # fmt: skip

    def call(*flags, **changed):
        given = options | {f"--{name}": value for name, value in changed.items()}
        arguments = [str(part) for pair in given.items() for part in pair]
        environment = {"COLUMNS": "200", "ENHANCER_TRACEBACK": "0"}
        return CliRunner().invoke(app, ["inspect", *arguments, *flags], env=environment)

    result = call("--attention")
    assert result.exit_code == 0, result.output
    assert "4 frames become 2 steps" in result.output and "'\u2581Which'" in result.output
    assert "Attention of each word" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert call(text=" ").exit_code == 1 and "--text is empty" in call(text=" ").output
    assert "there is no folder" in call(out="/nonexistent/x/p.html").output
    assert call().exit_code == 0 and "Attention of" not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_the_page_is_never_wider_than_the_window(tokens, tmp_path):
    long = TEXT + " " + "x" * 300
    shown = inspect_clip(family_student("qwen3_vl"), VIDEO, clip_of(height=128, width=320), long, tokens, True)
    page = html.escape(write_page(shown, tmp_path / "p.html").read_text(encoding="utf-8"), quote=True)
    frames = "".join(f'<iframe width="{w}" height="800" srcdoc="{page}"></iframe>' for w in (390, 1440))
    measure = """<script>onload = () => { document.title = [...document.querySelectorAll("iframe")].map(f =>
        f.contentDocument.documentElement.scrollWidth + "/" + f.contentWindow.innerWidth).join(" "); };</script>"""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><title></title>{frames}{measure}", encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,900",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", wrapper.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    sizes = [size.split("/") for size in re.search(r"<title>([^<]*)</title>", done.stdout).group(1).split()]
    assert [window for _, window in sizes] == ["390", "1440"]
    assert all(int(wide) <= int(window) for wide, window in sizes), sizes
