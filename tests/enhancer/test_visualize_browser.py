"""The page in a headless Chromium: every control, keys, hostile texts, two widths, and how soon it shows a picture."""

from __future__ import annotations

import pytest

from enhancer.visualize.page import write_page
from tests.enhancer.browser import CHROMIUM, WHY_NOT, Browser
from tests.enhancer.fake_run import HOSTILE
from tests.enhancer.fake_views import fake_view, large_page

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)]
FIRST_PICTURE = 3.0  # seconds

OPERATE_ALL = """(async () => {
  const frame = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const all = selector => [...document.querySelectorAll(selector)];
  const done = {};
  const after = async name => { await frame(); done[name] = (done[name] || 0) + 1; };
  const give = (control, value, event) => {
    control.value = value;
    control.dispatchEvent(new Event(event, {bubbles: true}));
  };
  all("details").forEach(one => { one.open = true; });
  await frame();
  for (const box of all("input[type=checkbox]")) for (let n = 0; n < 2; n++) { box.click(); await after("boxes"); }
  for (const range of all("input[type=range]")) for (const value of [range.min, range.max]) {
    give(range, value, "input");
    await after("ranges");
  }
  for (const select of all("main select")) for (const option of [...select.options]) {
    give(select, option.value, "change");
    await after("options");
  }
  for (const canvas of all("canvas")) {
    const box = canvas.getBoundingClientRect();
    const at = {bubbles: true, clientX: box.left + box.width / 3, clientY: box.top + box.height / 2};
    for (const kind of ["pointermove", "pointerdown"]) canvas.dispatchEvent(new PointerEvent(kind, at));
    done.canvases = (done.canvases || 0) + 1;
  }
  for (const chart of all("svg.chart")) chart.dispatchEvent(new MouseEvent("click", {bubbles: true, clientX: 300}));
  for (const row of all("tbody tr")) row.click();
  for (const button of all("button")) if (button.isConnected) { button.click(); await after("buttons"); }
  for (const link of all("nav a")) { link.click(); await after("links"); }
  all("dialog").forEach(dialog => dialog.close());
  const clips = document.querySelector("header select");
  if (clips) { give(clips, "1", "change"); await after("clips"); }
  return done;
})()"""

