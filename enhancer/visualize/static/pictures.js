// Frames, maps and their colours on canvases.

const sheets = new Map();

/** The picture of all frames of `pictures`; draws everything again when it has been read. */
function sheet(pictures) {
  const known = sheets.get(pictures.blob);
  if (known) return known.complete && known.naturalWidth ? known : null;
  const image = new Image();
  sheets.set(pictures.blob, image);
  image.addEventListener("load", () => set({ loaded: (state.loaded || 0) + 1 }));
  image.src = "data:" + pictures.type + ";base64," + document.getElementById("blob" + pictures.blob).textContent;
  return null;
}

/** A canvas of `width` drawing units by `height`, sharp on the screen it is shown on. */
function canvasOf(width, height, label) {
  const canvas = el("canvas", { role: "img", "aria-label": label });
  const ratio = Math.min(2, window.devicePixelRatio || 1);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.aspectRatio = width + " / " + height;
  canvas.drawing = () => {
    const pen = canvas.getContext("2d");
    pen.setTransform(canvas.width / width, 0, 0, canvas.height / height, 0, 0);
    pen.clearRect(0, 0, width, height);
    return pen;
  };
  return canvas;
}

/** Draws frame `number` over the whole of width × height; grey where the page has no pictures. */
function drawFrame(pen, pictures, number, width, height) {
  pen.fillStyle = "#808080";
  pen.fillRect(0, 0, width, height);
  const image = pictures && sheet(pictures);
  if (!image) return;
  const n = Math.min(number, pictures.count - 1);
  pen.imageSmoothingEnabled = pictures.width > 128;
  pen.drawImage(image, (n % pictures.columns) * pictures.width, Math.floor(n / pictures.columns) * pictures.height,
    pictures.width, pictures.height, 0, 0, width, height);
}

/** Height of a picture that is `width` wide, with the clip's shape. */
function shapeOf(width) {
  const frames = clip().frames;
  if (frames) return Math.round(width * frames.height / frames.width);
  const map = clip().maps[0];
  return map ? Math.round(width * (map.rows.length - 1) / (map.columns.length - 1)) : Math.round(width * 0.6);
}

/** [r, g, b] of a level from 0 to 1. */
function colour(level) {
  const table = bytes(DATA.colours[state.colours]);
  const at = 3 * Math.max(0, Math.min(255, Math.round(255 * level)));
  return [table[at], table[at + 1], table[at + 2]];
}

const css = (rgb, alpha = 1) => `rgba(${rgb[0]},${rgb[1]},${rgb[2]},${alpha})`;

/** Black or white, whichever reads better on a colour: a contrast of 4.58 at least (WCAG 2.2, relative luminance). */
const inkOn = rgb => {
  const [r, g, b] = rgb.map(byte => byte / 255).map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) **
    2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
};

/** Times uniform of a stored byte; null where not known. */
const density = byte => byte === 0 ? null : DATA.ceiling * ((byte - 1) / 254) ** 2;

/** Where a density lies on the colour scale: its square root, up to the top of the scale. */
const levelOf = value => Math.sqrt(Math.min(value, state.top) / state.top);

/** The latent frame of a map that is on screen at `time`; −1 for none. */
const frameAt = (map, time) => map.spans.findIndex(([start, end]) => start <= time && time < end);

/** One word's cells at one latent frame: {values, rows, columns} of `which` (all, or ["steps", k], ["layers", l]). */
function cellsOf(map, word, frame, which) {
  const part = which === "all" ? map.all : map[which[0]];
  if (!part) return null;
  const shape = part.shape,
    [rows, columns] = shape.slice(-2),
    frames = shape[shape.length - 3],
    words = shape[shape.length - 4];
  const index = which === "all" ? 0 : which[1];
  const start = ((index * words + word) * frames + frame) * rows * columns;
  return { values: bytes(part.blob).subarray(start, start + rows * columns), rows, columns, block: part.block };
}

/** The edge of a cell that may be joined of several. */
const edge = (edges, index, block) => edges[Math.min(index * block, edges.length - 1)];

/** Draws cells over a picture of width × height; cells without a value stay as they are. */
function drawCells(pen, map, cells, width, height) {
  for (let r = 0; r < cells.rows; r++)
    for (let c = 0; c < cells.columns; c++) {
      const value = density(cells.values[r * cells.columns + c]);
      if (value === null) continue;
      const left = Math.round(edge(map.columns, c, cells.block) * width),
        right = Math.round(edge(map.columns, c + 1, cells.block) * width);
      const top = Math.round(edge(map.rows, r, cells.block) * height),
        bottom = Math.round(edge(map.rows, r + 1, cells.block) * height);
      pen.fillStyle = css(colour(levelOf(value)), state.opacity);
      pen.fillRect(left, top, right - left, bottom - top);
    }
}

/** A bar of the colours with ticks. place: value → 0..1; ticks: [value, text]. */
function scaleBar(title, place, ticks) {
  const canvas = canvasOf(256, 12, title);
  const pen = canvas.drawing();
  for (let x = 0; x < 256; x++) {
    pen.fillStyle = css(colour(x / 255));
    pen.fillRect(x, 0, 1.5, 12);
  }
  const labels = ticks.map(([value, text]) => {
    const label = el("span", {}, text);
    label.style.left = 100 * place(value) + "%";
    return label;
  });
  return el("figure", { className: "scale" }, el("figcaption", {}, title), canvas, el("div", { className: "ticks" },
    ...labels));
}
