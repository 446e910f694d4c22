"""Aligned fine-tuning of a student: L = L_AR + λ · alignment (MotionEnhancer, METHOD.md step 5).

The loop is transformers' Trainer (enhancer/trainer.py), the settings are in enhancer/train_settings.py;
this file is the course of a training from samples to a trained student.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enhancer.checkpoints import CHECKPOINTS, checkpoint_to_resume, identity, remove_checkpoints, weights_digest
from enhancer.data.samples import Problem, Sample
from enhancer.processes import Process
from enhancer.train_settings import AUTO, NEVER, AlignmentSettings, LoraSettings, TrainSettings
from enhancer.video.clip import FrameCache, Sampling
from vdm_priors.errors import SampleError, UserError
from vdm_priors.prior import MotionPrior

__all__ = ["AlignmentSettings", "LoraSettings", "TrainResult", "TrainSettings", "remove_checkpoints", "train",
           "weights_digest"]

Progress = Callable[[int, int, str], None]
HISTORY = "history.jsonl"


@dataclass
class TrainResult:
    """history: one row a step; problems: samples left out; remarks: samples used with something to
    know (no prior, repeated frames, unmatched words); seconds: of this call; start_step: 0, or where it resumed;
    waiting: share of the time that was spent waiting for batches (enhancer.step_log.waiting_share)."""

    history: list[dict]
    problems: list[Problem]
    remarks: list[Problem]
    seconds: float
    start_step: int
    waiting: float | None


def train(
    student: Any,
    samples: Sequence[Sample],
    settings: TrainSettings,
    folder: str | Path,
    priors: Callable[[Sample], MotionPrior | None] | None = None,
    sampling: Sampling = Sampling(),
    frame_cache: FrameCache | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> TrainResult:
    """Fine-tune the student in place; history.jsonl and checkpoints go to `folder`.

    student: what vlm_hooks.families.load_student returns; priors: the prior of a sample or None
    (asked for each of a sample's `views`, which have a video each),
    needed where settings.alignment.weight is positive; its `key(sample)`, if it has one, tells
    priors apart without reading them. The order of the data depends on `seed` and the samples
    alone. Adapters (settings.lora) are merged at the end. Of several processes (torchrun,
    accelerate launch) all must call it; process 0 writes, and where the weights are sharded the
    trained student is whole in process 0 alone. Raises UserError where training cannot go on,
    with the samples' ids.
    """
    # transformers' Trainer takes seconds to import, and reading a recipe needs only the settings
    from enhancer.collate import Collator, PriorCache, TrainingClips, check_texts
    from enhancer.step_log import waiting_share
    from enhancer.trainer import AlignedTrainer
    from vlm_hooks.capture import CaptureError
    from vlm_hooks.lora import merge_lora

    started = time.monotonic()
    folder = Path(folder)
    aligned = settings.alignment.weight > 0
    if aligned and priors is None:
        raise UserError(f"training.alignment.weight is {settings.alignment.weight:g}, but there is no prior to align "
                        "to: set it to 0 or name a motion source.")
    _make_folder(folder)

    usable, prompts, problems = check_texts(samples, student)
    source = priors if aligned else None
    priors = PriorCache(priors) if aligned else None
    if aligned:
        usable = _with_priors(usable, priors, settings.alignment.missing_prior, problems)
    if not usable:
        listed = "; ".join(f"{p.id}: {p.reason}" for p in problems[:3]) or "the list of samples is empty"
        raise SampleError(f"There is no sample to train on: {listed}")

    clips = TrainingClips(usable, prompts, student, sampling, frame_cache or FrameCache())
    layers = _layers(settings.alignment.layers, student)
    aligner = _aligner(settings.alignment, clips, prompts, priors, student, seed) if aligned else None

    # without checkpoints nobody asks for it, and large models take seconds to hash
    kept = settings.save_every > 0 or (folder / CHECKPOINTS).exists() or settings.resume not in (AUTO, NEVER)
    process = Process.this()
    described = identity(settings, usable, sampling, seed, process.count, student.model, source) if kept else {}
    adapters = _add_adapters(student, settings.lora, seed)
    dtype = next(student.model.parameters()).dtype  # DeepSpeed will change it
    trainer = AlignedTrainer(
        student=student,
        settings=settings,
        aligner=aligner,
        folder=folder / CHECKPOINTS,
        seed=seed,
        dataset=clips,
        collator=Collator(student, prompts, priors, layers, settings.alignment.answer_row),
        history_path=folder / HISTORY,
        identity=described,
        progress=progress,
    )
    with trainer.accelerator.main_process_first():  # which alone deletes those that shall not be resumed
        checkpoint = checkpoint_to_resume(folder / CHECKPOINTS, described, settings.resume)
        if checkpoint is not None and process.rank == 0:
            _bring_history(checkpoint, folder)
    try:
        start_step, whole = trainer.run(checkpoint)
    except CaptureError as error:
        raise UserError(f"The student's attention cannot be captured: {error}") from error
    if whole is not None and process.rank == 0:
        adapters = _make_whole(student, whole, dtype, settings.lora, seed)
    if adapters is not None and (whole is None or process.rank == 0):
        merge_lora(adapters)
    rows, notes, seconds = trainer.step_log.rows, trainer.samples, time.monotonic() - started
    return TrainResult(rows, problems + notes.problems, notes.remarks, seconds, start_step, waiting_share(rows))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HISTORY).touch()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Choose an output folder you may write to, "
                        "with free space.") from error


def _bring_history(checkpoint: Path, folder: Path) -> None:
    """The rows before a checkpoint that lies elsewhere come with it, where it still has them."""
    there = checkpoint.parent.parent / HISTORY
    if there.is_file() and there.resolve() != (folder / HISTORY).resolve():
        shutil.copyfile(there, folder / HISTORY)


def _with_priors(samples: list[Sample], priors: Callable, policy: str, problems: list[Problem]) -> list[Sample]:
    """Samples that stay under the policy for those without a prior."""
    if policy == "ar_only":
        return samples
    lacking = {sample.id: [view for view in sample.views() if priors(view) is None] for sample in samples}
    if any(lacking.values()) and policy == "fail":
        views = [view.id for views in lacking.values() for view in views]
        raise SampleError(f"{len(views)} samples have no prior ({', '.join(views[:10])}): extract them, or set "
                          "training.alignment.missing_prior to 'ar_only' or 'skip'.")
    # one of several videos without a prior leaves the others aligned
    missing = [sample for sample in samples if len(lacking[sample.id]) == len(sample.views())]
    without = {sample.id for sample in missing}
    problems += [Problem(sample.id, "has no prior (training.alignment.missing_prior: skip)") for sample in missing]
    return [sample for sample in samples if sample.id not in without]


def _aligner(settings: AlignmentSettings, clips: Any, prompts: dict, priors: Callable, student: Any, seed: int) -> Any:
    import torch

    from vlm_hooks.aligners import build_aligner

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grid = _aligner_grid(settings, clips, prompts, priors, student)
        return build_aligner(settings.aligner, grid).to(student.model.device)


def _aligner_grid(settings: AlignmentSettings, clips: Any, prompts: dict, priors: Callable,
                  student: Any) -> tuple[int, int, int] | None:
    """Shape of the grid that rows are compared on, which the aligner "row" alone asks for; None without any prior."""
    if settings.aligner != "row":
        return None
    if settings.compare_on == "prior":
        views = (view for sample in clips.samples for view in sample.views())
        return next((prior.grid.shape for prior in map(priors, views) if prior is not None), None)
    item = clips[0]
    encoding = student.encode([item.for_student], [prompts[item.sample.id].text], names=[item.sample.id])
    return student.grids(encoding.inputs, [item.for_student])[0][0].shape


def _layers(layers: Sequence[int] | None, student: Any) -> list[int] | None:
    if layers is None:
        return None
    count = student.model.config.get_text_config().num_hidden_layers
    strange = [layer for layer in layers if not -count <= layer < count]
    if strange or not layers:
        raise UserError(f"training.alignment.layers is {list(layers)}: the student has decoder layers 0 to {count - 1} "
                        f"(or -{count} to -1); null takes all.")
    return sorted({layer % count for layer in layers})


def _add_adapters(student: Any, settings: LoraSettings | None, seed: int) -> Any:
    """The handle of the adapters put into the student, the same for the same seed; None without."""
    if settings is None:
        return None
    import torch

    from vlm_hooks.lora import add_lora

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return add_lora(student, settings.rank, settings.alpha, settings.dropout, settings.targets, settings.parts)


def _make_whole(student: Any, state: dict, dtype: Any, settings: LoraSettings | None, seed: int) -> Any:
    """Gives the student a model of its own with the gathered weights, in main memory; the handle of its adapters.

    dtype: which the student came with. ZeRO hands out the weights that it computes with, bfloat16 where training.bf16
    is set, so that what it kept in float32 arrives rounded.
    """
    from vlm_hooks.families import load_student

    fresh = load_student(student.folder, dtype=dtype)
    adapters = _add_adapters(fresh, settings, seed)
    fresh.model.load_state_dict(state)
    student.model = fresh.model.eval()
    return adapters
