// What the compressed stream says: vectors, validity and prediction error on the frame, and the line of packets.

const KINDS = { I: ["#d55e00", "I, coded alone"], P: ["#0072b2", "P, from the past"], B: ["#009e73",
    "B, from both sides"
  ] };
const VALIDITY = { 0: ["#8a8a8a", "nothing known"], 2: ["#e69f00", "intra: coded without reference"], 3: ["#cc79a7",
    "points out of the picture"
  ], 4: ["#d55e00", "known to be wrong"] };

function codecSection() {
  const made = section("codec", "Codec",
    "The motion that the video file itself carries, at the sampled times: an arrow is where a cell's content " +
      "goes in a quarter of a second."
    );
  const view = clip().codec;
  if (!view) {
    if (!(clip().missing.codec || []).length) made.append(el("p", { className: "gap" },
      "The stream of the clip was not read: its file is not at hand."));
    return made;
  }
  const keys = [...Object.values(VALIDITY).map(([paint, text]) => swatch(paint, text))];
  made.append(el("div", { className: "controls" }, tick("Vectors", "vectors"), tick("Validity", "validity"),
      tick("Prediction error", "residual")),
    el("div", { className: "codec" }, codecPanel(view), el("dl", {}, ...view.facts.flatMap(([name, text]) =>
      [el("dt", {}, name), el("dd", {}, text)]))),
    el("ul", { className: "keys" }, ...keys));
  const bars = el("div", {});
  watch(["colours", "residual", "vectors"], () => bars.replaceChildren(...[
    state.residual ? scaleBar("prediction error, grey levels", value => value / view.reach, [0, view.reach / 2,
      view.reach
    ].map(value => [value, short(value, 2)])) : null,
    state.vectors ? scaleBar("speed of arrows, pixels a second", value => Math.sqrt(value / view.fastest), [0,
      view.fastest / 4, view.fastest
    ].map(value => [value, short(value, 2)])) : null
  ].filter(Boolean)));
  made.append(el("div", { className: "scales" }, bars), timeline(view));
  made.append(...view.notes.map(note => el("p", { className: "note" }, note)));
  return made;
}

const swatch = (paint, text) => {
  const box = el("i", {});
  box.style.background = paint;
  return el("li", {}, box, text);
};

function codecPanel(view) {
  const width = 480,
    height = shapeOf(width),
    canvas = canvasOf(width, height, "Motion of the stream on the frame"),
    sub = el("span", { className: "sub" });
  const rows = view.rows.length - 1,
    columns = view.columns.length - 1;
  watch(["frame", "vectors", "validity", "residual", "colours", "loaded"], () => {
    const pen = canvas.drawing(),
      n = Math.min(state.frame, view.shown.length - 1),
      size = rows * columns;
    drawFrame(pen, clip().frames, state.frame, width, height);
    pen.fillStyle = "rgba(0,0,0,.25)";
    pen.fillRect(0, 0, width, height);
    const valid = bytes(view.validity).subarray(n * size, (n + 1) * size),
      error = bytes(view.residual).subarray(n * size, (n + 1) * size);
    const velocity = bytes(view.velocity).subarray(2 * n * size, 2 * (n + 1) * size);
    for (let i = 0; i < size; i++) {
      const left = view.columns[i % columns] * width,
        top = view.rows[Math.floor(i / columns)] * height;
      const right = view.columns[i % columns + 1] * width,
        bottom = view.rows[Math.floor(i / columns) + 1] * height;
      if (state.residual && error[i]) {
        pen.fillStyle = css(colour((error[i] - 1) / 254), 0.75);
        pen.fillRect(left, top, right - left + 0.4, bottom - top + 0.4);
      }
      if (state.validity && VALIDITY[valid[i]]) {
        pen.fillStyle = VALIDITY[valid[i]][0] + "80";
        pen.fillRect(left, top, right - left + 0.4, bottom - top + 0.4);
      }
    }
    if (state.vectors)
      for (let i = 0; i < size; i++) {
        if (!velocity[2 * i]) continue;
        const middle = [(view.columns[i % columns] + view.columns[i % columns + 1]) / 2 * width, (view.rows[Math
          .floor(i / columns)] + view.rows[Math.floor(i / columns) + 1]) / 2 * height];
        arrow(pen, middle, [velocity[2 * i], velocity[2 * i + 1]].map(byte => (byte - 128) / 127 * view.fastest),
          width, view);
      }
    const frame = view.shown[n];
    sub.textContent =
      `coded frame ${frame + 1}, ${view.kinds[frame]}, ${view.bytes[frame]} bytes, ` +
      `${Math.round(100 * view.valid[frame])} % of cells with a motion`;
  });
  return el("figure", { className: "card panel" }, el("figcaption", {}, el("b", {}, "stream"), " ", sub), canvas);
}

