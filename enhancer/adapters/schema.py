"""The keys of an adapter's recipe (`job: adapter`), each with its effect and limits.

The adapter's own settings are its Config (vlm_hooks/adapters/<name>.py), a stage's training is StageTraining.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from enhancer.adapters.gops import FALLBACKS, GopReading
from enhancer.recipe import build, option
from enhancer.recipe_schema import NAME, DataSettings, EvaluateSettings
from enhancer.train_settings import PARTS, AlignmentSettings, TrainSettings
from enhancer.world import WorldSettings
from vdm_priors.errors import RecipeError, UserError

CLIPS = ("keyed", "anchored", "frames")
ANSWER = "answer"  # the objective that every adapter has: the next-token loss of the answers
TEXTS = ("question", "caption")


@dataclass
class ReadingSettings:
    """How clips become what the adapter takes."""

    clips: str = option(
        "keyed",
        "keyed: key frames of the groups of pictures and the motion after each (EMA, CoPE); anchored: "
        "evenly spaced key frames and all motion between two (HY-Himmel); frames: frames alone (TE "
        "Fusion)",
        choices=CLIPS,
    )
    frames: int = option(16, "frames: how many, evenly spaced", min=1, max=4096)
    size: list[int] = option(
        [384, 384], "height and width, multiples of 8, that pictures of keyed and anchored clips are scaled to"
    )
    fuse: int = option(1, "frames of a motion step", min=1, max=1024)
    gops: int | None = option(8, "most groups of pictures that are read, evenly spaced; null reads all", min=1)
    keys: int = option(1, "keyed: key frames of a group, evenly spaced among its steps", min=1)
    anchors: int = option(8, "anchored: how many", min=2)
    steps: int | None = option(None, "anchored: most motion steps between two anchors; null keeps all", min=1)
    key_interval: int | None = option(
        None,
        "encode each clip again as H.264 (P-frames alone) with a key frame this often; null reads the file as it is",
        min=1,
        max=1000,
    )
    fps: float | None = option(
        None, "with key_interval: frames a second of the new encoding; null keeps the file's", min=0.1, max=240
    )
    fallback: str = option(
        "reencode",
        "a codec without vectors: made here and labelled so (reencode, mestimate), or refused",
        choices=FALLBACKS,
    )
    pictures: bool = option(False, "keep the pictures of motion steps, which CoPE's pre-training needs")

    def gop_reading(self) -> GopReading:
        """What `read_gops` takes. Raises UserError."""
        return GopReading(
            fuse=self.fuse,
            gops=self.gops,
            size=tuple(self.size),
            fallback=self.fallback,
            longest=max(256, 2 * self.fuse),
        )

    def check(self) -> list[str]:
        """Faults between keys."""
        faults = [] if len(self.size) == 2 else [f"reading.size: must be [height, width], not {self.size}"]
        if self.fps is not None and self.key_interval is None:
            faults.append("reading.fps: only a new encoding has another rate; set reading.key_interval")
        try:
            if not faults:
                self.gop_reading()
        except UserError as error:
            faults.append(f"reading: {error}")
        return faults


@dataclass
class StageTraining(TrainSettings):
    """A stage's training. Rates of the host's parts are 0 (frozen) unless they are given."""

    learning_rate_llm: float = option(0.0, "peak learning rate of the language model; 0 freezes it", min=0, max=1)
    learning_rate_merger: float = option(
        0.0, "peak learning rate of the vision-to-language merger; 0 freezes it", min=0, max=1
    )
    learning_rate_vision: float = option(0.0, "peak learning rate of the vision tower; 0 freezes it", min=0, max=1)
    learning_rate_adapter: float = option(
        1e-4, "peak learning rate of the adapter's parts that `rates` does not name", min=0, max=1
    )
    rates: dict[str, float] = option(
        {},
        "peak learning rates of single parts of the adapter, e.g. {motion: 1e-4, fusion: 2e-5}; 0 freezes one",
        min=0,
        max=1,
    )

    alignment: AlignmentSettings = option(AlignmentSettings(weight=0.0))

    def rate(self, part: str) -> float:
        return super().rate(part) if part in PARTS else self.rates.get(part, self.learning_rate_adapter)


@dataclass
class StageSettings:
    """One stage of the chain."""

    name: str = option(help="the stage's name; its folder is stages/<number>-<name>", pattern=NAME)
    objective: str = option(ANSWER, "what is learnt: answer (next tokens), or an objective of the adapter's own")
    text: str = option(
        "question",
        "what answer stages ask and what labels are taken from: question, or caption (the samples' "
        "captions as answers to caption_question)",
        choices=TEXTS,
    )
    train: str | None = option(None, "file of this stage's samples, relative to data.root; null is data.train")
    test: str | None = option(
        None,
        "file of samples that an objective is measured on after the stage, as test_<name> in stage.json; it does not "
        "learn from them; null measures nothing",
    )
    types: list[str] | None = option(None, "question types that this stage learns from; null is all")
    training: StageTraining = option(StageTraining())


@dataclass
class BaselineSettings:
    """Frames alone at the adapter's budget of visual tokens, trained by the stages that need frames alone."""

    frames: int = option(8, "frames of a clip, so many that their tokens are as many as the adapter's", min=1, max=4096)
    train: bool = option(True, "false asks the host as it comes")