FAINT = """(() => {
  const brush = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const bytes = colours => {  // painted one over another
    brush.clearRect(0, 0, 1, 1);
    for (const one of colours) { brush.fillStyle = one; brush.fillRect(0, 0, 1, 1); }
    return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3).map(byte => byte / 255);
  };
  const luminance = colours => bytes(colours).map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, n) => sum + part * [0.2126, 0.7152, 0.0722][n], 0);
  const faint = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), at = texts.currentNode.parentElement;
    if (!text || !at.getClientRects().length) continue;
    const behind = [];
    for (let one = at; one; one = one.parentElement) behind.unshift(getComputedStyle(one).backgroundColor);
    const ink = getComputedStyle(at)[at instanceof SVGElement ? "fill" : "color"];
    const [dark, light] = [luminance(behind), luminance([...behind, ink])].sort((a, b) => a - b);
    if ((light + 0.05) / (dark + 0.05) < 4.5) faint.push([text.slice(0, 30), ink, (light + 0.05) / (dark + 0.05)]);
  }
  return faint;
})()"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as made:
        yield made


@pytest.fixture(scope="module")
def two_clips(tmp_path_factory):
    """A whole clip of judged means and layers with hostile texts everywhere, and one of which nearly all is missing."""
    whole = fake_view(
        text=f"What does {HOSTILE} do at the wall?",
        name=HOSTILE,
        heads=20,
        layers=4,
        places=4,
        by_layer=False,
        frames=9,
    )
    whole.question, whole.answer = HOSTILE * 3, HOSTILE
    whole.facts.append((HOSTILE, "x" * 300))
    whole.lacks("maps", HOSTILE)
    bare = fake_view(name="y" * 200, by_layer=True)
    bare.frames = bare.heads = bare.inversion = bare.codec = None
    bare.times = []
    bare.maps = bare.maps[1:2]
    for section in ("clip", "heads", "codec"):
        bare.lacks(section, f"Nothing of the {section} is there: {'long ' * 40}")
    for word in bare.words:
        word.score = word.curve = None
    return write_page([whole, bare], tmp_path_factory.mktemp("page") / "page.html", HOSTILE, HOSTILE)


@pytest.mark.parametrize(("width", "phone"), [(390, True), (1440, False)])
def test_every_control_works_and_nothing_overflows(browser, two_clips, width, phone):
    browser.open(two_clips, width, phone=phone)
    assert browser.run("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    done = browser.run(OPERATE_ALL)
    assert (
        done["boxes"] == 8
        and done["clips"] == 1
        and done["options"] > 40
        and done["buttons"] > 100
        and done["canvases"] > 30
    ), done
    assert browser.problems == []
    assert browser.run("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    assert "Nothing of the codec is there" in browser.run("document.getElementById('codec').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stays_readable(browser, tmp_path, scheme):
    """A contrast of 4.5 (WCAG 2.2, AA) of every text on what is behind it, words and heads of all scores among them."""
    page = write_page([fake_view(layers=6, heads=12, by_layer=True)], tmp_path / "page.html", "title", "note")
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(page, 1440)
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    faint = [browser.run(FAINT)]
    for colours in ("cividis", "magma", "inferno"):
        browser.run(
            f"(() => {{ const select = [...document.querySelectorAll('#maps select')].find(one => one.value in"
            f" {{viridis: 1, cividis: 1, magma: 1, inferno: 1}}); select.value = '{colours}';"
            f" select.dispatchEvent(new Event('change', {{bubbles: true}})); }})()"
        )
        browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        faint.append(browser.run(FAINT))
    browser.call("Emulation.setEmulatedMedia", features=[])
    assert (background == "rgb(19, 22, 24)") == (scheme == "dark") and faint == [[]] * 4


def test_the_word_that_was_asked_for_is_chosen_first(browser, tmp_path):
    view = fake_view()
    browser.open(write_page([view], tmp_path / "page.html", "title", word="wall"), 1440)
    assert browser.run("document.querySelector('.word[aria-pressed=true]').textContent") == "wall"


def test_hostile_texts_are_shown_as_text(browser, two_clips):
    browser.open(two_clips, 1440)
    assert HOSTILE in browser.run("document.querySelector('h1').textContent")
    assert HOSTILE in browser.run("document.querySelector('#maps .gap').textContent")
    assert browser.run("document.querySelectorAll('img, iframe, object').length") == 0
    assert browser.run("document.scripts.length") == browser.run("document.querySelectorAll('body > script').length")
    assert browser.problems == []


def test_keys_and_clicks_change_what_is_drawn(browser, two_clips):
    browser.open(two_clips, 1440)
    picture = "document.querySelectorAll('#maps .panel canvas')[1].toDataURL()"
    first = browser.run(picture)
    browser.press("ArrowRight")
    assert browser.run("document.querySelector('#transport input').value") == "1"
    assert browser.run(picture) != first
    browser.press("ArrowLeft")
    assert browser.run(picture) == first
    chosen = "document.querySelector('.word[aria-pressed=true]').textContent"
    before = browser.run(chosen)
    browser.press("]")
    assert browser.run(chosen) != before
    browser.run("document.querySelector('.head').focus()")
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    assert browser.run("document.activeElement.getAttribute('aria-label')").startswith("layer 0, head 1:")
    left = "document.querySelector('.headpanel figcaption').textContent"
    assert not browser.run(left).startswith("layer 0, head 1")
    browser.run("document.activeElement.click()")
    browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert browser.run(left).startswith("layer 0, head 1")
    browser.press("?", text="?")
    assert browser.run("document.getElementById('help').open")
    browser.press("Escape")
    assert not browser.run("document.getElementById('help').open") and browser.problems == []


def test_a_map_is_drawn_where_and_as_bright_as_it_is(browser, tmp_path):
    """One dense cell of an otherwise empty map: that cell has the last colour of the scale, the others the first."""
    view = fake_view(grid=(2, 3, 4), frames=4)
    view.frames = None
    view.maps = view.maps[1:2]
    view.maps[0].maps[:] = 0
    view.maps[0].maps[:, :, 2, 1] = 64
    browser.open(write_page([view], tmp_path / "page.html", "map"), 1440)
    browser.run(
        "(() => { const strength = document.querySelector('#maps input[type=range]'); strength.value = 1;"
        "strength.dispatchEvent(new Event('input')); })()"
    )
    browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    pixel = """(x, y) => { const c = document.querySelector('#maps .panel canvas');
      const at = [Math.floor(x * c.width), Math.floor(y * c.height), 1, 1];
      return [...c.getContext('2d').getImageData(...at).data].slice(0, 3); }"""
    assert browser.run(f"({pixel})(1.5 / 4, 2.5 / 3)") == [253, 231, 37]  # viridis
    assert browser.run(f"({pixel})(0.5 / 4, 2.5 / 3)") == browser.run(f"({pixel})(1.5 / 4, 0.5 / 3)") == [68, 1, 84]


def test_a_large_page_shows_its_first_picture_within_three_seconds(browser, tmp_path):
    """48 heads, 42 layers, 49 frames. Seconds of the page's own thread, so that a busy machine does not count."""
    path = tmp_path / "large.html"
    path.write_text(large_page(), encoding="utf-8")
    browser.call("Performance.enable", timeDomain="threadTicks")
    browser.open(path, 1440)
    metrics = {one["name"]: one["value"] for one in browser.call("Performance.getMetrics")["metrics"]}
    browser.call("Performance.disable")
    assert metrics["TaskDuration"] <= FIRST_PICTURE and browser.problems == []
