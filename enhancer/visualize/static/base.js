// Reading the page's data, building elements, and the one state that all sections follow.

const DATA = JSON.parse(document.getElementById("data").textContent);
const decoded = new Map();

/** Bytes of a part of the page, decoded once. */
function bytes(number) {
  if (!decoded.has(number)) {
    const text = atob(document.getElementById("blob" + number).textContent);
    const out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
    decoded.set(number, out);
  }
  return decoded.get(number);
}

/** An element; children are nodes or text, which stays text. */
function el(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name === "on")
      for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return node;
}

const state = {
  clip: 0,
  frame: 0,
  playing: false,
  word: 0,
  shows: "all",
  student: "all",
  colours: Object.keys(DATA.colours)[0],
  top: 8,
  opacity: 0.6,
  metric: "score",
  slot: 0,
  heads: [null, null],
  place: -1,
  mask: true,
  channel: "rgb",
  gain: 4,
  vectors: true,
  validity: true,
  residual: false,
};
const watchers = [];
let waiting = null;

/** Calls `draw` now, and again whenever one of these parts of the state has changed. */
function watch(names, draw) {
  watchers.push({ names, draw });
  draw();
}

function forgetWatchers() { watchers.length = 0; }

/** Changes the state; what follows it is drawn again once, before the next frame of the screen. */
function set(changes) {
  const changed = Object.keys(changes).filter(name => state[name] !== changes[name]);
  Object.assign(state, changes);
  if (!changed.length) return;
  if (!waiting) {
    waiting = new Set();
    requestAnimationFrame(() => {
      const names = waiting;
      waiting = null;
      if (names.has("clip")) return build(); // what was drawn follows another clip's frames and words
      for (const one of [...watchers])
        if (one.names.some(name => names.has(name))) one.draw();
    });
  }
  changed.forEach(name => waiting.add(name));
}

const clip = () => DATA.clips[state.clip];

/** A number for people: three digits, a true minus. */
function short(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const text = Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(digits - 1) :
    String(+value.toPrecision(digits));
  return text.replace("-", "−");
}

const seconds = value => value.toFixed(2) + " s";

/** A section with its heading, a sentence on what it shows, and what it lacks. */
function section(id, title, lead, ...children) {
  const lacks = (clip().missing[id] || []).map(sentence => el("p", { className: "gap" }, sentence));
  return el("section", { id, tabIndex: -1 }, el("h2", {}, title), lead ? el("p", { className: "lead" }, lead) : null,
    ...lacks, ...children);
}

/** Buttons of which one is pressed. options: [value, text]. */
function choice(label, name, options, named) {
  const buttons = options.map(([value, text]) => el("button", { type: "button", on: { click: () => set({
        [name]: value }) } }, text));
  const group = el("div", { className: "choice", role: "group", "aria-label": label }, ...buttons);
  watch([name], () => options.forEach(([value], n) => buttons[n].setAttribute("aria-pressed", String(state[name] ===
    value))));
  return el("div", { className: "control" }, el("span", { className: "label" }, named || label), group);
}

/** A drop-down list. groups: [heading or null, [[value, text], ...]]. */
function picker(label, name, groups) {
  const options = list => list.map(([value, text]) => el("option", { value: String(value) }, text));
  const select = el("select", {
    on: {
      change: () => {
        const all = groups.flatMap(([, list]) => list);
        set({
          [name]: all.find(([value]) => String(value) === select.value)[0] });
      }
    }
  }, ...groups.flatMap(([heading, list]) => heading ? [el("optgroup", { label: heading }, ...options(list))] :
    options(list)));
  watch([name], () => { select.value = String(state[name]); });
  return el("label", { className: "control" }, el("span", { className: "label" }, label), select);
}

/** A box to tick. */
function tick(label, name) {
  const box = el("input", { type: "checkbox", on: { change: () => set({
        [name]: box.checked }) } });
  watch([name], () => { box.checked = state[name]; });
  return el("label", { className: "control tickbox" }, box, el("span", {}, label));
}

/** A slider from low to high. */
function slider(label, name, low, high, step) {
  const range = el("input", { type: "range", min: low, max: high, step, on: { input: () => set({
        [name]: Number(range.value) }) } });
  watch([name], () => { range.value = state[name]; });
  return el("label", { className: "control" }, el("span", { className: "label" }, label), range);
}
