// The text with its words coloured by motion score, the two terms of the scores, and curves over frames.

/** Share of the highest score, 0 to 1; null for a word without a score. */
function scoreLevel(word) {
  const scores = clip().words.map(one => one.score).filter(score => score !== null);
  if (word.score === null || !scores.length) return null;
  const low = Math.min(...scores),
    high = Math.max(...scores);
  return high > low ? (word.score - low) / (high - low) : 0.5;
}

/** Colours of a word: light for low scores, so that the text stays readable. */
function wordColours(word) {
  const level = scoreLevel(word);
  if (level === null) return null;
  const strong = colour(0.3),
    part = 0.1 + 0.9 * level;
  const back = strong.map(value => Math.round(255 + part * (value - 255)));
  return [css(back), inkOn(back)];
}

function tokenSection() {
  const words = clip().words;
  const made = section("tokens", "Words",
    "Each word is coloured by its motion score (darker is higher); the words of the prior are underlined. " +
      "Choose one to see its curve and its maps."
    );
  if (!words.length) return made;
  const curved = words.some(word => word.curve) ? curves(words) : el("p", { className: "note" },
    "No curves over frames: they need the teacher's attention.");
  made.append(coloured(words), el("div", { className: "two" }, scoreTable(words), curved));
  return made;
}

/** The text, its words as buttons. */
function coloured(words) {
  const line = el("p", { className: "text", "aria-label": "The text; its words are buttons" });
  const text = clip().text;
  let done = 0;
  const buttons = words.map((word, n) => {
    const button = el("button", {
      type: "button",
      className: "word" + (word.selected ? " selected" : ""),
      on: { click: () => set({ word: n }) },
      title: word.score === null ? "no score" : "motion score " + short(word.score)
    }, text.slice(word.start, word.end) || word.text);
    if (word.start >= done) line.append(text.slice(done, word.start));
    line.append(button);
    done = Math.max(done, word.end);
    return button;
  });
  line.append(text.slice(done));
  watch(["word", "colours"], () => buttons.forEach((button, n) => {
    button.setAttribute("aria-pressed", String(state.word === n));
    const colours = wordColours(words[n]);
    button.style.background = colours ? colours[0] : "";
    button.style.color = colours ? colours[1] : "";
  }));
  return line;
}

/** A bar for each word: mean and fluctuation, one after the other. */
function scoreTable(words) {
  const scored = words.map((word, n) => [word, n]).filter(([word]) => word.score !== null).sort((a, b) => b[0].score -
    a[0].score);
  if (!scored.length) return null;
  const highest = Math.max(...scored.map(([word]) => word.mean + word.fluctuation), 1e-30);
  const mean = scored.reduce((sum, [word]) => sum + word.score, 0) / scored.length;
  const deviation = Math.sqrt(scored.reduce((sum, [word]) => sum + (word.score - mean) ** 2, 0) / scored.length) || 1;
  const rows = scored.map(([word, n]) => {
    const bar = (part, name) => {
      const piece = el("i", { className: name });
      piece.style.width = 100 * part / highest + "%";
      return piece;
    };
    const row = el("tr", { on: { click: () => set({ word: n }) } },
      el("th", { scope: "row", className: word.selected ? "selected" : "" }, word.text),
      el("td", { className: "terms" }, el("div", { className: "bar" }, bar(word.mean, "mean"), bar(word
        .fluctuation, "fluctuation"))),
      el("td", { className: "number" }, short((word.score - mean) / deviation, 2)),
      el("td", { className: "number" }, short(word.mean)),
      el("td", { className: "number" }, short(word.fluctuation)));

    watch(["word"], () => row.classList.toggle("current", state.word === n));
    return row;
  });
  return el("div", { className: "scroll card" }, el("table", { className: "scores" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "word"),
      el("th", { scope: "col" }, el("span", { className: "key mean" }, "mean"), " + ",
      el("span", { className: "key fluctuation" }, "fluctuation")),
      ...["score, standardised", "mean", "fluctuation"].map(name => el("th", { scope: "col",
        className: "number" }, name)))),
    el("tbody", {}, ...rows)));
}

/** Every word's mean attention in each latent frame; the chosen word's line is thick. */
function curves(words) {
  const teacher = clip().maps.find(map => map.kind === "teacher") || clip().maps[0];
  const middles = teacher.spans.map(([start, end]) => (start + end) / 2);
  const drawn = words.map((word, n) => [word, n]).filter(([word]) => word.curve);
  const chart = lineChart({
    lines: drawn.map(([word]) => ({ points: word.curve.map((value, f) => [middles[f], value]).filter(point =>
        point[1] !== null), title: word.text, className: word.selected ? "on" : "off" })),
    x: "seconds",
    y: "mean attention of a cell",
    label: "Mean attention of each word over frames",
    low: 0,
  });
  const caption = el("figcaption", {});
  watch(["word", "frame"], () => {
    drawn.forEach(([word, n], line) => chart.lines[line].classList.toggle("current", n === state.word));
    chart.mark(clip().times[state.frame]);
    const word = words[state.word];
    caption.replaceChildren(word.curve ? el("b", {}, word.text) : "This word has no curve", word.curve ?
      " over the frames, among the other words (kept ones solid, others dashed)" : "");
  });
  return el("figure", { className: "card chartcard" }, caption, chart);
}
