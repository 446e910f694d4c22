"""An adapter's chain of stages, and the baseline's, trained by one process or several.

All processes hold the same model. Process 0 alone writes; it says by number which stage they train next (Together).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from enhancer.adapters.reading import ClipReader
from enhancer.adapters.samples import samples_of
from enhancer.adapters.schema import ANSWER, AdapterRecipe, ReadingSettings, StageSettings
from enhancer.adapters.stages import Progress, is_done, run_stage, stage_summary
from enhancer.console import Console
from enhancer.data.samples import Problem, Sample
from enhancer.run_data import data_root
from enhancer.processes import Process
from enhancer.recipe import build
from enhancer.runfolder import RunFolder, readable_write_errors, report_skipped
from enhancer.shipped import student_path, torch_device
from enhancer.together import Together
from enhancer.train_settings import PARTS, AlignmentSettings
from vdm_priors.errors import UserError
from vlm_hooks.adapters import find_adapter
from vlm_hooks.adapters.base import Adapter, AdapterConfig
from vlm_hooks.adapters.model import AdapterModel
from vlm_hooks.adapters.te_fusion import Adapter as Frames


@dataclass
class Chain:
    """Stages that are trained one after another, each in a folder of its own, and the model that they train.

    first: the number of its first stage among all that a run may train, by which process 0 calls the others. model:
    None until it is loaded.
    """

    recipe: AdapterRecipe
    stages: list[StageSettings]
    folders: list[Path]
    kind: type[Adapter]
    config: AdapterConfig
    reader: ClipReader
    first: int = 0
    model: AdapterModel | None = None

    @property
    def finished(self) -> int:
        """How many of its stages are on disk, trained to their end."""
        return [*map(is_done, self.folders), False].index(False)

    def load(self, stages: int) -> AdapterModel:
        """The model that so many stages have trained; a new adapter on the host for none."""
        if self.model is None:
            device = Process.this().device(torch_device(self.recipe.device))
            loading = {"dtype": getattr(torch, self.recipe.dtype), "device": device}
            torch.manual_seed(self.recipe.seed)
            host = student_path(self.recipe.host)
            self.model = (
                AdapterModel.from_pretrained(host, self.folders[stages - 1] / "model", **loading)
                if stages
                else AdapterModel.create(host, self.kind, self.config, **loading)
            ).eval()
        return self.model

    def train(self, number: int, progress: Progress | None = None) -> list[Problem]:
        """Trains the stage of that number (from 0) on top of those before it; the samples that were left out."""
        stage = self.stages[number]
        root = data_root(self.recipe)
        samples, problems = samples_of(self.recipe, stage, root)
        held_out: list[Sample] = []
        if stage.test:
            held_out, unread = samples_of(self.recipe, replace(stage, train=stage.test), root)
            problems = problems + unread
        return problems + run_stage(
            self.load(number),
            stage,
            samples,
            self.reader,
            self.folders[number],
            self.recipe.seed,
            progress,
            stored_priors(self.recipe, stage),
            held_out,
        )


def chains(recipe: AdapterRecipe) -> tuple[Chain, Chain]:
    """The adapter's chain, and the baseline's: the host on frames alone after the same stages, as far as they teach the
    host and frames are all that they need (after none where the recipe has no baseline, or does not train it)."""
    run, baseline, kind = Path(recipe.output) / recipe.name, recipe.baseline, find_adapter(recipe.adapter)
    trained = recipe.stages if baseline and baseline.train else []
    stages = [_on_frames(stage) for stage in trained if _needs_frames_alone(kind, stage)]
    stages = [stage for stage in stages if any(map(stage.training.rate, PARTS))]
    frames = ClipReader(ReadingSettings(clips="frames", frames=baseline.frames if baseline else 1))
    own, theirs = (
        [run / place / f"{number}-{stage.name}" for number, stage in enumerate(some, start=1)]
        for place, some in (("stages", recipe.stages), ("baseline", stages))
    )
    return (
        Chain(recipe, recipe.stages, own, kind, recipe.config(), ClipReader(recipe.reading)),
        Chain(recipe, stages, theirs, Frames, Frames.Config(k=1), frames, first=len(own)),
    )


def _needs_frames_alone(kind: type[Adapter], stage: StageSettings) -> bool:
    """Whether a host without the adapter can be taught by the stage: answers, and TE Fusion's warm-up."""
    return stage.objective == ANSWER or kind.OBJECTIVES[stage.objective] is Frames.OBJECTIVES.get(stage.objective)


def _on_frames(stage: StageSettings) -> StageSettings:
    """The stage without what is of the adapter or of priors."""
    return replace(stage, training=replace(stage.training, rates={}, alignment=AlignmentSettings(weight=0.0)))


def train_chain(run: RunFolder, chain: Chain, console: Console, together: Together) -> None:
    """Process 0: trains what is left of the chain with the others, and loads its model."""
    finished = chain.finished
    for stage in chain.stages[:finished]:
        console.note(f"{stage.name}: finished before")
    for number in range(finished, len(chain.stages)):
        stage, folder = chain.stages[number], chain.folders[number]
        together.call(chain.first + number)
        with readable_write_errors(run.folder), console.bar(stage.name, unit="step") as bar:
            problems = chain.train(number, bar)
        report_skipped(run, f"{folder.parent.name}/{folder.name}", problems, console)
        told = ", ".join(
            f"{name.replace('_', ' ')} {value:.3g}"
            for name, value in stage_summary(folder).items()
            if isinstance(value, float)
        )
        console.note(f"{stage.name}: {told}")
    chain.load(finished)


def help_train(recipe: AdapterRecipe, process: Process, together: Together) -> Path:
    """What the processes beside the first one do: train with it the stages that it calls them to."""
    adapter, baseline = chains(recipe)
    try:
        for number in together.calls():
            chain = baseline if number >= baseline.first else adapter
            if chain is baseline:
                adapter.model = None
            chain.train(number - chain.first)
    except UserError as error:
        raise type(error)(f"{process}: {error}") from error
    return Path(recipe.output) / recipe.name


def stored_priors(recipe: AdapterRecipe, stage: StageSettings):
    """The priors that a stage is aligned to, by sample; None where it is aligned to none. UserError for another
    folder."""
    if not stage.training.alignment.weight:
        return None
    from enhancer.arms import StoredPriors
    from enhancer.recipe_schema import EnhanceRecipe

    run = RunFolder.existing(Path(recipe.priors.run)).folder
    made_by = build(
        EnhanceRecipe, yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")), str(run / "recipe.yaml")
    )
    return StoredPriors(run, made_by, recipe.priors.source)
