"""The keys of the main job's recipe (`job: enhance`), each with its effect and limits.

The settings of the layers below are their own dataclasses: teacher.extraction is
vdm_priors.settings.ExtractionSettings, training is enhancer.training.TrainSettings, world is
enhancer.world.WorldSettings.
"""

from __future__ import annotations

from dataclasses import dataclass

from enhancer.data.samples import FORMATS
from enhancer.parts_of_speech import PARTS
from enhancer.recipe import option
from enhancer.sources import SourceSpec, source_names
from enhancer.training import TrainSettings
from enhancer.video.clip import Sampling
from enhancer.world import WorldSettings
from vdm_priors.errors import RecipeError
from vdm_priors.settings import ExtractionSettings

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
CONTROL = "none"  # the source of the λ = 0 arm: no prior, the answer loss alone
WRAPPING = ("shuffled", "uniform")  # sources that spoil another one's priors
OWN_SOURCES = tuple(name for name in source_names() if name not in (*WRAPPING, "ensemble"))  # made from nothing else
PLACES_ALONE = tuple(name for name in OWN_SOURCES if name not in ("vdm", "oracle"))  # they know no words
GATES = ("none", "agreement")


@dataclass
class SamplingSettings:
    """Which frames of a clip are decoded."""

    frames: int = option(8, "frames taken from a clip, evenly spaced; with fps: at most this many", min=2, max=4096)
    fps: float | None = option(None, "frames per second to take; null spreads `frames` over the whole span", min=0.01, max=240)
    start: float = option(0.0, "where the span begins, in seconds", min=0)
    end: float | None = option(None, "where the span ends, in seconds; null is the end of the clip", min=0)
    short: str = option("repeat", "a clip with too few frames: repeat shows the last one again, fail leaves the sample out",
                        choices=("repeat", "fail"))

    def __post_init__(self) -> None:
        self._of(self.frames or 1)  # refuses an end before the start

    def sampling(self) -> Sampling:
        """The value that `read_clip` takes."""
        return self._of(self.frames)

    def _of(self, frames: int) -> Sampling:
        return Sampling(frames=frames, fps=self.fps, start=self.start, end=self.end, short=self.short)


@dataclass
class TeacherSamplingSettings(SamplingSettings):
    """Which frames of a clip the teacher sees."""

    frames: int | None = option(None, "frames taken from a clip, evenly spaced; with fps: at most this many; null is the number "
                                      "that the teacher was trained on", min=2, max=4096)

    def sampling(self) -> Sampling:
        """The value that `read_clip` takes; null was replaced before (pipeline.with_own_frames)."""
        assert self.frames is not None, "the teacher's own number of frames must be filled in first"
        return super().sampling()


@dataclass
class DataSettings:
    """Where questions and clips are."""

    root: str | None = option(None, "folder of the data; video paths are relative to it. null with `world` set: "
                                    "<output>/worlds/<hash of the world's settings>")
    train: str = option("train.json", "file of training samples, relative to root")
    test: str = option("test.json", "file of multiple-choice test questions, relative to root")
    format: str = option("auto", "how the rows are written; auto tells it by each row's keys", choices=FORMATS)
    timeout: float | None = option(
        60.0, "seconds that decoding a clip, or reading its codec's motion, may take, in a process of its own; one that "
              "takes longer, or crashes it, is left out, listed in the run folder's quarantine.jsonl "
              "(quarantine_motion.jsonl) and not tried again in this run; null decodes in the run's own process, without "
              "a limit", min=0.1, max=86400)
    limit_train: int | None = option(None, "use only this many training samples; null uses all", min=1)
    limit_test: int | None = option(None, "ask only this many test questions; null asks all", min=1)


@dataclass
class TeacherSettings:
    """The video diffusion model and how priors are taken from it."""

    model: str = option("world", "the teacher: `world` is the small one shipped, else a diffusers folder or hub name")
    dtype: str = option("float32", "number type of the weights; bfloat16 halves memory",
                        choices=("float32", "bfloat16", "float16"))
    text: str = option("question", "which text conditions the teacher",
                       choices=("question", "answer", "question_answer"))
    sampling: TeacherSamplingSettings = option(TeacherSamplingSettings())
    size: list[int] | None = option(None, "height and width in pixels that clips are resized to; null is the teacher's own "
                                          "size", min=8, max=4096)
    fit: str = option("resize", "a clip whose frames have another size than the teacher takes (size): resize scales them whole, "
                                "refuse leaves the sample out", choices=("resize", "refuse"))
    batch_size: int = option(8, "clips extracted together; more is faster and takes more memory", min=1, max=1024)
    offload: bool = option(False, "true keeps text encoders and VAE in main memory, and brings them to the GPU while they work: "
                                  "less of its memory, a few seconds a batch")
    store: str | None = option(None, "folder of the prior store, to share it between runs; null is <run folder>/priors")
    extraction: ExtractionSettings = option(ExtractionSettings())


