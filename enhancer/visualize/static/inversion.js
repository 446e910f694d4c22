// The clip, the noise it was inverted to, and its reconstruction, with PSNR frame by frame.

function inversionSection() {
  const made = section("inversion", "Inversion",
    "What the teacher saw, the noise that inverting it ended at, and what denoising that noise under the text " +
      "gives back."
    );
  const stored = clip().inversion;
  const view = stored && { ...stored, frames: stored.frames || clip().frames };
  if (!view) {
    if (!(clip().missing.inversion || []).length) made.append(el("p", { className: "gap" },
      "Nothing of the inversion is at hand: a prior's file holds its PSNR only, and the teacher was not asked again."
      ));
    return made;
  }
  const facts = [view.psnr === null ? "" : `PSNR ${view.psnr.toFixed(1)} dB`, view.relative_l2 === null ? "" :
    `relative L2 error of the latents ${short(view.relative_l2)}`
  ].filter(Boolean);
  if (facts.length) made.append(el("p", { className: "fact" }, facts.join(" · ")));
  const latents = view.latents;
  const channels = latents ? [
    ["rgb", "first three as red, green, blue"], ...Array.from({ length: latents.shape[1] }, (_, n) => [String(n),
      "channel " + n
    ])
  ] : [];
  const controls = latents ? [picker("Latent channels", "channel", [
    [null, channels]
  ])] : [];
  if (view.reconstruction) controls.push(picker("Difference is shown", "gain", [
    [null, [1, 2, 4, 8].map(value => [value, "× " + value])]
  ]));
  made.append(el("div", { className: "controls" }, ...controls), inversionPanels(view), psnrStrip(view));
  return made;
}

function inversionPanels(view) {
  const width = PANEL,
    height = Math.round(width * view.frames.height / view.frames.width);
  const panel = (title, draw, names) => {
    const canvas = canvasOf(width, height, title),
      sub = el("span", { className: "sub" });
    watch(["frame", "loaded", ...names], () => { sub.textContent = draw(canvas.drawing()) || ""; });
    return el("figure", { className: "panel card" }, el("figcaption", {}, el("b", {}, title), " ", sub), canvas);
  };
  const panels = [panel("original", pen => drawFrame(pen, view.frames, state.frame, width, height), [])];
  if (view.latents) panels.push(panel("inverted to noise", pen => drawLatent(pen, view.latents, width, height), [
    "channel", "colours"
  ]));
  if (view.reconstruction) {
    panels.push(panel("reconstruction", pen => {
      drawFrame(pen, view.reconstruction, state.frame, width, height);
      return view.frame_psnr ? view.frame_psnr[Math.min(state.frame, view.frame_psnr.length - 1)].toFixed(1) +
        " dB" : "";
    }, []));
    panels.push(panel("difference", pen => drawDifference(pen, view, width, height), ["gain"]));
  }
  return el("div", { className: "panels" }, ...panels);
}

/** The latent frame of the present time, between −3 and 3. */
function drawLatent(pen, latents, width, height) {
  const [frames, channels, rows, columns] = latents.shape, data = bytes(latents.blob);
  const teacher = clip().maps.find(map => map.kind === "teacher");
  const spans = teacher && teacher.spans.length;
  const frame = spans ? Math.min(frames - 1, Math.max(0, Math.floor(frameAt(teacher, clip().times[state.frame]) *
    frames / spans))) : Math.min(frames - 1, Math.floor(state.frame * frames / clip().times.length));
  const at = (channel, i) => data[(frame * channels + channel) * rows * columns + i];
  const small = document.createElement("canvas");
  small.width = columns;
  small.height = rows;
  const picture = new ImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const rgb = state.channel === "rgb" ? [0, 1, 2].map(channel => at(Math.min(channel, channels - 1), i)) :
      colour(at(Number(state.channel), i) / 255);
    picture.data.set([...rgb, 255], 4 * i);
  }
  small.getContext("2d").putImageData(picture, 0, 0);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, width, height);
  return `latent frame ${frame + 1} of ${frames}, mean ${short(latents.mean, 2)}, deviation ${short(latents.deviation, 2)}`;
}

/** |original − reconstruction| times the gain. */
function drawDifference(pen, view, width, height) {
  drawFrame(pen, view.frames, state.frame, width, height);
  pen.globalCompositeOperation = "difference";
  if (sheet(view.reconstruction)) {
    const image = sheet(view.reconstruction),
      one = view.reconstruction,
      n = Math.min(state.frame, one.count - 1);
    pen.imageSmoothingEnabled = one.width > 128;
    pen.drawImage(image, (n % one.columns) * one.width, Math.floor(n / one.columns) * one.height, one.width, one
      .height, 0, 0, width, height);
  }
  pen.globalCompositeOperation = "lighter";
  const canvas = pen.canvas;
  for (let gain = 1; gain < state.gain; gain *= 2) pen.drawImage(canvas, 0, 0, canvas.width, canvas.height, 0, 0,
    width, height);
  pen.globalCompositeOperation = "source-over";
  return "× " + state.gain;
}

/** All frames side by side, original above reconstruction, PSNR below; a click goes there. */
function psnrStrip(view) {
  const count = view.frames.count,
    width = 96,
    height = Math.round(width * view.frames.height / view.frames.width);
  const columns = Array.from({ length: count }, (_, n) => {
    const rows = [view.frames, view.reconstruction].filter(Boolean).map(pictures => {
      const canvas = canvasOf(width, height, "frame " + (n + 1));
      watch(["loaded"], () => drawFrame(canvas.drawing(), pictures, n, width, height));
      return canvas;
    });
    const psnr = view.frame_psnr ? view.frame_psnr[n].toFixed(1) + " dB" : "";
    const time = clip().times[n];
    const column = el("button", { type: "button", className: "frame", on: { click: () => set({ frame: Math.min(n,
            clip().times.length - 1), playing: false }) } }, ...rows, el("span", {}, time === undefined ? "" :
      seconds(time)), el("b", {}, psnr));
    watch(["frame"], () => column.setAttribute("aria-pressed", String(state.frame === n)));
    return column;
  });
  return el("div", { className: "scroll card strip" }, ...columns);
}
