// The page as a whole: heading, sections, the time line at the bottom, and the keys.

const SECTIONS = [
  ["tokens", "Words", tokenSection],
  ["maps", "Maps", mapSection],
  ["heads", "Heads", headSection],
  ["inversion", "Inversion", inversionSection],
  ["codec", "Codec", codecSection]
];
const KEYS = [
  ["← →", "one frame back or on"],
  ["space", "play or stop"],
  ["[ ]", "word before or after"],
  ["1 – 5", "go to a section"],
  ["?", "this list"]
];

function heading() {
  const one = clip();
  const many = DATA.clips.length > 1 ? picker("Clip", "clip", [
    [null, DATA.clips.map((clip, n) => [n, clip.name + ": " + clip.text.slice(0, 60)])]
  ]) : null;
  const asked = one.question && one.question !== one.text ? el("p", {}, "Question: ", one.question) : null;
  const facts = [...one.facts, ...(one.video ? [
    ["clip", one.video]
  ] : [])];
  document.getElementById("head").replaceChildren(
    el("p", { className: "eyebrow" }, DATA.title), el("h1", {}, one.text || one.name), ...[asked, one.answer && one
      .answer !== "NA" ? el("p", {}, "Answer: ", one.answer) : null, many
    ].filter(Boolean),
    ...["clip", "run", "examples"].flatMap(name => (one.missing[name] || []).map(sentence => el(
    "p", { className: "gap" }, sentence))),
    el("details", { className: "facts" }, el("summary", {}, "About this clip"), el("dl", {}, ...facts.flatMap(([
      name, text
    ]) => [el("dt", {}, name), el("dd", {}, text)]))));
  document.title = one.text.slice(0, 60) + " · motion-enhancer";
}

function transport() {
  const times = clip().times;
  const play = el("button", { type: "button", className: "play", on: { click: () => set({ playing: !state
          .playing }) } });
  const range = el("input", { type: "range", min: 0, max: times.length - 1, step: 1, "aria-label": "Frame",
    on: { input: () => set({ frame: Number(range.value), playing: false }) } });
  const text = el("output", {}),
    word = el("span", { className: "now" });
  document.getElementById("transport").replaceChildren(el("div", { className: "wrap" }, play, range, text, word));
  watch(["frame"], () => {
    range.value = state.frame;
    text.textContent = seconds(times[state.frame]);
    range.setAttribute("aria-valuetext", seconds(times[state.frame]));
  });
  watch(["word"], () => { word.textContent = clip().words.length ? clip().words[state.word].text : ""; });
  watch(["playing"], () => {
    play.textContent = state.playing ? "❚❚" : "▶";
    play.setAttribute("aria-label", state.playing ? "Stop" : "Play");
  });
}

function help() {
  const dialog = el("dialog", { id: "help" }, el("h2", {}, "Keys"), el("dl", {}, ...KEYS.flatMap(([key, text]) => [el(
      "dt", {}, key), el("dd", {}, text)])),
    el("button", { type: "button", on: { click: () => dialog.close() } }, "Close"));
  return dialog;
}

function build() {
  forgetWatchers();
  const heads = clip().heads,
    best = clip().words.reduce((top, word, n, all) => word.selected && (!all[top].selected || (word.score || 0) > (
      all[top].score || 0)) ? n : top, 0);
  Object.assign(state, { frame: 0, word: best, shows: "all", student: "all", place: -1, channel: "rgb", heads: heads ?
      firstHeads(heads) : [null, null] });
  heading();
  document.getElementById("sections").replaceChildren(...SECTIONS.map(([id, title]) => el("a", { href: "#" + id },
    title)), el("button", { type: "button", className: "keysbutton", on: { click: () => document.getElementById(
        "help").showModal() } }, "Keys"));
  document.getElementById("main").replaceChildren(...SECTIONS.map(([, , make]) => make()));
  document.getElementById("foot").replaceChildren(el("p", { className: "note" }, DATA.note), help());
  transport();
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || document.getElementById("help").open) return;
  const at = selector => event.target.closest && event.target.closest(selector);
  const frames = clip().times.length,
    words = clip().words.length,
    number = SECTIONS[Number(event.key) - 1];
  const own = at("select") || at("input") && event.key.startsWith(
  "Arrow"); // keys that the control itself answers
  const act = {
    ArrowLeft: () => set({ frame: (state.frame + frames - 1) % frames, playing: false }),
    ArrowRight: () => set({ frame: (state.frame + 1) % frames, playing: false }),
    "[": () => set({ word: (state.word + words - 1) % words }),
    "]": () => set({ word: (state.word + 1) % words }),
    "?": () => document.getElementById("help").showModal(),
    " ": () => set({ playing: !state.playing }),
  } [event.key];
  if (own || event.key === " " && at("button, input, summary, a") || "[]".includes(event.key) && !words) return;
  if (number) document.getElementById(number[0]).scrollIntoView();
  else if (act) act();
  else return;
  event.preventDefault();
});

let shownAt = 0;

function tickClock(now) {
  const times = clip().times;
  if (state.playing && times.length > 1) {
    const pace = 1000 * Math.max(0.04, (times[times.length - 1] - times[0]) / (times.length - 1));
    if (now - shownAt >= pace) {
      shownAt = now;
      set({ frame: (state.frame + 1) % times.length });
    }
  }
  requestAnimationFrame(tickClock);
}

build();
requestAnimationFrame(tickClock);