@dataclass
class NamedTeacherSettings(TeacherSettings):
    """A further teacher, which arms and ensembles call by its name; its priors go to the store of `teacher`."""

    name: str = option(help="what `teacher` of an arm and `members` of an ensemble call it", pattern=NAME)


@dataclass
class SourcesSettings:
    """The motion sources that need no model."""

    camera: str = option("remove", "codec and flow: remove takes the camera's own motion away, frame by frame, where anything "
                                   "moves beside it; keep leaves it in, for questions about the camera",
                         choices=("remove", "keep"))
    words: list[str] = option(
        ["content"], "which words of a text share the map of a source that tells places alone (codec, residual, flow, "
                     "frame_difference): content is all but grammar; vdm those that the teacher's prior of the clip has, "
                     "which is made first; or parts of speech, by a list for English: noun, verb, adjective, adverb, number",
        choices=("content", "vdm", *PARTS))

    def __post_init__(self) -> None:
        rules = {"content", "vdm"} & set(self.words)
        if not self.words or len(set(self.words)) < len(self.words) or rules and len(self.words) > 1:
            raise RecipeError(f"words must be [content], [vdm], or one or more different parts of speech, not "
                              f"{self.words}")


@dataclass
class StudentSettings:
    """The vision-language model that is fine-tuned."""

    model: str = option("world", "the student: `world` is the small one shipped, else a transformers folder or hub name")
    dtype: str = option("float32", "number type of the weights; bfloat16 halves memory",
                        choices=("float32", "bfloat16", "float16"))
    sampling: SamplingSettings = option(SamplingSettings(frames=8))


@dataclass
class ArmSettings:
    """One fine-tuned student: which prior it is aligned to and how strongly."""

    name: str = option(help="the arm's folder and row in the table; `lambda0`, `vdm`, `shuffled`, `uniform`, `oracle` "
                            "get their usual labels", pattern=NAME)
    source: str = option(CONTROL, "where the prior comes from; none trains on the answers alone (λ = 0)",
                         choices=(CONTROL, *source_names()))
    weight: float | None = option(None, "λ of this arm; null takes training.alignment.weight", min=0, max=1e6)
    base: str = option("vdm", "for shuffled and uniform: the source whose words (and maps) they spoil",
                       choices=tuple(n for n in source_names() if n not in WRAPPING))
    teacher: str | None = option(None, "which of `teachers` the source or base vdm is; null is `teacher`")
    members: list[str] = option([], "for ensemble: the sources whose priors are averaged, and names of `teachers`")
    gate: str = option("none", "for ensemble: agreement weighs each word's loss by how alike its members' maps are",
                       choices=GATES)

    def spec(self) -> SourceSpec | None:
        """What the arm is aligned to; None for the control."""
        return None if self.source == CONTROL else self._spec(self.source)

    def _spec(self, name: str) -> SourceSpec:
        if name in WRAPPING:
            return SourceSpec(name, (self._spec(self.base),))
        if name == "ensemble":
            members = [SourceSpec(m) if m in OWN_SOURCES else SourceSpec("vdm", teacher=m) for m in self.members]
            return SourceSpec(name, tuple(members), gate=self.gate)
        return SourceSpec(name, teacher=self.teacher or "") if name == "vdm" else SourceSpec(name)

    def check(self, teachers: list[str]) -> list[str]:
        """Faults between the arm's keys. teachers: names of the recipe's further teachers."""
        used, at = {self.source, self.base if self.source in WRAPPING else ""}, f"arms.{self.name}"
        known = [*OWN_SOURCES, *teachers]
        faults = [f"{at}.members: there is no source or teacher '{member}'; known: {', '.join(known)}"
                  for member in self.members if member not in known]
        if "ensemble" in used and (len(self.members) < 2 or len(set(self.members)) < len(self.members)):
            faults.append(f"{at}.members: an ensemble needs two or more different members, not {self.members}")
        if "ensemble" not in used and (self.members or self.gate != "none"):
            faults.append(f"{at}: members and gate are keys of the source ensemble, not of {self.source}")
        if self.teacher is not None and "vdm" not in used:
            faults.append(f"{at}.teacher: only the source vdm has a teacher")
        elif self.teacher is not None and self.teacher not in teachers:
            faults.append(f"{at}.teacher: there is no teacher '{self.teacher}'; known: "
                          f"{', '.join(teachers) or 'none, see `teachers`'}")
        return faults


