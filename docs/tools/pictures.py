"""The pictures of "How it works", from the shipped models and a clip of the embedded world:

    PYTHONPATH=.:examples python docs/tools/pictures.py        # writes docs/pictures/*.webp, in seconds

The same versions give the same pictures. Maps are times uniform: 1 is what a map that tells nothing has everywhere.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from clips import samples, world
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from enhancer.report.pictures import COLOURS, density, on_frames, top_of_scale
from enhancer.shipped import quiet_libraries, student_path, teacher_path
from enhancer.filling import fill_store, stored_prior
from enhancer.sources import SourceContext, build_source
from enhancer.video.clip import Clip, Sampling, read_clip
from enhancer.video.codec import read_motion
from enhancer.video.codec.overlay import drawn
from enhancer.world.truth import load_truth
from vdm_priors.extract import extract_priors
from vdm_priors.families import load_teacher
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vdm_priors.settings import ExtractionSettings
from vdm_priors.store import PriorStore
from vlm_hooks.families import load_student

FOLDER = Path(__file__).resolve().parents[1] / "pictures"
FRAMES = 9
SETTINGS = dict(head_scope="layer_head", words="all", token_ratio=1.0, reconstruction=False)


def main() -> None:
    quiet_libraries()
    sample = samples()[0]
    clip = read_clip(sample.video, Sampling(frames=FRAMES))
    teacher = load_teacher(teacher_path("world"))
    [ours] = extract_priors(teacher, [clip], [sample.question],
                            ExtractionSettings(harvest_at="noise", direction="v2t", **SETTINGS))
    [papers] = extract_priors(teacher, [clip], [sample.question], ExtractionSettings(**SETTINGS))
    write("maps", draw_maps(sample, clip, ours, papers))
    write("heads", draw_heads(papers, layers=len(teacher.attention_layers)))
    write("cells", draw_cells(sample, clip, ours))


def write(name: str, figure: Figure) -> None:
    """docs/pictures/<name>.webp."""
    canvas, png = FigureCanvasAgg(figure), io.BytesIO()
    canvas.print_png(png)
    FOLDER.mkdir(exist_ok=True)
    Image.open(png).convert("RGB").save(FOLDER / f"{name}.webp", quality=82, method=6)


def draw_maps(sample, clip: Clip, ours: MotionPrior, papers: MotionPrior) -> Figure:
    """Rows: the frames, the ground truth, the teacher's maps of words, and sources that know places alone."""
    thing = thing_word(sample, ours)
    truth = load_truth(world()).evidence(sample.video.name, sample.question, ours.words, ours.grid)
    store = PriorStore(world() / "pictures")
    rows = [("ground truth", truth[thing], ours.grid)]
    rows += [(f"teacher: “{ours.words[n].text}”", ours.maps[n], ours.grid) for n in (thing, len(ours.words) - 1)]
    rows.append((f"paper's way: “{papers.words[thing].text}”", papers.maps[thing], papers.grid))
    for name in ("codec", "flow", "frame_difference"):
        source = build_source(name, SourceContext(samples=[sample], store=store, sampling=Sampling(frames=FRAMES)))
        filled = fill_store(source, [sample], store)
        prior = stored_prior(store, filled.rows[0][1])
        rows.append((name.replace("_", " "), prior.maps[0], prior.grid))
    side = clip.frames.shape[1] * 2
    tiles = [(name, on_frames(density(mass.numpy(), grid), grid, clip.times, (side, side))) for name, mass, grid in rows]
    norm = PowerNorm(0.5, 0, top_of_scale([tile for _, tile in tiles]), clip=True)

    figure = Figure(figsize=(10.6, 8.1), dpi=110, facecolor="white")
    figure.suptitle(sample.question, x=0.175, ha="left", fontsize=11, weight="bold")
    axes = figure.subplots(len(tiles) + 1, FRAMES, gridspec_kw={"wspace": 0.04, "hspace": 0.04, "left": 0.175, "right": 0.995,
                                                               "top": 0.945, "bottom": 0.06})
    for n, (name, row) in enumerate([("frames", clip.frames), *tiles]):
        for column, tile in enumerate(row):
            cell = axes[n, column]
            image = cell.imshow(tile, interpolation="nearest") if tile.ndim == 3 else cell.imshow(
                np.ma.masked_invalid(tile), cmap=COLOURS, norm=norm, interpolation="nearest")
            cell.set(xticks=[], yticks=[])
            cell.set_facecolor("#8a8f98")
        axes[n, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9.5)
    for column, time in enumerate(clip.times):
        axes[-1, column].set_xlabel(f"{time:.2f} s", fontsize=8.5)
    bar = figure.add_axes([0.175, 0.022, 0.25, 0.011])
    figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[0, 1, norm.vmax]).ax.tick_params(labelsize=8)
    figure.text(0.435, 0.018, "times uniform; grey: not known", fontsize=8.5)
    return figure


