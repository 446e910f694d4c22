// One head: its vision-to-vision map with the motion mask, its F×F cross-frame matrix, and its runs above τ.

const HALF = window.innerWidth > 520 ? 240 : 160; // drawing units of the two small pictures, about their size on the screen

const bit = (packed, index) => (packed[index >> 3] >> (7 - (index & 7))) & 1;

/** Attention, times uniform, of a stored byte; NaN where not known. */
const attentionOf = byte => byte ? 2 ** (DATA.octaves * ((byte - 1) / 127 - 1)) : NaN;

/** Where a head's arrays are: {maps, unit} or null if the page has no map of it. */
function mapOfHead(heads, chosen) {
  const maps = chosen && heads.maps.find(one => one.rows.includes(chosen.row));
  return maps ? { maps, unit: maps.rows.indexOf(chosen.row) * heads.metrics.score[0].length + chosen.head } : null;
}

function headPanel(heads, slot) {
  const caption = el("figcaption", {}),
    facts = el("p", { className: "note" }),
    readout = el("p", { className: "note readout", role: "status" });
  const whole = canvasOf(480, 480, "Vision-to-vision attention of the " + (slot ? "right" : "left") + " head");
  const cross = canvasOf(HALF, HALF, "Cross-frame attention"),
    runs = canvasOf(HALF, HALF, "Lengths of runs");
  const crossText = el("p", { className: "note" }),
    runText = el("p", { className: "note" });
  watch(["heads", "colours", "mask", "place", "metric"], () => {
    const chosen = state.heads[slot],
      found = mapOfHead(heads, chosen);
    if (!chosen) return;
    const kept = heads.selected[chosen.row][chosen.head];
    caption.replaceChildren(el("b", {}, `${heads.rows[chosen.row]}, head ${chosen.head}`), kept ?
    el("span", { className: "badge" }, "selected") : "");
    facts.textContent = Object.entries(DATA.metrics).map(([name, text]) =>
      `${text} ${short(heads.metrics[name][chosen.row][chosen.head])}`).join(" · ");
    for (const canvas of [whole, cross, runs]) canvas.drawing();
    if (!found) {
      crossText.textContent = "The page holds no attention of this head.";
      runText.textContent = readout.textContent = "";
      return;
    }
    drawWhole(whole, heads, found);
    const above = drawCross(cross, heads, found);
    const place = placeIn(heads, found);
    crossText.textContent =
      `F×F: from each frame (row) to each (column), ${place < 0 ? "mean of places" : "at one place, ringed " +
        "above τ"}; ` +
      `τ is ${short(found.maps.threshold[found.unit], 3)}× uniform`;
    drawRuns(runs, heads, found, above, runText);
  });
  whole.addEventListener("pointerdown", event => readWhole(event, whole, heads, slot, readout));
  whole.addEventListener("pointermove", event => readWhole(event, whole, heads, slot, readout));
  return el("figure", { className: "card headpanel" }, caption, facts, whole, readout,
  el("div", { className: "halves" }, el("div", {}, cross, crossText), el("div", {}, runs, runText)));
}

/** Draws all rows and columns, frame by frame, places in raster order inside; the mask as outlines. */
function drawWhole(canvas, heads, { maps, unit }) {
  const frames = heads.shape[0],
    side = frames * maps.places.length,
    data = bytes(maps.attention).subarray(unit * side * side, (unit + 1) * side * side);
  const table = bytes(DATA.colours[state.colours]);
  const small = document.createElement("canvas");
  small.width = small.height = side;
  const picture = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    const at = data[i] === 0 ? -1 : 3 * (data[i] - 1);
    picture.data.set(at < 0 ? [128, 128, 128, 255] : [table[at], table[at + 1], table[at + 2], 255], 4 * i);
  }
  small.getContext("2d").putImageData(picture, 0, 0);
  const pen = canvas.drawing();
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, 480, 480);
  pen.strokeStyle = "rgba(255,255,255,.55)";
  pen.lineWidth = 0.6;
  for (let f = 1; f < frames; f++) {
    const at = 480 * f / frames;
    pen.beginPath();
    pen.moveTo(at, 0);
    pen.lineTo(at, 480);
    pen.moveTo(0, at);
    pen.lineTo(480, at);
    pen.stroke();
  }
  if (state.mask) outline(pen, bytes(maps.mask), side, 480 / side);
}

/** Colours of the mask's border: 29 CIELAB units or more from every colour of the map, as all kinds of colour vision
    see them (simulated after Machado et al. 2009). */
const MASK = { viridis: "#ff3df2", cividis: "#ff3df2", magma: "#39e6ff", inferno: "#39e6ff" };

/** The border between inside and outside of the mask. */
function outline(pen, mask, side, size) {
  pen.beginPath();
  for (let r = 0; r < side; r++)
    for (let c = 0; c < side; c++) {
      if (!bit(mask, r * side + c)) continue;
      const x = c * size,
        y = r * size;
      if (r === 0 || !bit(mask, (r - 1) * side + c)) { pen.moveTo(x, y);
        pen.lineTo(x + size, y); }
      if (r === side - 1 || !bit(mask, (r + 1) * side + c)) { pen.moveTo(x, y + size);
        pen.lineTo(x + size, y + size); }
      if (c === 0 || !bit(mask, r * side + c - 1)) { pen.moveTo(x, y);
        pen.lineTo(x, y + size); }
      if (c === side - 1 || !bit(mask, r * side + c + 1)) { pen.moveTo(x + size, y);
        pen.lineTo(x + size, y + size); }
    }
  pen.strokeStyle = MASK[state.colours];
  pen.lineWidth = Math.min(1.6, Math.max(0.9, size / 4));
  pen.stroke();
}

