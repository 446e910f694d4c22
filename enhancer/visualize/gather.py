"""From a prior, or from a video and a text, to what a page shows of it: the files' content, and what models say anew.

A prior's file holds the maps of its own words and its heads' scores. Everything else is asked of the teacher and of the
students again where they and the clip are at hand; where not, the view says what is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from enhancer.adapters.opening import is_adapter, open_adapter
from enhancer.adapters.reading import ClipReader
from enhancer.console import Console
from enhancer.data.samples import Sample
from enhancer.recipe import option
from enhancer.recipe_schema import StudentSettings, TeacherSettings
from enhancer.shipped import quiet_libraries, student_path, teacher_path, torch_device
from enhancer.video.clip import Clip, read_clip
from enhancer.visualize.codec import codec_view
from enhancer.visualize.look_again import look_again
from enhancer.visualize.stored import settings_of, stored_view
from enhancer.visualize.students import student_maps
from enhancer.visualize.views import SOURCE, TEACHER, TRUTH, ClipView, MapSet, density
from enhancer.world import load_truth
from vdm_priors.errors import UserError
from vdm_priors.extract import ExtractionSettings, extract_priors
from vdm_priors.fingerprint import fingerprint
from vdm_priors.prior import MotionPrior
from vdm_priors.words import Word

SAME_TIME = 1e-3  # seconds
SCENES = "scenes.jsonl"  # what makes a folder a world


@dataclass
class VisualizeKeys:
    """The keys that may be changed on the command line."""

    teacher: TeacherSettings = option(TeacherSettings())
    student: StudentSettings = option(StudentSettings())
    device: str = option(
        "auto", "where models compute: auto takes a GPU if there is one", pattern="auto|cpu|mps|cuda(:[0-9]+)?"
    )
    threads: int = option(1, "CPU threads", min=1, max=1024)


@dataclass
class Gatherer:
    """Brings together what is known of clips. ask: whether models are loaded; students: (name on the page, model)."""

    keys: VisualizeKeys
    console: Console
    ask: bool = True
    teacher: str | None = None
    students: list[tuple[str, str]] = field(default_factory=list)
    share: float = 1.0  # of a page, for each clip

    # ---- entries ---------------------------------------------------------------------------------

    def of_video(self, video: Path, text: str) -> ClipView:
        """A video and a text: the prior is made first. Raises UserError where the teacher cannot make one."""
        from vdm_priors.families import trained_frames

        name = self.teacher or self.keys.teacher.model
        sampling = self.keys.teacher.sampling
        if sampling.frames is None:
            sampling = replace(sampling, frames=trained_frames(teacher_path(name)))
        clip = read_clip(video, sampling.sampling())  # a bad file is told before a model loads
        settings = self.keys.teacher.extraction
        with self.console.bar("making the prior", settings.steps, "step") as bar:
            made = extract_priors(
                self.load_teacher(name),
                [clip],
                [text],
                replace(settings, reconstruction=False),
                size=self.size(),
                on_step=lambda phase, step, steps: bar(step + 1, steps, phase),
            )
        return self.view(made[0], clip, video, name, settings, Sample(video.name, video, text, "NA"))

    def of_prior(self, path: Path, video: Path | None) -> ClipView:
        """A prior's file; `video`: its clip, if it is at hand. Raises StoreError for a file that is no prior."""
        prior = MotionPrior.load(path)
        recorded = prior.provenance.get("video") or ""
        view_of = functools.partial(self.view, prior, name=path.stem)
        if video is None:
            view = view_of(None, None, None, None, None)
            view.video = str(recorded)
            view.lacks(
                "clip",
                f"The clip is not at hand: a prior's file holds no pictures{f' ({recorded})' if recorded else ''}. "
                f"Give it with --video FILE.",
            )
            return view
        settings = settings_of(prior)
        clip = self.clip_of(prior, video)
        view = view_of(
            clip,
            video,
            self.teacher_of(prior, self.keys.teacher.model),
            settings,
            Sample(path.stem, video, prior.text, "NA"),
        )
        if clip is None:
            seconds = prior.provenance.get("seconds") or []
            view.lacks(
                "clip",
                f"{video.name} has no frames at the prior's seconds ({_listed(seconds)}): it is another clip, or was "
                f"sampled otherwise; set teacher.sampling.",
            )
        return view

    # ---- one clip --------------------------------------------------------------------------------

    def view(
        self,
        prior: MotionPrior,
        clip: Clip | None,
        video: Path | None,
        teacher: str | None,
        settings: ExtractionSettings | None,
        sample: Sample | None,
        name: str = "",
    ) -> ClipView:
        """All that can be shown of a prior. teacher: the model that may be asked again, None for none."""
        view = stored_view(prior, name or (video.name if video else ""))
        if clip is not None:
            view.frames, view.times = clip.frames, [float(t) for t in clip.times]
            view.facts += [("note", note) for note in clip.notes]
        if video is not None:
            view.video = str(video)
            self.add_codec(view, video, clip)
        if prior.provenance.get("source") == "vdm" and self.ask:
            self.add_look(view, prior, clip, teacher, settings)
        elif prior.provenance.get("source") == "vdm":
            view.lacks(
                "heads",
                "Attention of single heads, steps and layers is not in a prior's file, and no model was asked again.",
            )
        if video is not None:
            self.add_truth(view, prior, video)
        if sample is not None and clip is not None and self.ask:
            for shown, model in self.students:
                self.add_student(view, prior, sample, shown, model)
        order = [TRUTH, SOURCE, TEACHER, "student"]
        view.maps.sort(key=lambda one: order.index(one.kind))
        return view

    def add_look(
        self,
        view: ClipView,
        prior: MotionPrior,
        clip: Clip | None,
        teacher: str | None,
        settings: ExtractionSettings | None,
    ) -> None:
        """Steps, layers, heads and inversion, from the teacher."""
        if clip is None or teacher is None or settings is None:
            why = "the clip" if clip is None else "the prior's teacher" if teacher is None else "what its settings mean"
            view.lacks(
                "heads",
                f"Attention of single heads, steps and layers is not in a prior's file, and {why} is not at hand to "
                f"ask the teacher again.",
            )
            return
        try:
            with self.console.bar("asking the teacher again", settings.steps, "step") as bar:
                look = look_again(
                    self.load_teacher(teacher),
                    clip,
                    prior,
                    settings,
                    size=self.size(),
                    share=self.share,
                    on_step=lambda phase, step, steps: bar(step + 1, steps, phase),
                )
        except UserError as error:
            view.lacks("heads", f"The teacher could not be asked again: {error}")
            return
        own = {(word.start, word.end): n for n, word in enumerate(view.words)}
        view.words = look.words
        for one in view.maps:  # stored maps of the words that the text has now
            spread = np.full((len(look.words), *one.maps.shape[1:]), np.nan, np.float32)
            for n, word in enumerate(look.words):
                if (word.start, word.end) in own:
                    spread[n] = one.maps[own[word.start, word.end]]
            one.maps = spread
        view.maps = [one for one in view.maps if one.kind != TEACHER] + [look.maps]
        view.heads, view.inversion = look.heads, look.inversion

    def add_truth(self, view: ClipView, prior: MotionPrior, video: Path) -> None:
        """The world's evidence of each word, where the clip is one of a world's and the text one of the clip's."""
        try:
            words = [Word(word.text, word.start, word.end) for word in view.words]
            mass = load_truth(video.parent.parent).evidence(video.name, prior.text, words, prior.grid)
        except UserError as error:
            if (video.parent.parent / SCENES).is_file():  # a clip of no world has no ground truth to miss
                view.lacks("maps", f"No ground truth: {error}")
            return
        view.maps = [one for one in view.maps if one.kind != TRUTH]
        view.maps.append(
            MapSet(
                "ground truth",
                TRUTH,
                prior.grid,
                density(mass.numpy(), prior.grid),
                note="pixels of what the word names",
            )
        )

    def add_student(self, view: ClipView, prior: MotionPrior, sample: Sample, name: str, model: str) -> None:
        """A student's attention to the words; takes the place of a stored map of the same name."""
        try:
            student, reader = self.load_student(model)
            if reader is None:
                clip = read_clip(sample.video, self.keys.student.sampling.sampling())
            else:
                clip = reader.get(sample.video)
            found = student_maps(student, name, sample, clip, prior, view.words)
        except UserError as error:
            view.lacks("maps", f"{name}: {error}")
            return
        view.maps = [one for one in view.maps if one.name != name] + [found]

    def add_codec(self, view: ClipView, video: Path, clip: Clip | None) -> None:
        """What the file's stream says of motion, at the sampled times."""
        times = view.times or [0.0]
        step = (times[-1] - times[0]) / max(len(times) - 1, 1) if clip is not None else 1.0
        try:
            view.codec = codec_view(video, times, step)
        except UserError as error:
            view.lacks("codec", str(error))

    # ---- models and clips ------------------------------------------------------------------------

    def size(self) -> tuple[int, int] | None:
        """Height and width that the teacher resizes clips to."""
        return tuple(self.keys.teacher.size) if self.keys.teacher.size else None

    def teacher_of(self, prior: MotionPrior, recorded: str | None) -> str | None:
        """Which model to ask about a prior: --teacher, else `recorded` (a recipe's) or the shipped one, if it made
        the prior.

        A hub's model is asked only if --teacher names it: nobody wants gigabytes loaded for a picture unasked.
        """
        made_by = prior.provenance.get("fingerprint")
        for name in (self.teacher,) if self.teacher else (recorded, "world"):
            try:
                path = teacher_path(name) if name else ""
                if path and (self.teacher or Path(path).is_dir()) and fingerprint(path) == made_by:
                    return name
            except UserError:
                continue
        return None

    def clip_of(self, prior: MotionPrior, video: Path) -> Clip | None:
        """The prior's frames of the video; None if there are none at its seconds. Raises ClipError."""
        seconds = prior.provenance.get("seconds") or []
        asked = self.keys.teacher.sampling
        count = asked.frames or (prior.provenance.get("sampling") or {}).get("frames") or len(seconds) or 8
        clip = read_clip(video, replace(asked, frames=count).sampling())
        times = clip.seconds
        same = len(times) == len(seconds) and all(abs(a - b) < SAME_TIME for a, b in zip(times, seconds, strict=True))
        return clip if same or not seconds else None

    def load_teacher(self, name: str) -> Any:
        """Loaded once. Raises ModelError."""
        return _loaded(self._teacher, name)

    def load_student(self, name: str) -> tuple[Any, ClipReader | None]:
        """One at a time, and how a codec adapter's clips are read. Raises ModelError."""
        return _loaded(self._student, name)

    def _teacher(self, name: str) -> Any:
        from vdm_priors.families import load_teacher

        quiet_libraries()
        torch.set_num_threads(self.keys.threads)
        self.console.note(f"loading the teacher {name}")
        asked = self.keys.teacher
        return load_teacher(
            teacher_path(name), getattr(torch, asked.dtype), torch_device(self.keys.device), asked.offload
        )

    def _student(self, name: str) -> tuple[Any, ClipReader | None]:
        from vlm_hooks.families import load_student

        quiet_libraries()
        torch.set_num_threads(self.keys.threads)
        self.console.note(f"loading the student {name}")
        loading = {"dtype": getattr(torch, self.keys.student.dtype), "device": torch_device(self.keys.device)}
        if is_adapter(name):
            model, reader = open_adapter(Path(name), **loading)
            return model.student, reader
        student = load_student(student_path(name), **loading)
        student.model.eval()
        return student, None


_held: dict[str, tuple[Any, str, Any]] = {}  # the last model of each kind


def _loaded(load: Callable[[str], Any], name: str) -> Any:
    kind = load.__name__
    if kind not in _held or _held[kind][:2] != (load.__self__.keys, name):
        _held.pop(kind, None)  # before the next one is loaded: they may not fit together
        _held[kind] = (load.__self__.keys, name, load(name))
    return _held[kind][2]


def _listed(seconds: list[float]) -> str:
    shown = ", ".join(f"{t:.2f}" for t in seconds[:6])
    return shown + (", …" if len(seconds) > 6 else "") if seconds else "which it does not say"