@dataclass
class PriorsSettings:
    """Motion priors for stages with training.alignment.weight above 0: of a run of `job: enhance` on the same data."""

    run: str = option(help="the run's folder, e.g. runs/quickstart; `enhancer extract` fills one without training")
    source: str = option("vdm", "which of its sources")


@dataclass
class AdapterRecipe:
    """A codec adapter on a host, trained stage by stage and evaluated with its controls."""

    job: str = option("adapter", "which job the recipe describes", choices=("adapter",))
    name: str = option(help="the run's name; its folder is <output>/<name>", pattern=NAME)
    output: str = option("runs", "folder that holds the run folders")
    seed: int = option(0, "seed of weights, data order, exchanged clips and intervals", min=0)
    resume: bool = option(
        True, "continue a run folder from its last finished stage; false refuses a folder that exists"
    )
    device: str = option(
        "auto", "where models compute: auto takes a GPU if there is one", pattern="auto|cpu|mps|cuda(:[0-9]+)?"
    )
    threads: int = option(1, "CPU threads", min=1, max=1024)
    world: WorldSettings | None = option(
        None, "make (or reuse) this synthetic world as the data; null reads existing data"
    )
    data: DataSettings = option(DataSettings())
    host: str = option(
        "world", "the host: `world` is the small student shipped, else a transformers folder or hub name"
    )
    dtype: str = option("float32", "number type of the weights", choices=("float32", "bfloat16", "float16"))
    adapter: str = option(help="the adapter's name: a file of vlm_hooks/adapters")
    settings: dict[str, Any] = option({}, "the adapter's own settings; see docs/adapters.md")
    reading: ReadingSettings = option(ReadingSettings())
    caption_question: str = option("What happens?", "the question that captions answer")
    stages: list[StageSettings] = option(help="the chain of stages, in order")
    priors: PriorsSettings | None = option(
        None, "priors for the attention-alignment loss beside the answers'; null aligns nothing"
    )
    baseline: BaselineSettings | None = option(
        BaselineSettings(), "frames at equal token budget; null leaves that arm out"
    )
    evaluate: EvaluateSettings = option(EvaluateSettings())

    def check(self) -> list[str]:
        """Faults between keys, as sentences with the dotted path."""
        from vlm_hooks.adapters import find_adapter

        names = [stage.name for stage in self.stages]
        faults = [
            f"stages.{name}: the name is used {names.count(name)} times"
            for name in sorted(set(names))
            if names.count(name) > 1
        ]
        if not self.stages:
            faults.append("stages: at least one stage is needed")
        if self.world is None and self.data.root is None:
            faults.append("data.root: required unless `world` is given")
        faults += self.world.check() if self.world is not None else []
        faults += self.reading.check()
        try:
            kind = find_adapter(self.adapter)
            build(kind.Config, self.settings, "settings")
        except RecipeError as error:
            return [*faults, *(f"settings.{line.removeprefix('  - ')}" for line in str(error).splitlines()[1:])]
        except UserError as error:
            return [*faults, f"adapter: {error}"]
        for stage in self.stages:
            if stage.objective not in (ANSWER, *kind.OBJECTIVES):
                faults.append(
                    f"stages.{stage.name}.objective: {self.adapter} has {', '.join((ANSWER, *kind.OBJECTIVES))}, not "
                    f"{stage.objective!r}"
                )
            if stage.training.sharded:
                faults.append(
                    f"stages.{stage.name}.training: an adapter's stages train whole copies of the model; leave fsdp "
                    "and deepspeed out. Processes started together (torchrun, accelerate launch) share a step's samples"
                )
            if stage.objective == ANSWER and stage.test:
                faults.append(f"stages.{stage.name}.test: answers are measured by the run's own evaluation; leave it out")
            if stage.objective != ANSWER and (stage.training.lora or stage.training.optimizer != "adamw"):
                faults.append(
                    f"stages.{stage.name}.training: lora and optimizer are of answer stages; {stage.objective} trains "
                    "whole weights by adamw, at the rates of their parts"
                )
            if stage.training.alignment.weight and (self.priors is None or stage.objective != ANSWER):
                faults.append(f"stages.{stage.name}.training.alignment.weight: needs `priors` and the objective answer")
        return faults

    def config(self) -> Any:
        """The adapter's settings as its Config."""
        from vlm_hooks.adapters import find_adapter

        return build(find_adapter(self.adapter).Config, self.settings, "settings")
