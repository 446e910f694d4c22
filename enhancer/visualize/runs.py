"""From a run folder to the views of a few of its clips, whatever of the folder is there.

A run that is half-finished, was moved, comes from an older version or has lost its clips gives views of what is left;
each says what is missing. Nothing here raises for a gap in a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from enhancer.data.samples import Sample
from enhancer.report.claims import number
from enhancer.report.examples import Example, read_examples
from enhancer.report.run_folder import label
from enhancer.shipped import student_path
from enhancer.visualize.gather import Gatherer
from enhancer.visualize.run_source import Source, find_video, read_run, stores
from enhancer.visualize.stored import settings_of
from enhancer.visualize.students import stored_maps
from enhancer.visualize.views import STUDENT, TRUTH, ClipView, InversionView
from vdm_priors.errors import UserError
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vdm_priors.words import Word

BEFORE = "base"
OTHER_JOBS = {  # runs that keep no clips of their own, and what to look at instead
    "compare": "{folder} is a comparison, which keeps tables and no clips: its page is {folder}/report.html. Give the "
    "folder of one run, or the file of a prior in the matrix's pool.",
    "adapter": "{folder} is a codec adapter's run, which has no priors. Its models are shown beside a teacher's maps by "
    "enhancer visualize --video FILE --text TEXT --student {folder}/stages/NAME/model",
}


def of_run(folder: Path, gatherer: Gatherer, samples: list[str], count: int) -> list[ClipView]:
    """Views of the run's examples, or of its first priors where it has none. samples: ids to show instead.

    Raises UserError for a sample that the run does not have, and where nothing of the run can be shown.
    """
    source = read_run(folder)
    gatherer.keys.teacher = source.teacher or gatherer.keys.teacher
    gatherer.keys.student = source.student or gatherer.keys.student
    students = gatherer.students or _students(source) if gatherer.ask else []
    gatherer.students = []
    examples = read_examples(source.run.examples, source.run.missing)
    source.gaps += [(m.section, m.sentence) for m in source.run.missing if m.section == "examples"]
    by_id = {str(example.meta.get("sample_id", example.name)): example for example in examples}
    rows = {str(row.get("sample_id")): row for row in source.run.priors if row.get("source") in ("vdm", None)}
    rows = rows or {str(row.get("sample_id")): row for row in source.run.priors}
    unknown = [name for name in samples if name not in by_id and name not in rows]
    if unknown:
        listed = ", ".join([*by_id, *rows][:8])
        raise UserError(f"{folder} has no sample {', '.join(unknown)}; it has {listed or 'none'}.")
    wanted = samples or list(by_id)[:count] or list(rows)[:count]
    gatherer.share = 1 / max(len(wanted), 1)
    views: list[ClipView] = []
    asked: list[tuple[ClipView, MotionPrior, Sample]] = []  # clips that students can be asked about
    for name in wanted:
        gatherer.console.note(f"clip {name}")
        view = (
            _of_example(by_id[name], source, gatherer, asked)
            if name in by_id
            else _of_row(rows[name], source, gatherer, asked)
        )
        if view is not None:
            views.append(view)
    for shown, model in students:  # one student in memory at a time
        for view, prior, sample in asked:
            gatherer.add_student(view, prior, sample, shown, model)
    for view in views:
        kinds = [TRUTH, "source", "teacher", STUDENT]
        view.maps.sort(key=lambda one: (kinds.index(one.kind), one.name != _before()))
        for section, sentence in dict.fromkeys(source.gaps):
            view.lacks(section, sentence)
    if not views:
        gaps = " ".join(sentence for _, sentence in source.gaps) or "It holds neither examples nor priors."
        raise UserError(
            OTHER_JOBS[source.job].format(folder=folder)
            if source.job in OTHER_JOBS
            else f"Nothing of {folder} can be shown. {gaps} Give a run's folder, or run the recipe again: it continues."
        )
    return views


def _of_row(row: dict, source: Source, gatherer: Gatherer, asked: list) -> ClipView | None:
    """A sample of priors.json: its prior and its clip."""
    name, key = str(row.get("sample_id")), str(row.get("key"))
    prior = None
    for store in stores(source):
        path = store / key[:2] / f"{key}.safetensors"
        try:
            prior = MotionPrior.load(path) if path.is_file() else prior
        except UserError as error:
            source.gaps.append(("maps", f"{name}: {error}"))
    if prior is None:
        source.gaps.append(("maps", f"{name}: its prior {key} is in none of the run's stores."))
        return None
    video = find_video(str(row.get("video") or ""), source)
    question = str(row.get("question") or prior.text)
    view = _view(prior, name, str(row.get("video") or ""), video, question, "NA", source, gatherer, asked)
    view.lacks("maps", "No attention of the students is stored for this clip: the run kept no example of it.")
    return view


def _of_example(example: Example, source: Source, gatherer: Gatherer, asked: list) -> ClipView | None:
    """A clip of examples/: what its file holds, and on top of it what models say anew."""
    meta = example.meta
    name = str(meta.get("sample_id", example.name))
    prior = _prior_of(example)
    if prior is None:
        source.gaps.append(("examples", f"{name}: its file holds no prior that can be read."))
        return None
    video = find_video(str(meta.get("video") or ""), source)
    view = _view(
        prior,
        name,
        str(meta.get("video") or ""),
        video,
        str(meta.get("question", "")),
        str(meta.get("answer", "")),
        source,
        gatherer,
        asked,
        _stored(example),
    )
    tensors = example.tensors
    if view.frames is None:
        view.frames, view.times = tensors["frames"], [number(t) or 0.0 for t in meta.get("times", [])]
    if view.inversion is None and "reconstruction" in tensors:
        view.inversion = InversionView(
            tensors["frames"],
            tensors.get("inverted"),
            tensors["reconstruction"],
            number(meta.get("psnr_db")),
            number(meta.get("latent_relative_l2")),
        )
    return view


def _view(
    prior: MotionPrior,
    name: str,
    recorded: str,
    video: Path | None,
    question: str,
    answer: str,
    source: Source,
    gatherer: Gatherer,
    asked: list,
    stored: Any = None,
) -> ClipView:
    clip, sample, teacher = None, None, None
    problem = (
        f"The clip {recorded or '(not recorded)'} is not there: not where the run read it, nor beside the run."
        if video is None
        else ""
    )
    if video is not None:
        sample = Sample(name, video, question, answer or "NA")
        try:
            clip = gatherer.clip_of(prior, video)
            problem = (
                ""
                if clip is not None
                else f"{video.name} is another clip than the prior's, or is sampled otherwise now."
            )
        except UserError as error:
            problem = str(error)
        if clip is None:
            sample = None
    if prior.provenance.get("source") == "vdm" and gatherer.ask:
        teacher = gatherer.teacher_of(prior, source.teacher.model if source.teacher else None)
    view = gatherer.view(prior, clip, video, teacher, settings_of(prior), None, name)
    if sample is not None:
        asked.append((view, prior, sample))
    view.question, view.answer = question, answer
    view.video = view.video or recorded
    if problem:
        view.lacks("clip", problem)
    if stored is not None:
        shown = {one.name for one in view.maps}
        view.maps += [one for one in stored(view) if one.name not in shown]
    return view


def _prior_of(example: Example) -> MotionPrior | None:
    """The prior as the example's file tells it: its words are those that its provenance says were selected."""
    meta = example.meta
    name = next((key for key in example.tensors if key.startswith("prior/")), None)
    facts = meta.get("prior_provenance") if isinstance(meta.get("prior_provenance"), dict) else {}
    try:
        maps = torch.from_numpy(example.tensors[name]).float()
        grid = TokenGrid.from_dict(meta["grids"]["prior"])
        scored = [row for row in facts.get("word_scores") or [] if row.get("selected")]
        question, answer = str(meta.get("question", "")), str(meta.get("answer", ""))
        for text in (question, answer, f"{question}\n{answer}"):
            words = _words_in(text, scored, meta.get("words") or [])
            if words is not None and len(words) == len(maps):
                prior = MotionPrior(
                    text, words, maps, grid, torch.ones(len(words)), {"source": name.split("/")[1], **facts}
                )
                prior.validate()
                return prior
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return None


