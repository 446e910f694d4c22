"""The report: self-contained, complete, honest in its claims, safe against hostile text, never too wide."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from fake_run import HOSTILE, QUESTION, TYPES, write_example, write_fake_run  # noqa: E402

from enhancer.report import charts, pictures, write_report  # noqa: E402
from enhancer.report.claims import Interval, Row, comparison, headline  # noqa: E402
from enhancer.report.examples import coloured_text  # noqa: E402
from enhancer.report.run_folder import read_run_folder  # noqa: E402
from vdm_priors.errors import UserError  # noqa: E402
from vdm_priors.grid import TokenGrid  # noqa: E402

SECTIONS = ["result", "training", "examples", "heads", "skipped", "run"]
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; checks that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text += data


def report_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("whole"))


# ---- the page ------------------------------------------------------------------------------------


def test_page_is_self_contained(whole):
    text = write_report(whole).read_text(encoding="utf-8")
    page = Page(text)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attrs.get(name, "#").startswith(("data:image/", "#")), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"https?://|@import|url\(|@font-face", text)
    assert "default-src 'none'" in text
    assert len(text) < 1_500_000
    assert len(page.ids) == len(set(page.ids))


def test_page_holds_every_section_and_value(whole):
    page = report_of(whole)
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    for name in (
        "base model",
        "λ = 0",
        "VDM prior",
        "shuffled prior",
        "uniform prior",
        "oracle prior",
        *TYPES,
    ):
        assert name in page.text
    for text in ("Answer loss", "Alignment loss", "not measured: λ = 0", "DFC", "2 of 2", "ground truth",
                 "prior: vdm", "before: base model", "after: VDM prior", "inverted to noise", "PSNR 27.4 dB",
                 "audio only", "enhancer run recipes/world/evidence.yaml", "small/cogvideox", "2.9.1",
                 "no attention recorded for this word", "0, 1, 2"):  # fmt: skip
        assert text in page.text, text
    assert "Missing here" not in page.text
    charts_drawn = [attrs for tag, attrs in page.tags if attrs.get("class") == "chart"]
    assert len(charts_drawn) == 5 and all(attrs["aria-label"] for attrs in charts_drawn)
    selected = [attrs for _, attrs in page.tags if "word selected" in attrs.get("class", "")]
    assert len(selected) == 2 * 5
    for tag, attrs in page.tags:
        if "scroll" in attrs.get("class", "").split():
            assert attrs["tabindex"] == "0" and attrs["aria-label"]
        if tag == "img":
            assert attrs["alt"]


def test_hostile_text_is_shown_as_text(tmp_path):
    folder = write_fake_run(tmp_path / "run", hostile=True, seeds=1)
    table = json.loads((folder / "table.json").read_text())
    table["rows"][2]["arm"] = HOSTILE
    table["notes"] = [HOSTILE]
    table["columns"].insert(3, HOSTILE)
    (folder / "table.json").write_text(json.dumps(table))
    page = report_of(folder)
    assert "script" not in [tag for tag, _ in page.tags]
    assert not any("evil" in (attrs.get("src") or "") for _, attrs in page.tags)
    assert page.text.count(HOSTILE) >= 8


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("table.json", "table.json is missing"),
        ("recipe.yaml", "recipe.yaml is missing"),
        ("run.json", "run.json is missing"),
        ("priors.json", "priors.json is missing"),
        ("base/scores.json", "base/scores.json is missing"),
        ("arms/vdm/seed0/history.jsonl", "arms/vdm/seed0/history.jsonl is missing"),
        ("arms", "No trained student"),
        ("examples", "No examples"),
    ],
)
def test_missing_piece_is_named_and_the_rest_shown(whole, tmp_path, gone, named):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    place = folder / gone
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    page = report_of(folder)
    assert named in page.text
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert ("clip-0001" in page.text) is (gone != "examples")
    assert "base model" in page.text


def test_damaged_files_are_named(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "run.json").write_text('{"name": "x"')
    with (folder / "arms/vdm/seed0/history.jsonl").open("a") as file:
        file.write('{"step": 410, "ar_')
    example = folder / "examples/1.safetensors"
    example.write_bytes(example.read_bytes()[:5000])
    page = report_of(folder)
    assert "run.json is damaged (line 1" in page.text
    assert "history.jsonl: 1 damaged line(s) left out" in page.text
    assert "examples/1.safetensors cannot be read" in page.text
    assert "clip-0000" in page.text and "clip-0001" not in page.text


def test_example_without_parts_names_them(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / "run/examples/0.safetensors"
    write_example(path)
    with safe_open(str(path), framework="numpy") as file:
        meta, frames = file.metadata(), file.get_tensor("frames")
    changed = json.loads(meta["meta"])
    changed["prior_provenance"] = {"source": "oracle"}
    save_file({"frames": frames}, str(path), metadata={"meta": json.dumps(changed)})
    text = report_of(tmp_path / "run").text
    for part in ("no prior maps", "no attention maps", "no ground truth", "no inverted latents",
                 "no reconstruction", "no motion scores", "No head scores"):  # fmt: skip
        assert part in text, part


def test_empty_folder_still_gives_a_page(tmp_path):
    page = report_of(tmp_path)
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert "No comparison yet" in page.text


def test_unusable_places_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_status_other_than_finished_is_said(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "interrupted"}')
    assert "its status was “interrupted”" in report_of(tmp_path).text


# ---- claims --------------------------------------------------------------------------------------


def row(arm: str, delta: tuple | None, seeds: int = 3, paired: tuple | None = None) -> Row:
    return Row(arm, [str(k) for k in range(seeds)], 100, None, None, {},
               delta and Interval(*delta), paired and Interval(*paired))  # fmt: skip


@pytest.mark.parametrize(
    ("delta", "sentence"),
    [
        ((0.05, 0.01, 0.09), "raised accuracy by 5.0 points over λ = 0"),
        ((-0.05, -0.09, -0.01), "lowered accuracy by 5.0 points against λ = 0"),
        ((0.05, -0.01, 0.11), "No difference between the VDM prior and λ = 0 can be claimed"),
        ((0.05, 0.0, 0.11), "No difference between the VDM prior and λ = 0 can be claimed"),
    ],
)
def test_headline_claims_what_the_interval_allows(delta, sentence):
    claim = headline([row("base", None), row("oracle", (0.2, 0.1, 0.3)), row("vdm", delta)])
    assert sentence in claim.sentence


def test_headline_weighs_the_shuffled_control():
    vdm = row("vdm", (0.10, 0.06, 0.14))
    near, far = row("shuffled", (0.05, 0.01, 0.09)), row("shuffled", (0.0, -0.04, 0.04))
    assert "does not show that the right clip's prior matters" in " ".join(headline([vdm, near]).support)
    assert "wholly above" in " ".join(headline([vdm, far]).support)
    paired = row("vdm", (0.10, 0.06, 0.14), paired=(0.05, 0.01, 0.09))
    assert "so the right clip's prior matters" in " ".join(headline([paired, near]).support)


def test_one_seed_is_said_and_no_comparison_is_no_claim():
    assert "One seed only" in " ".join(headline([row("vdm", (0.1, 0.05, 0.15), seeds=1)]).support)
    assert headline([row("base", None)]).sentence.startswith("No comparison yet")


def test_types_may_be_a_mapping_a_list_or_keys_of_the_row(whole, tmp_path):
    table = json.loads((whole / "table.json").read_text())
    expected = [list(r["types"].values()) for r in table["rows"]]
    forms = [
        lambda r: r | {"types": list(r["types"].values())},
        lambda r: {k: v for k, v in r.items() if k != "types"} | r["types"],
        lambda r: r | {"types": {k: {"accuracy": v, "n": 9} for k, v in r["types"].items()}},
    ]
    for form in forms:
        (tmp_path / "table.json").write_text(json.dumps(table | {"rows": [form(r) for r in table["rows"]]}))
        types, rows = comparison(read_run_folder(tmp_path))
        assert types == TYPES
        assert [list(r.types.values()) for r in rows] == expected


# ---- pictures ------------------------------------------------------------------------------------


def padded_grid() -> TokenGrid:
    """Unequal spans, rows that reach beyond the frame, one invalid cell."""
    valid = torch.ones(3, 2, 4, dtype=torch.bool)
    valid[0, 0, 0] = False
    return TokenGrid.regular(
        [(0.0, 0.5), (0.5, 2.5), (2.5, 3.0)], 2, 4, box=(-0.5, 0.0, 1.0, 1.0), valid=valid
    )


def test_density_of_mass_like_volume_is_one():
    grid = padded_grid()
    mass = np.ones((3, 2, 4)) * np.array([0.5, 2.0, 0.5])[:, None, None]
    values = pictures.density(mass, grid)
    assert np.isnan(values[0, 0, 0])
    np.testing.assert_allclose(values[np.isfinite(values)], 1.0)
    assert pictures.density(np.zeros((3, 2, 4)), grid) is None
    assert pictures.density(np.full((3, 2, 4), np.nan), grid) is None


def test_map_on_frames_equals_a_plain_loop_over_cells():
    grid, rng = padded_grid(), np.random.default_rng(0)
    values, times, (h, w) = rng.random(grid.shape), [0.0, 0.5, 2.4, 2.7, 3.0], (6, 8)
    drawn = pictures.on_frames(values, grid, times, (h, w))
    expected = np.full((len(times), h, w), np.nan)
    for index in range(grid.num_tokens):
        (start, end), (top, left, bottom, right) = grid.cell(index)
        for n, time in enumerate(times):
            for y in range(h):
                for x in range(w):
                    inside = top <= (y + 0.5) / h < bottom and left <= (x + 0.5) / w < right
                    if start <= time < end and inside:
                        expected[n, y, x] = values.reshape(-1)[index]
    np.testing.assert_array_equal(drawn, expected)
    assert np.isnan(drawn[4]).all() and not np.isnan(drawn[:4]).any()


def test_heat_is_clear_where_no_cell_lies_and_rises_with_the_value():
    values = np.array([[[np.nan, 0.0, 1.0, 4.0, 9.0]]])
    picture = Image.open(io.BytesIO(base64.b64decode(pictures.heat_uri(values, 4.0).split(",")[1]))).convert(
        "RGBA"
    )
    red, green, blue, alpha = np.asarray(picture)[0].astype(int).T
    assert alpha[0] == 0 and (np.diff(alpha) >= 0).all() and alpha[3] == alpha[4]
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert light[1] < light[2] < light[3] == light[4]


def test_tiles_keep_the_aspect_of_the_clip():
    assert pictures.tile_size(64, 64) == (112, 112)
    for height, width in ((1080, 1920), (1920, 1080), (5, 400)):
        h, w = pictures.tile_size(height, width)
        assert 1 <= h <= pictures.TILE_HEIGHT and 1 <= w <= pictures.TILE_WIDTH
    assert pictures.tile_size(1080, 1920) == (84, 150)


def test_real_size_portrait_example_draws(tmp_path):
    write_example(tmp_path / "examples/0.safetensors", size=(96, 54))
    page = report_of(tmp_path)
    strips = [
        attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("aria-label") == "Sampled frames"
    ]
    assert strips[0]["width"] == str(8 * 63)


@pytest.mark.parametrize("extra", [{}, {"text": f"Q: {QUESTION}"}])
def test_coloured_text_is_the_text(extra):
    text = extra.get("text", QUESTION)
    at = text.index("disc")
    scores = [{"text": "disc", "start": at, "end": at + 4, "score": 0.5, "selected": True}]
    pieces = coloured_text({"question": QUESTION, "answer": "", **extra}, scores)
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, score in pieces if score] == ["disc"]


def test_words_of_an_unknown_text_stand_alone():
    pieces = coloured_text({"question": "other"}, [{"text": "disc", "start": 0, "end": 4, "score": 1.0}])
    assert [piece for piece, score in pieces if score] == ["disc"]


# ---- charts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (0.001, 0.0013), (5, 5), (1e6, 9e6)])
def test_ticks_are_few_rising_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 7 and found == sorted(found)
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_curves_survive_one_point_and_constant_values():
    for points in ([(1.0, 2.0)], [(float(i), 0.0) for i in range(2000)]):
        chart = str(charts.curve_chart([charts.Curve(points, 0)], title="t", x_name="step", y_name=""))
        assert "nan" not in chart and chart.count(",") <= 2 * charts.MOST_POINTS


# ---- a browser -----------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_page_is_never_wider_than_the_window(tmp_path):
    folder = write_fake_run(tmp_path / "run", hostile=True, seeds=6, examples=1, size=(54, 96))
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"command": "x" * 400, "name": "y" * 200}))
    page = html.escape(write_report(folder).read_text(encoding="utf-8"), quote=True)
    frames = "".join(f'<iframe width="{w}" height="800" srcdoc="{page}"></iframe>' for w in (390, 1440))
    measure = """<script>onload = () => { document.title = [...document.querySelectorAll("iframe")].map(f => {
        const root = f.contentDocument; root.querySelectorAll("details").forEach(d => d.open = true);
        return root.documentElement.scrollWidth + "/" + f.contentWindow.innerWidth + "/" + root.images.length;
    }).join(" "); };</script>"""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><title></title>{frames}{measure}", encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,900",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", wrapper.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>([^<]*)</title>", done.stdout).group(1)
    sizes = [[int(part) for part in size.split("/")] for size in title.split()]
    assert [window for _, window, _ in sizes] == [390, 1440]
    assert all(width <= window and images for width, window, images in sizes), title


def test_the_report_says_how_far_an_export_is_from_its_student(tmp_path):
    write_fake_run(tmp_path, seeds=1)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Export − trained" in page and "3e−07" in page


def test_words_of_every_score_are_readable():
    """A contrast of 4.5 (WCAG 2.2, AA) between a word and its shade, by the definition of relative luminance."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for level in range(101):
        dark, light = sorted(luminance(colour) for colour in pictures.score_shade(level / 100))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, level