def thing_word(sample, prior: MotionPrior) -> int:
    """The last word of the first thing that the question names, as the ground truth has it ("disc" of "green disc")."""
    mentions = load_truth(world()).mentions(sample.video.name, sample.question)
    mention = next(mention for mention in mentions if not mention.moving)
    return max(n for n, word in enumerate(prior.words) if word.start < mention.end and mention.start < word.end)


def draw_heads(prior: MotionPrior, layers: int) -> Figure:
    """DFC, TCS, DSR and their sum of every head, the selected half outlined."""
    scores = prior.provenance["head_scores"]
    selected = np.reshape(scores["selected"], (layers, -1))
    figure = Figure(figsize=(9.4, 3.3), dpi=110, facecolor="white", layout="constrained")
    titles = {"dfc": "DFC: energy on / off", "tcs": "TCS: frames in a run", "dsr": "DSR: share above mean", "score": "sum"}
    for axes, (name, title) in zip(figure.subplots(1, 4), titles.items(), strict=True):
        values = np.reshape(scores[name], (layers, -1))
        image = axes.imshow(values, cmap="viridis", aspect="auto")
        for layer, head in zip(*np.nonzero(selected), strict=True):
            axes.add_patch(Rectangle((head - 0.46, layer - 0.46), 0.92, 0.92, fill=False, edgecolor="white", linewidth=1.8))
        axes.set(title=title, xlabel="head", ylabel="layer" if name == "dfc" else "", xticks=range(values.shape[1]))
        axes.title.set_fontsize(10)
        figure.colorbar(image, ax=axes, shrink=0.85).ax.tick_params(labelsize=8)
    return figure


def draw_cells(sample, clip: Clip, prior: MotionPrior) -> Figure:
    """One frame under the teacher's cells, the codec's motion vectors, and the student's visual tokens."""
    student = load_student(student_path("world"))
    shown = read_clip(sample.video, Sampling(frames=8))
    encoding = student.encode([shown], [student.prompt(sample.question).text])
    grids, _ = student.grids(encoding.inputs, [shown])
    field = read_motion(sample.video)
    row = len(field.times) // 2
    frame = clip.frames[len(clip.frames) // 2]
    figure = Figure(figsize=(9.4, 3.5), dpi=110, facecolor="white", layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (title, grid) in zip((panels[0], panels[2]), (("teacher", prior.grid), ("student", grids[0])), strict=True):
        axes.imshow(frame, interpolation="nearest", extent=(0, 1, 1, 0))
        draw_grid(axes, grid)
        axes.set_title(f"{title}: {grid.frames} × {grid.rows} × {grid.columns} cells", fontsize=10)
    panels[1].imshow(drawn(frame, field, row), interpolation="nearest")
    panels[1].set_title(f"codec: {field.validity.shape[1]} × {field.validity.shape[2]} blocks a frame", fontsize=10)
    for axes in panels:
        axes.set(xticks=[], yticks=[])
    return figure


def draw_grid(axes, grid: TokenGrid) -> None:
    for edge in grid.row_edges.tolist():
        axes.axhline(edge, color="white", linewidth=0.8)
    for edge in grid.column_edges.tolist():
        axes.axvline(edge, color="white", linewidth=0.8)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
