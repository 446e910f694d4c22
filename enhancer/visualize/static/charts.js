// Line and bar charts as SVG.

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "on")
      for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return node;
}

/** Round numbers within [low, high], about `most` of them. */
function roundTicks(low, high, most = 5) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(span / most));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => span / size <= most);
  const out = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * span; n++) out.push(n * step);
  return out;
}

/** Lines over a common x. lines: {points: [[x, y], ...], className, title}; returns the chart with `mark(x)` for a
    cursor. */
function lineChart({ lines, x, y, label, low = null }) {
  const [width, height] = window.innerWidth > 640 ? [600, 250] : [380, 220]; // text keeps its size on a phone
  const left = 58,
    right = 12,
    top = 12,
    bottom = 40;
  const xs = lines.flatMap(line => line.points.map(point => point[0])),
    ys = lines.flatMap(line => line.points.map(point => point[1]));
  const ends = (values, least) => {
    const [a, b] = [least === null ? Math.min(...values) : least, Math.max(...values)];
    return a < b ? [a, b] : [a - 0.5, b + 0.5];
  };
  const [x0, x1] = ends(xs, null), [y0, top1] = ends(ys, low), y1 = top1 + 0.04 * (top1 - y0);
  const px = value => left + (value - x0) / (x1 - x0) * (width - left - right);
  const py = value => height - bottom - (value - y0) / (y1 - y0) * (height - top - bottom);
  const parts = roundTicks(y0, y1).map(value => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: py(value), y2: py(value) }),
    svg("text", { class: "tick end", x: left - 7, y: py(value) + 4 }, short(value)),
  ]);
  const axis = roundTicks(x0, x1, width > 400 ? 8 : 4).map(value => svg("text", { class: "tick middle", x: px(value),
    y: height - bottom + 16 }, short(value)));
  const drawn = lines.map(line => {
    const path = svg("polyline", { class: "line " + (line.className || ""), points: line.points.map(([a, b]) =>
        px(a).toFixed(1) + "," + py(b).toFixed(1)).join(" ") });
    path.append(svg("title", {}, line.title || ""));
    return path;
  });
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, x1: -9, x2: -9 });
  const chart = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    parts, axis, drawn, cursor,
    svg("text", { class: "axis middle", x: (left + width - right) / 2, y: height - 5 }, x),
    svg("text", { class: "axis", x: 4, y: top - 1 }, y));
  chart.mark = value => {
    const at = Math.max(left, Math.min(width - right, px(value)));
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
  };
  chart.lines = drawn;
  return chart;
}
