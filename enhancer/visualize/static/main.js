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
  const named = DATA.clips.map((clip, n) => [n, clip.name + ": " + clip.text.slice(0, 60)]);
  const many = DATA.clips.length > 1 ? picker("Clip", "clip", [[null, named]]) : null;
  const gaps = ["clip", "run", "examples"].flatMap(name => one.missing[name] || []);
  const parts = [
    el("p", { className: "eyebrow" }, DATA.title),
    el("h1", {}, one.text || one.name),
    one.question && one.question !== one.text ? el("p", {}, "Question: ", one.question) : null,
    one.answer && one.answer !== "NA" ? el("p", {}, "Answer: ", one.answer) : null,
    many,
    ...gaps.map(sentence => el("p", { className: "gap" }, sentence)),
    el("details", { className: "facts" }, el("summary", {}, "About this clip"),
      listed([...one.facts, ...(one.video ? [["clip", one.video]] : [])])),
  ];
  document.getElementById("head").replaceChildren(...parts.filter(Boolean));
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

/** A list of names and what belongs to them. */
const listed = pairs => el("dl", {}, pairs.map(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));

function help() {
  const close = el("button", { type: "button", on: { click: () => dialog.close() } }, "Close");
  const dialog = el("dialog", { id: "help" }, el("h2", {}, "Keys"), listed(KEYS), close);
  return dialog;
}

/** The kept word of the highest score. */
function bestWord(words) {
  const rank = word => [word.selected ? 1 : 0, word.score || 0];
  const better = (a, b) => a[0] - b[0] || a[1] - b[1];
  return words.reduce((top, word, n) => better(rank(word), rank(words[top])) > 0 ? n : top, 0);
}

function build() {
  forgetWatchers();
  const { heads, words } = clip();
  const chosen = heads ? firstHeads(heads) : [null, null];
  const asked = words.findIndex(word => word.text === DATA.word);
  Object.assign(state, { frame: 0, word: asked < 0 ? bestWord(words) : asked, shows: "all", student: "all", place: -1, channel: "rgb" });
  state.heads = chosen;
  heading();
  const open = () => document.getElementById("help").showModal();
  const keys = el("button", { type: "button", className: "keysbutton", on: { click: open } }, "Keys");
  const links = SECTIONS.map(([id, title]) => el("a", { href: "#" + id }, title));
  document.getElementById("sections").replaceChildren(...links, keys);
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
  const own = at("select") || at("input") &&
  event.key.startsWith("Arrow"); // keys that the control itself answers
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