@dataclass
class EvaluateSettings:
    """How multiple-choice questions are asked."""

    protocol: str = option("option_text", "letter compares the letters' likelihoods after a prompt that lists the options; "
                                          "option_text scores each option's text as the answer; generate lists the options "
                                          "and reads which one the student's own words mean",
                           choices=("option_text", "letter", "generate"))
    batch_size: int = option(32, "questions asked together", min=1, max=4096)
    new_tokens: int = option(64, "generate: most tokens of an answer", min=1, max=4096)


@dataclass
class EnhanceRecipe:
    """The main job: priors from the teacher, students aligned to them, and their controls side by side."""

    job: str = option("enhance", "which job the recipe describes", choices=("enhance",))
    name: str = option(help="the run's name; its folder is <output>/<name>", pattern=NAME)
    output: str = option("runs", "folder that holds the run folders")
    seed: int = option(0, "seed of everything random outside training: which clips are exchanged, bootstrap, examples", min=0)
    seeds: list[int] = option([0], "training seeds; every arm is trained once with each", min=0)
    resume: bool = option(True, "continue a run folder from its last finished step; false refuses a folder that exists")
    device: str = option("auto", "where models compute: auto takes a GPU if there is one", pattern="auto|cpu|mps|cuda(:[0-9]+)?")
    threads: int = option(1, "CPU threads of each torch process", min=1, max=1024)
    parallel_arms: int = option(1, "trainings that run at once, each in a process of its own; 1 trains in this process",
                                min=1, max=64)
    world: WorldSettings | None = option(None, "make (or reuse) this synthetic world as the data; null reads existing data")
    data: DataSettings = option(DataSettings())
    teacher: TeacherSettings = option(TeacherSettings())
    teachers: list[NamedTeacherSettings] = option([], "further teachers, for arms and ensembles")
    sources: SourcesSettings = option(SourcesSettings())
    student: StudentSettings = option(StudentSettings())
    training: TrainSettings = option(TrainSettings())
    arms: list[ArmSettings] = option(help="the students to train; base and these are the rows of the table")
    evaluate: EvaluateSettings = option(EvaluateSettings())
    examples: int = option(4, "test clips whose frames, priors and attention are stored for the report", min=0, max=100)
    report: bool = option(True, "write report.html at the end")

    def check(self) -> list[str]:
        """Faults between keys, as sentences with the dotted path."""
        names = [arm.name for arm in self.arms]
        faults = [f"arms.{n}: the name is used {names.count(n)} times" for n in sorted(set(names)) if names.count(n) > 1]
        if not self.arms:
            faults.append("arms: at least one arm is needed, e.g. `- {name: lambda0, source: none}`")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            faults.append(f"seeds: needs one or more different numbers, not {self.seeds}")
        if self.world is None and self.data.root is None:
            faults.append("data.root: required unless `world` is given")
        if self.world is not None:
            faults += self.world.check()
        if self.teacher.size is not None and len(self.teacher.size) != 2:
            faults.append(f"teacher.size: must be [height, width], not {self.teacher.size}")
        if self.name == "worlds":
            faults.append("name: 'worlds' is the folder of generated worlds; choose another name")
        teachers = [teacher.name for teacher in self.teachers]
        faults += [f"teachers.{n}: the name is a source's, or used twice" for n in sorted(set(teachers))
                   if teachers.count(n) > 1 or n in (CONTROL, *source_names())]
        for teacher in self.teachers:
            if teacher.size is not None and len(teacher.size) != 2:
                faults.append(f"teachers.{teacher.name}.size: must be [height, width], not {teacher.size}")
            if teacher.store is not None or teacher.text != self.teacher.text:
                faults.append(f"teachers.{teacher.name}: store and text are those of `teacher`; leave `store` out and give "
                              f"the same `text`")
        for arm in self.arms:
            faults += arm.check(teachers)
            if "oracle" in (arm.source, *arm.members) or arm.base == "oracle" and arm.source in WRAPPING:
                if self.world is None:
                    faults.append(f"arms.{arm.name}: the oracle prior needs ground truth, so `world` must be given")
                elif self.teacher.text != "question":
                    faults.append(f"teacher.text: ground truth is known for questions only, so the oracle of arms.{arm.name} needs `question`")
            if arm.source == CONTROL and arm.weight:
                faults.append(f"arms.{arm.name}.weight: an arm without a prior cannot align; leave the weight out or name a source")
        return faults

    def weight(self, arm: ArmSettings) -> float:
        """λ of an arm."""
        if arm.source == CONTROL:
            return 0.0
        return self.training.alignment.weight if arm.weight is None else arm.weight