/** A quarter of a second of motion; velocities are of the file's own pixels. */
function arrow(pen, [x, y], [vx, vy], width, view) {
  const speed = Math.hypot(vx, vy),
    factor = 0.25 * width / view.width;
  const dx = vx * factor,
    dy = vy * factor,
    length = Math.hypot(dx, dy);
  if (length < 1.5) return;
  pen.strokeStyle = css(colour(0.25 + 0.75 * Math.sqrt(Math.min(1, speed / view.fastest))));
  pen.lineWidth = 1.6;
  pen.beginPath();
  pen.moveTo(x, y);
  pen.lineTo(x + dx, y + dy);
  const head = Math.min(5, 0.4 * length),
    turn = Math.atan2(dy, dx);
  for (const side of [2.6, -2.6]) {
    pen.moveTo(x + dx, y + dy);
    pen.lineTo(x + dx + head * Math.cos(turn + side), y + dy + head * Math.sin(turn + side));
  }
  pen.stroke();
}

/** Packets' bytes by kind, groups of pictures, cuts, mean speed; a click goes to the nearest sampled frame. */
function timeline(view) {
  const width = 960,
    height = 204,
    left = 44,
    bottom = 150,
    top = 16;
  const start = view.times[0],
    end = Math.max(view.duration, start + 1e-3);
  const px = time => left + (time - start) / (end - start) * (width - left - 12);
  const most = Math.max(...view.bytes, 1),
    py = size => bottom - (bottom - top) * Math.log10(1 + size) / Math.log10(1 + most);
  const bars = view.times.map((time, n) => {
    const kind = KINDS[view.kinds[n]] || ["#777777", view.kinds[n]];
    const next = n + 1 < view.times.length ? view.times[n + 1] : end;
    return svg("rect", { x: px(time), y: py(view.bytes[n]), width: Math.max(0.6, px(next) - px(time) - 0.6),
        height: bottom - py(view.bytes[n]), fill: kind[0] },
      svg("title", {},
        `${seconds(time)}: ${view.kinds[n]}, ${view.bytes[n]} bytes, mean speed ${short(view.speed[n])} px/s`));
  });
  const letters = view.times.length <= 60 ? view.times.map((time, n) => svg("text", { class: "tick middle", x:
      (px(time) + px(n + 1 < view.times.length ? view.times[n + 1] : end)) / 2, y: bottom + 13 }, view.kinds[n])) : [];
  const groups = view.keys.map(n => svg("line", { class: "gop", x1: px(view.times[n]), x2: px(view.times[n]),
    y1: top - 8, y2: bottom }));
  const cuts = view.cuts.map(n => svg("line", { class: "cutline", x1: px(view.times[n]), x2: px(view.times[n]),
    y1: top, y2: bottom }));
  const seen = clip().times.map(time => svg("path", { class: "sampled",
    d: `M${px(time) - 4},${bottom + 28} l4,-8 l4,7 z` }));
  const cursor = svg("line", { class: "cursor", y1: top - 8, y2: bottom + 20, x1: 0, x2: 0 });
  const ticks = roundTicks(start, end, 8).map(value => svg("text", { class: "tick middle", x: px(value), y: height -
      4 }, seconds(value)));
  const names = [1, 100, 10000, 1000000].filter(size => size <= most).map(size => [svg("text", { class: "tick end",
    x: left - 6, y: py(size) + 4 }, size >= 1000 ? size / 1000 + " kB" : size + " B"),
  svg("line", { class: "grid", x1: left, x2: width - 12, y1: py(size), y2: py(size) })]);
  const chart = svg("svg", { class: "chart timeline", viewBox: `0 0 ${width} ${height}`,
    role: "img", "aria-label": "Packets of the stream over time" }, names, bars, groups, cuts, letters, seen,
    cursor, ticks);
  chart.addEventListener("click", event => {
    const box = chart.getBoundingClientRect(),
      time = start + ((event.clientX - box.left) / box.width * width - left) / (width - left - 12) * (end -
      start);
    const nearest = clip().times.reduce((best, at, n) => Math.abs(at - time) < Math.abs(clip().times[best] -
      time) ? n : best, 0);
    set({ frame: nearest, playing: false });
  });
  watch(["frame"], () => {
    const x = px(clip().times[state.frame]);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  });
  const kinds = [...new Set(view.kinds)].map(kind => KINDS[kind] || ["#777777", kind]).map(([paint, text]) => swatch(
    paint, text));
  return el("figure", { className: "card chartcard" }, el("figcaption", {},
      "Packets on a logarithmic scale; a black line begins a group of pictures, a dashed one a scene; triangles " +
        "are the sampled frames."
      ),
    el("ul", { className: "keys" }, ...kinds), el("div", { className: "scroll" }, chart));
}
