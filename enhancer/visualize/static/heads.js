// The layer × head map of scores; a head that is chosen here is looked at in one of two panels.

function headSection() {
  const made = section("heads", "Heads",
    "How strongly each attention head follows places over time: DFC, TCS and DSR, and the sum of the three, " +
    "standardised. A ring marks the heads that the prior is made of."
    );
  const heads = clip().heads;
  if (!heads) return made;
  if (heads.note) made.append(el("p", { className: "note" }, heads.note));
  const metrics = Object.entries(DATA.metrics).map(([name, text]) => [name, text]);
  made.append(el("div", { className: "controls" }, choice("Score", "metric", metrics), choice("A click fills", "slot",
    [
      [0, "left"],
      [1, "right"]
    ], "A chosen head goes to the")), headGrid(heads));
  const maps = el("div", { className: "controls" }, tick("Outline the motion mask", "mask"), placePicker(heads));
  if (heads.maps.length) made.append(maps, el("div", { className: "pair" }, headPanel(heads, 0), headPanel(heads, 1)),
    attentionScale());
  return made;
}

/** Heads to begin with: the best and the worst of those judged that have a map. */
function firstHeads(heads) {
  const rows = heads.judged.length ? heads.judged : heads.rows.map((_, row) => row);
  const known = rows.flatMap(row => heads.metrics.score[row].map((score, head) => [score, row, head]))
    .filter(([score]) => score !== null);
  known.sort((a, b) => b[0] - a[0]);
  const pick = one => one ? { row: one[1], head: one[2] } : { row: 0, head: 0 };
  return [pick(known[0]), pick(known[known.length - 1])];
}

function headGrid(heads) {
  const count = heads.metrics.score[0].length;
  const className = heads.rows.length > 12 ? "heads many" : "heads";
  const grid = el("div", { className, role: "grid", "aria-label": "Heads; arrow keys move, Enter chooses" });
  grid.style.setProperty("--heads", count);
  const cells = [];
  const every = Math.ceil(count / 24);
  const numbers = Array.from({ length: count }, (_, head) => head % every === 0 ? String(head) : "");
  grid.append(el("span", { className: "corner" }), ...numbers.map(text => el("span", { className: "colhead" }, text)));
  heads.rows.forEach((name, row) => {
    grid.append(el("span", { className: "rowhead" }, name));
    for (let head = 0; head < count; head++) {
      const cell = el("button", {
        type: "button",
        tabIndex: -1,
        className: "head" + (heads.selected[row][head] ? " selected" : ""),
        on: {
          click: () => choose(row, head),
          keydown: event => move(event, row, head),
          focus: () => { cells.forEach(one => { one.tabIndex = -1; });
            cell.tabIndex = 0; }
        }
      });
      cells.push(cell);
      grid.append(cell);
    }
  });
  if (cells.length) cells[0].tabIndex = 0;
  const choose = (row, head) => {
    const next = [...state.heads];
    next[state.slot] = { row, head };
    set({ heads: next });
  };
  const move = (event, row, head) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -head],
      End: [0, count - 1 - head] } [event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const to = [Math.max(0, Math.min(heads.rows.length - 1, row + step[0])), Math.max(0, Math.min(count - 1, head +
      step[1]))];
    cells[to[0] * count + to[1]].focus();
  };
  const scale = el("div", {});
  watch(["metric", "colours"], () => {
    const values = heads.metrics[state.metric].flat().filter(value => value !== null);
    const low = Math.min(...values),
      high = Math.max(...values);
    const wide = state.metric === "dfc" && low > 0 && high > 20 * low; // ratios spread over decades
    const place = value => high > low ? (wide ? Math.log(value / low) / Math.log(high / low) : (value - low) /
      (high - low)) : 0.5;
    cells.forEach((cell, n) => {
      const row = Math.floor(n / count),
        head = n % count,
        value = heads.metrics[state.metric][row][head];
      const fill = value === null ? null : colour(place(value));
      cell.style.background = fill ? css(fill) : "";
      cell.style.color = fill ? inkOn(fill) : "";
      cell.classList.toggle("unknown", !fill);
      cell.textContent = count <= 12 ? short(value, 3) : "";
      const said =
        `${heads.rows[row]}, head ${head}: ${DATA.metrics[state.metric]} ${short(value)}` +
        (heads.selected[row][head] ? ", selected" : "");
      cell.title = said;
      cell.setAttribute("aria-label", said);
    });
    const ticks = values.length ? (high > low ? [low, wide ? Math.sqrt(low * high) : (low + high) / 2, high] : [
      low
    ]) : [];
    scale.replaceChildren(scaleBar(DATA.metrics[state.metric] + (wide ? " (logarithmic)" : ""), place,
      ticks.map(value => [value, short(value)])));
  });
  watch(["heads"], () => cells.forEach((cell, n) => {
    const at = state.heads.map(one => one && one.row * count + one.head);
    cell.classList.toggle("left", at[0] === n);
    cell.classList.toggle("right", at[1] === n);
  }));
  return el("div", {}, el("div", { className: "scroll card gridcard" }, grid), scale);
}

/** Which place's F×F submatrix is shown: the mean of all, or one. */
function placePicker(heads) {
  const columns = heads.shape[2],
    places = heads.maps.length ? heads.maps[0].places : [];
  const named = places.map((place, n) => [n,
  `row ${Math.floor(place / columns) + 1}, column ${place % columns + 1}`]);
  return picker("Place of the cross-frame matrix", "place", [
    [null, [
      [-1, "mean of all places"]
    ]],
    ["Place in the picture", named]
  ]);
}

function attentionScale() {
  const bar = el("div", {});
  const place = value => (Math.log2(value) + DATA.octaves) / (2 * DATA.octaves);
  watch(["colours"], () => bar.replaceChildren(scaleBar(
    "attention, times uniform (logarithmic); the same scale for both heads", place, [1 / 256, 1 / 16, 1, 16,
      256].map(value => [value, value < 1 ? "1/" + 1 / value : value + "×"]))));
  return bar;
}
