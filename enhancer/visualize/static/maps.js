// One word's maps over the video: ground truth, teacher, students, all at one time and on one colour scale.

const PANEL = 320;

function mapSection() {
  const made = section("maps", "Maps",
    "Where each model looks for the chosen word, at the chosen time: as density, times what an even spread " +
      "would have there (1× is even)."
    );
  const maps = clip().maps;
  if (!maps.length) return made;
  made.append(mapControls(maps));
  const readout = el("p", { className: "note readout", role: "status" });
  const panels = el("div", { className: "panels" }, ...maps.map(map => mapPanel(map, readout)));
  made.append(panels, readout, everyPart(maps));
  return made;
}

function mapControls(maps) {
  const teacher = maps.find(map => map.kind === "teacher"),
    students = maps.filter(map => map.kind === "student" && map.layers);
  const named = (kind, part) => part ? part.names.map((name, n) => [kind + ":" + n, name]) : [];
  const words = clip().words.map((word, n) => [n, word.text + (word.selected ? " ·" : "")]);
  const controls = [picker("Word (· in the prior)", "word", [
    [null, words]
  ])];
  if (teacher && (teacher.steps || teacher.layers)) {
    controls.push(picker("Teacher", "shows", [
      [null, [
        ["all", "mean of steps and layers"]
      ]],
      ["Denoising step", named("steps", teacher.steps)],
      ["Layer", named("layers", teacher.layers)]
    ]));
  }
  if (students.length) {
    const most = students.reduce((a, b) => a.layers.names.length >= b.layers.names.length ? a : b);
    controls.push(picker("Students", "student", [
      [null, [
        ["all", "mean of layers"]
      ]],
      ["Layer", named("layers", most.layers)]
    ]));
  }
  controls.push(picker("Colours", "colours", [
      [null, Object.keys(DATA.colours).map(name => [name, name])]
    ]),
    picker("Top of the scale", "top", [
      [null, [2, 4, 8, 16, 32, 64].map(value => [value, "≥ " + value + "×"])]
    ]),
    slider("Strength over the picture", "opacity", 0, 1, 0.05));
  const bar = el("div", {});
  watch(["colours", "top"], () => {
    const ticks = [0, 1, ...[2, 4, 8, 16, 32].filter(value => value < 0.7 * state.top), state.top];
    bar.replaceChildren(scaleBar("density, times uniform (colour follows its square root)", levelOf,
      ticks.map(value => [value, value === state.top ? "≥ " + value + "×" : value + "×"])));
  });
  return el("div", { className: "controls" }, ...controls, bar);
}

/** What of a map is shown now: "all", or ["steps" | "layers", number]; null where it has no such part. */
function partShown(map) {
  const asked = map.kind === "teacher" ? state.shows : map.kind === "student" ? state.student : "all";
  if (asked === "all") return "all";
  const [kind, number] = asked.split(":");
  return map[kind] && Number(number) < map[kind].names.length ? [kind, Number(number)] : null;
}

/** Draws a word's map at the present time over the frame; says why where there is none. */
function drawMap(pen, map, which, width, height, word = state.word) {
  drawFrame(pen, clip().frames, state.frame, width, height);
  const frame = frameAt(map, clip().times[state.frame]);
  if (frame < 0) return "no cell at this time";
  const cells = which && cellsOf(map, word, frame, which);
  if (!cells) return "not harvested";
  if (cells.values.every(byte => byte === 0)) return which !== "all" && which[0] === "layers" && map.kind ===
    "teacher" ? "no head of this layer was kept" : "no map of this word";
  drawCells(pen, map, cells, width, height);
  return "";
}

function mapPanel(map, readout) {
  const width = PANEL,
    height = shapeOf(width);
  const canvas = canvasOf(width, height, map.name);
  const head = el("span", { className: "sub" }),
    gap = el("span", { className: "none" });
  watch(["word", "frame", "shows", "student", "colours", "top", "opacity", "loaded"], () => {
    const which = partShown(map);
    gap.textContent = drawMap(canvas.drawing(), map, which, width, height);
    const shape = [map.spans.length, map.rows.length - 1, map.columns.length - 1].join("×");
    const part = which === "all" || !which ? "" : map[which[0]].names[which[1]] + " · ";
    const peak = map.peaks[state.word];
    head.textContent = part + shape + " cells" + (which === "all" && peak !== null ? " · peak " + short(peak, 2) +
      "×" : "");
  });
  const read = event => {
    const box = canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width,
      y = (event.clientY - box.top) / box.height;
    const which = partShown(map),
      frame = frameAt(map, clip().times[state.frame]);
    const cells = which && frame >= 0 ? cellsOf(map, state.word, frame, which) : null;
    const column = map.columns.findIndex((at, n) => n + 1 < map.columns.length && at <= x && x < map.columns[n +
    1]);
    const row = map.rows.findIndex((at, n) => n + 1 < map.rows.length && at <= y && y < map.rows[n + 1]);
    if (!cells || row < 0 || column < 0) return;
    const value = density(cells.values[Math.floor(row / cells.block) * cells.columns + Math.floor(column / cells
      .block)]);
    readout.textContent =
      `${map.name}: row ${row + 1}, column ${column + 1}, ${value === null ? "not known" : short(value, 2) + "×"}`;
  };
  canvas.addEventListener("pointermove", read);
  canvas.addEventListener("pointerdown", read);
  return el("figure", { className: "panel card" }, el("figcaption", {}, el("b", {}, map.name), " ", head, gap),
    canvas, map.note ? el("p", { className: "note" }, map.note) : null);
}

/** Small pictures of all steps and all layers of the teacher and of each student, for the chosen word and time. */
function everyPart(maps) {
  const rows = maps.flatMap(map => [
    ["steps", "every denoising step"],
    ["layers", "every layer"]
  ].filter(([kind]) => map[kind]).map(([kind, title]) => [map, kind, title]));
  if (!rows.length) return null;
  const body = el("div", {});
  const details = el("details", { id: "every" }, el("summary", {}, "Every step and every layer at once"), body);
  let filled = false;
  details.addEventListener("toggle", () => {
    if (filled || !details.open) return;
    filled = true;
    const width = 132,
      height = shapeOf(width);
    for (const [map, kind, title] of rows) {
      const small = map[kind].names.map((name, n) => {
        const canvas = canvasOf(width, height, map.name + ", " + name),
          gap = el("span", { className: "none" });
        watch(["word", "frame", "colours", "top", "opacity", "loaded"], () => { gap.textContent =
            drawMap(canvas.drawing(), map, [kind, n], width, height); });
        return el("figure", { className: "small" }, canvas, el("figcaption", {}, name, " ", gap));
      });
      body.append(el("h3", {}, map.name + ", " + title), el("div", { className: "smalls" }, ...small));
    }
  });
  return details;
}