def _words_in(text: str, scored: list[dict], names: list[Any]) -> list[Word] | None:
    """Where the prior's words stand in a text: as the scores say, or else in the order of their names."""
    if scored:
        words = [Word(row["text"], row["start"], row["end"]) for row in scored]
        return words if all(text[word.start : word.end] == word.text for word in words) else None
    words, after = [], 0
    for name in names:
        start = text.find(str(name), after)
        if start < 0:
            return None
        words.append(Word(str(name), start, start + len(str(name))))
        after = words[-1].end
    return words


def _stored(example: Example) -> Any:
    """The maps of an example's file that models do not give anew, made for the words of a view."""

    def maps(view: ClipView) -> list[Any]:
        places = [n for n, word in enumerate(view.words) if word.selected]
        found = []
        for key, tensor in example.tensors.items():
            kind, _, arm = key.partition("/")
            if kind not in ("attention", "truth") or len(tensor) != len(places):
                continue
            try:
                grid = TokenGrid.from_dict(example.meta["grids"]["attention"])
                name = "ground truth" if kind == "truth" else student_name(arm)
                found.append(
                    stored_maps(
                        name,
                        TRUTH if kind == "truth" else STUDENT,
                        grid,
                        tensor,
                        places,
                        len(view.words),
                        "as the run stored it",
                    )
                )
            except (KeyError, TypeError, ValueError):
                view.lacks("maps", f"{key}: no grid fits it.")
        return found

    return maps


def student_name(arm: str) -> str:
    """What a student is called on the page."""
    return _before() if arm == BEFORE else f"after: {label(arm)}"


def _before() -> str:
    return f"before: {label(BEFORE)}"


def _students(source: Source) -> list[tuple[str, str]]:
    """The base model and the first seed of every arm whose models are folders on this machine."""
    found = []
    try:
        if source.student is not None and Path(student_path(source.student.model)).is_dir():
            found.append((student_name(BEFORE), source.student.model))
    except UserError as error:
        source.gaps.append(("maps", f"{student_name(BEFORE)}: {error}"))
    for arm in source.arms or list(source.run.arms):
        models = [source.folder / "arms" / arm / f"seed{seed.seed}" / "model" for seed in source.run.arms.get(arm, [])]
        trained = [model for model in models if model.is_dir()]
        if trained:
            found.append((student_name(arm), str(trained[0])))
        else:
            source.gaps.append(("maps", f"{student_name(arm)}: no trained model of it in arms/{arm}."))
    return found
