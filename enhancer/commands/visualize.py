"""`enhancer visualize PRIOR|RUN|--video FILE --text …`: a page, pictures for papers, the paper's figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from enhancer.console import Console
from enhancer.recipe import build
from enhancer.recipe_files import apply_override
from enhancer.visualize.drawing import best_word, not_drawn
from enhancer.visualize.figures import RATIOS, STEPS, draw_figure, first_places
from enhancer.visualize.gather import Gatherer, VisualizeKeys
from enhancer.visualize.look_again import look_again
from enhancer.visualize.page import write_page
from enhancer.visualize.pieces import write_pieces
from enhancer.visualize.run_source import find_video, prior_beside_run
from enhancer.visualize.runs import of_run
from enhancer.visualize.stored import settings_of
from enhancer.visualize.students import stored_maps
from enhancer.visualize.views import TEACHER, ClipView, HeadsView, MapSet
from vdm_priors.errors import UserError
from vdm_priors.extract import ExtractionSettings, extract_priors
from vdm_priors.prior import MotionPrior

NOTE = (
    "Maps are attention as density: 1× is what an even spread would have. "
    "Attention shows where a model looks, not that it understands what it sees."
)
LARGE = 15_000_000  # bytes of a page


def visualize_clips(
    what: Path | None,
    video: Path | None,
    text: str | None,
    teacher: str | None,
    students: list[str],
    samples: list[str],
    clips: int,
    ask: bool,
    word: str | None,
    figure: int | None,
    pieces: Path | None,
    out: Path,
    overrides: list[str],
    console: Console,
) -> Path:
    """Writes the page (or one figure), and pieces where asked for; returns the page's or the figure's path."""
    raw: dict = {}
    for override in overrides:
        apply_override(raw, override)
    gatherer = Gatherer(
        build(VisualizeKeys, raw, "the keys on the command line"),
        console,
        ask,
        teacher,
        [(f"student: {name}" if len(students) > 1 else "student", name) for name in students],
    )
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}.")
    if what is not None and what.is_dir() and (video is not None or text is not None):
        raise UserError(f"{what} is a run, which has its own clips: leave out --video and --text, or leave out the run.")
    if samples and not (what is not None and what.is_dir()):
        raise UserError("--sample names a sample of a run: give the run's folder, or leave it out.")
    views, title = _views(what, video, text, samples, 1 if figure is not None else clips, gatherer)
    if (figure is not None or pieces is not None) and (boxes := not_drawn("".join(view.text for view in views))):
        console.warn(f"the pictures' font has no {' '.join(boxes)}, and draws boxes for it; the page shows it")
    if figure is not None:
        return _figure(figure, views[0], gatherer, word, out, console)
    if word is not None and not any(one.text == word for view in views for one in view.words):
        best_word(views[0], word)
    write_page(views, out, title, NOTE, word)
    for view in views:
        for section, sentence in view.missing:
            console.warn(f"{view.name}, {section}: {sentence}")
    size = out.stat().st_size
    if size > LARGE:
        console.warn(f"the page has {size / 1e6:.1f} MB; fewer --clips make it smaller")
    console.print(
        f"page: {out} ({size / 1e6:.1f} MB, {len(views)} clip{'s' if len(views) > 1 else ''})",
        markup=False,
        soft_wrap=True,
    )
    if pieces is not None:
        for view in views:
            folder = (
                pieces
                if len(views) == 1
                else pieces / "".join(c if c.isalnum() or c in "-_" else "_" for c in view.name)
            )
            made, missing = write_pieces(view, folder, word if any(one.text == word for one in view.words) else None)
            console.print(f"pieces: {len(made)} in {folder}", markup=False, soft_wrap=True)
            for sentence in missing:
                console.warn(f"{view.name}: {sentence}")
    return out


def _views(
    what: Path | None, video: Path | None, text: str | None, samples: list[str], clips: int, gatherer: Gatherer
) -> tuple[list[ClipView], str]:
    if what is None:
        if video is None or not (text or "").strip():
            raise UserError("Give a prior's file, a run folder, or --video FILE with --text TEXT.")
        return [gatherer.of_video(video, text.strip())], video.name
    if what.is_dir():
        return of_run(what, gatherer, samples, clips), f"Run {what.resolve().name}"
    if not what.exists():
        raise UserError(f"There is no prior's file or run folder {what}. Check the path.")
    if text is not None:
        raise UserError(
            f"{what} is a prior, of a text of its own: leave out --text, or give --video and --text without the prior."
        )
    beside = prior_beside_run(what) if video is None else None
    if beside is not None:
        source, row = beside
        video = find_video(str(row.get("video") or ""), source)
        if source.teacher is not None:
            gatherer.keys.teacher = source.teacher
    return [gatherer.of_prior(what, video)], f"Prior {what.stem}"


def _figure(number: int, view: ClipView, gatherer: Gatherer, word: str | None, out: Path, console: Console) -> Path:
    """One of the paper's figures; what it needs of the teacher is asked for here."""

    def at_hand() -> tuple[MotionPrior, ExtractionSettings, str, Path]:
        grid = (
            view.maps[-1].grid
            if not any(one.kind == TEACHER for one in view.maps)
            else next(one.grid for one in view.maps if one.kind == TEACHER)
        )
        prior = MotionPrior(view.text, [], torch.zeros(0, *grid.shape), grid, torch.ones(0), view.provenance)
        settings, video = settings_of(prior), Path(view.video)
        name = (
            gatherer.teacher_of(prior, gatherer.keys.teacher.model) if view.provenance.get("source") == "vdm" else None
        )
        if settings is None or name is None or view.frames is None or not video.is_file():
            raise UserError(
                f"Figure {number} asks the prior's teacher about the clip, and one of the two is not at hand. Give "
                f"--teacher, and --video for a prior's file."
            )
        return prior, settings, name, video

    def variants() -> dict[str, MapSet]:
        prior, settings, name, video = at_hand()
        clip, found = gatherer.clip_of(prior, video), {}
        asked = [(steps, 0.5) for steps in STEPS] + [(5, ratio) for ratio in RATIOS if ratio != 0.5]
        with console.bar("figure 1", len(asked), "extraction") as bar:
            for steps, ratio in asked:
                changed = replace(
                    settings,
                    steps=steps,
                    head_ratio=ratio,
                    head_selection=True,
                    token_selection=False,
                    words="all",
                    reconstruction=False,
                )
                made = extract_priors(gatherer.load_teacher(name), [clip], [view.text], changed, size=gatherer.size())[
                    0
                ]
                places = [next(n for n, one in enumerate(view.words) if one.start == w.start) for w in made.words]
                label = f"{steps} steps, {ratio:.0%} of heads"
                found[label] = stored_maps(label, TEACHER, made.grid, made.maps.numpy(), places, len(view.words))
                bar.advance()
        return found

    def near() -> HeadsView:
        prior, settings, name, video = at_hand()
        grid = prior.grid
        return look_again(
            gatherer.load_teacher(name),
            gatherer.clip_of(prior, video),
            prior,
            settings,
            size=gatherer.size(),
            shown_places=first_places(grid.rows, grid.columns),
        ).heads

    stem = out.with_suffix("") if out.suffix in (".html", ".png", ".svg") else out
    stem = stem.with_name(f"figure{number}") if out == Path("visualize.html") else stem
    paths = draw_figure(number, view, stem, word, variants, near)
    console.print(f"figure {number}: {', '.join(map(str, paths))}", markup=False, soft_wrap=True)
    return paths[0]