function readWhole(event, canvas, heads, slot, readout) {
  const found = mapOfHead(heads, state.heads[slot]);
  if (!found) return;
  const box = canvas.getBoundingClientRect(),
    { maps, unit } = found,
    count = maps.places.length,
    side = heads.shape[0] * count;
  const [c, r] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map(part => Math
    .max(0, Math.min(side - 1, Math.floor(part * side))));
  const value = bytes(maps.attention)[unit * side * side + r * side + c];
  const name = index =>
    `frame ${Math.floor(index / count) + 1}, row ${Math.floor(maps.places[index % count] / heads.shape[2]) + 1}, ` +
    `column ${maps.places[index % count] % heads.shape[2] + 1}`;
  readout.textContent = `from ${name(r)} to ${name(c)}: ${value ? short(attentionOf(value), 2) + "×" : "not known"}`;
  if (event.type === "pointerdown") set({ place: heads.maps[0].places.indexOf(maps.places[r % count]) });
}

/** The chosen place among those of this map; −1 for the mean, also where it does not show that place. */
const placeIn = (heads, { maps }) => state.place < 0 ? -1 : maps.places.indexOf(heads.maps[0].places[state.place]);

/** Draws A_s [F, F]; returns which entries of each place lie above τ, as a function (place, from, to). */
function drawCross(canvas, heads, found) {
  const { maps, unit } = found, frames = heads.shape[0], count = maps.places.length, place = placeIn(heads, found);
  const side = frames * count,
    data = bytes(maps.attention);
  const value = (p, a, b) => attentionOf(data[(unit * side + a * count + p) * side + b * count + p]);
  const packed = bytes(maps.above),
    stride = Math.ceil(count * frames * frames / 8);
  const above = (p, a, b) => bit(packed, 8 * stride * unit + (p * frames + a) * frames + b);
  const pen = canvas.drawing(),
    size = HALF / frames;
  for (let a = 0; a < frames; a++)
    for (let b = 0; b < frames; b++) {
      const of = place < 0 ? maps.places.map((_, p) => value(p, a, b)).filter(Number.isFinite) : [value(place, a, b)]
        .filter(Number.isFinite);
      const mean = of.length ? of.reduce((sum, one) => sum + one, 0) / of.length : null;
      const level = mean === null ? null : (Math.log2(Math.max(mean, 1e-9)) + DATA.octaves) / (2 * DATA.octaves);
      const fill = level === null ? [128, 128, 128] : colour(Math.max(0, Math.min(1, level)));
      pen.fillStyle = css(fill);
      pen.fillRect(b * size, a * size, size + 0.5, size + 0.5);
      if (size >= 28 && mean !== null) {
        pen.fillStyle = inkOn(fill);
        pen.font = "12px system-ui, sans-serif";
        pen.textAlign = "center";
        pen.fillText(short(mean, 2), (b + 0.5) * size, (a + 0.5) * size + 4);
      }
      if (place >= 0 && above(place, a, b)) {
        pen.strokeStyle = inkOn(fill);
        pen.lineWidth = 1.4;
        pen.strokeRect(b * size + 2, a * size + 2, size - 4, size - 4);
      }
    }
  return above;
}

/** How long the runs of consecutive frames above τ are: of the chosen place, or of all; their mean is the place's
    part of TCS. */
function drawRuns(canvas, heads, found, above, text) {
  const frames = heads.shape[0],
    place = placeIn(heads, found),
    lengths = new Array(frames + 1).fill(0);
  const means = [];
  for (const p of place < 0 ? found.maps.places.map((_, n) => n) : [place]) {
    let total = 0,
      runs = 0;
    for (let a = 0; a < frames; a++) {
      let length = 0;
      for (let b = 0; b <= frames; b++) {
        if (b < frames && above(p, a, b)) { length++; continue; }
        if (length) { lengths[length]++;
          total += length;
          runs++; }
        length = 0;
      }
    }
    means.push(runs ? total / runs : 0);
  }
  const most = Math.max(...lengths, 1),
    pen = canvas.drawing(),
    ink = getComputedStyle(document.body).color;
  const left = 8,
    bottom = HALF - 28,
    width = (HALF - 2 * left) / frames;
  pen.textAlign = "center";
  pen.font = "11px system-ui, sans-serif";
  for (let length = 1; length <= frames; length++) {
    const height = (HALF - 60) * lengths[length] / most,
      x = left + (length - 1) * width;
    pen.fillStyle = css(colour(0.45));
    pen.fillRect(x + 1, bottom - height, Math.max(1, width - 2), height);
    pen.fillStyle = ink;
    if (length % Math.ceil(16 / width) === 0) pen.fillText(String(length), x + width / 2, bottom +
      14);
    if (width >= 26 && lengths[length]) pen.fillText(String(lengths[length]), x + width / 2, bottom - height - 4);
  }
  pen.fillText("frames in a run", HALF / 2, bottom + 26);
  const mean = means.reduce((sum, one) => sum + one, 0) / means.length;
  text.textContent =
    `Runs above τ: ${lengths.reduce((a, b) => a + b, 0)}, mean length ${short(mean)}` +
    (place < 0 ? `, mean of ${means.length} places` : " at this place");
}
