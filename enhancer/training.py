"""Aligned fine-tuning of a student: L = L_AR + λ · alignment (MotionEnhancer, METHOD.md step 5).

The loop is transformers' Trainer (enhancer/trainer.py); this file has the settings and the
course of a training from samples to a trained student.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from enhancer.data.samples import Problem, Sample
from enhancer.recipe import option
from enhancer.video.clip import FrameCache, Sampling
from vdm_priors.errors import SampleError, UserError
from vdm_priors.prior import MotionPrior

Progress = Callable[[int, int, str], None]
CHECKPOINTS = "checkpoints"
MARKER = "complete.json"  # written last into a checkpoint
HISTORY = "history.jsonl"
PARTS = ("vision", "merger", "llm")


@dataclass
class AlignmentSettings:
    """How the student's attention is aligned to the prior."""

    weight: float = option(1.0, "λ: weight of the alignment loss; 0 trains on the answers alone and captures nothing", min=0, max=1e6)
    schedule: str = option("constant", "course of λ: constant is the paper's; linear falls to 0 at the end, so that the prior shows where to look and then lets go",
                           choices=("constant", "linear"))
    loss: str = option("l2", "distance of a word's row from its prior; l2 is the paper's unsquared norm (Eq. 15), mse its square (Eq. 20)",
                       choices=("l2", "mse", "kl", "js", "cosine"))
    aligner: str = option("pointwise", "network between student row and prior, discarded after training: per cell, per whole row, "
                                       "over neighbouring cells, or none", choices=("pointwise", "row", "conv3d", "identity"))
    normalize: str = option("row", "row divides both sides by their mass over the video; none keeps raw attention (gradients shrink with the number of cells)",
                            choices=("row", "none"))
    regrid: str = option("overlap", "student cells to prior cells: overlap keeps mass, trilinear interpolates at cell centres",
                         choices=("overlap", "trilinear"))
    compare_on: str = option("prior", "grid of the comparison: prior is the paper's; on the student's, sources of different resolution count alike",
                             choices=("prior", "student"))
    layers: list[int] | None = option(None, "decoder layers whose attention is averaged; negative numbers count from the last; null is all")
    missing_prior: str = option("ar_only", "a sample without a prior trains on its answer alone, is left out (skip), or stops the run (fail)",
                                choices=("ar_only", "skip", "fail"))
    max_unmatched: float = option(0.5, "largest share of the priors' words that may have no token in the student's prompt before the run stops", min=0, max=1)


    def weight_at(self, progress: float) -> float:
        """λ when `progress` (0 to 1) of the steps are done."""
        return self.weight * (1 - progress) if self.schedule == "linear" else self.weight


@dataclass
class TrainSettings:
    """How the student is fine-tuned."""

    steps: int = option(400, "optimizer steps", min=1)
    batch_size: int = option(32, "samples a forward; memory grows with it", min=1, max=4096)
    accumulate: int = option(1, "forwards a step: batch_size × accumulate samples, with the memory of batch_size", min=1, max=4096)
    # the paper's rates, for models of billions of parameters; the shipped student takes 100 times these (quickstart.yaml)
    learning_rate_llm: float = option(1e-5, "peak learning rate of the language model (and the aligner); 0 freezes it; "
                                            "1e-5 suits large models, 1e-3 the shipped one", min=0, max=1)
    learning_rate_merger: float = option(1e-5, "peak learning rate of the vision-to-language merger; 0 freezes it; "
                                               "1e-5 suits large models, 1e-3 the shipped one", min=0, max=1)
    learning_rate_vision: float = option(2e-6, "peak learning rate of the vision tower; 0 freezes it; "
                                               "2e-6 suits large models, 2e-4 the shipped one", min=0, max=1)
    weight_decay: float = option(0.1, "AdamW's weight decay, not on norms and biases", min=0, max=1)
    warmup: float = option(0.03, "share of the steps in which the learning rates rise from 0", min=0, max=1)
    schedule: str = option("cosine", "course of the learning rates after the warm-up", choices=("cosine", "linear", "constant"))
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 leaves them", min=0)
    bf16: bool = option(False, "bfloat16 autocast: half the activation memory, faster where the hardware has it")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward: less memory, about a third slower")
    save_every: int = option(0, "steps between checkpoints to resume from; 0 keeps none", min=0)
    log_every: int = option(10, "steps between two reports of progress (history.jsonl has every step)", min=1)
    resume: bool = option(True, "continue from the newest complete checkpoint; false starts over and deletes the checkpoints")
    workers: int = option(0, "processes that decode and prepare batches ahead; 0 does it between the steps", min=0, max=64)
    alignment: AlignmentSettings = option(AlignmentSettings())


@dataclass
class TrainResult:
    """history: one row a step; problems: samples left out; remarks: samples used with something to
    know (no prior, repeated frames, unmatched words); seconds: of this call; start_step: 0, or where it resumed."""

    history: list[dict]
    problems: list[Problem]
    remarks: list[Problem]
    seconds: float
    start_step: int


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

    student: what vlm_hooks.families.load_student returns; priors: the prior of a sample or None,
    needed where settings.alignment.weight is positive; its `key(sample)`, if it has one, tells
    priors apart without reading them. The order of the data depends on `seed` and the samples
    alone. Raises UserError where training cannot go on, with the samples' ids.
    """
    # transformers' Trainer takes seconds to import, and reading a recipe needs only the settings
    from enhancer.collate import Collator, PriorCache, TrainingClips, check_texts
    from enhancer.trainer import AlignedTrainer, training_arguments
    from vlm_hooks.alignment import build_aligner
    from vlm_hooks.capture import CaptureError

    started = time.monotonic()
    folder = Path(folder)
    aligned = settings.alignment.weight > 0
    if aligned and priors is None:
        raise UserError(f"training.alignment.weight is {settings.alignment.weight:g}, but there is no prior to align to: set it to 0 or name a motion source.")
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
    collator = Collator(student, prompts, priors, layers)
    aligner = None
    if aligned:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            aligner = build_aligner(settings.alignment.aligner, _aligner_grid(settings.alignment, clips, prompts, priors, student)).to(student.model.device)

    # without checkpoints nobody asks for it, and large models take seconds to hash
    kept = settings.save_every > 0 or (folder / CHECKPOINTS).exists()
    identity = _identity(settings, usable, sampling, seed, student.model, source) if kept else ""
    checkpoint = _checkpoint_to_resume(folder / CHECKPOINTS, identity, settings.resume)
    trainer = AlignedTrainer(
        student=student,
        settings=settings,
        aligner=aligner,
        args=training_arguments(settings, folder / CHECKPOINTS, seed, student.model.device),
        dataset=clips,
        collator=collator,
        history_path=folder / HISTORY,
        identity=identity,
        progress=progress,
    )
    try:
        start_step = trainer.run(checkpoint)
    except CaptureError as error:
        raise UserError(f"The student's attention cannot be captured: {error}") from error
    return TrainResult(trainer.history, problems + trainer.problems, trainer.remarks, time.monotonic() - started, start_step)


def remove_checkpoints(folder: str | Path) -> None:
    """Delete a training's checkpoints, which nothing needs once its student is exported."""
    shutil.rmtree(Path(folder) / CHECKPOINTS, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HISTORY).touch()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Choose an output folder you may write to, with free space.") from error


def _with_priors(samples: list[Sample], priors: Callable, policy: str, problems: list[Problem]) -> list[Sample]:
    """Samples that stay under the policy for those without a prior."""
    if policy == "ar_only":
        return samples
    missing = [sample for sample in samples if priors(sample) is None]
    if missing and policy == "fail":
        listed = ", ".join(sample.id for sample in missing[:10])
        raise SampleError(f"{len(missing)} samples have no prior ({listed}): extract them, or set training.alignment.missing_prior to 'ar_only' or 'skip'.")
    without = {sample.id for sample in missing}
    problems += [Problem(sample.id, "has no prior (training.alignment.missing_prior: skip)") for sample in missing]
    return [sample for sample in samples if sample.id not in without]


def _aligner_grid(settings: AlignmentSettings, clips: Any, prompts: dict, priors: Callable, student: Any) -> tuple[int, int, int] | None:
    """Shape of the grid that rows are compared on, which the aligner "row" alone asks for; None if no sample has a prior."""
    if settings.aligner != "row":
        return None
    if settings.compare_on == "prior":
        return next((prior.grid.shape for prior in map(priors, clips.samples) if prior is not None), None)
    item = clips[0]
    encoding = student.encode([item.clip], [prompts[item.sample.id].text], names=[item.sample.id])
    return student.grids(encoding.inputs, [item.clip])[0][0].shape


def _layers(layers: Sequence[int] | None, student: Any) -> list[int] | None:
    if layers is None:
        return None
    count = student.model.config.get_text_config().num_hidden_layers
    strange = [layer for layer in layers if not -count <= layer < count]
    if strange or not layers:
        raise UserError(f"training.alignment.layers is {list(layers)}: the student has decoder layers 0 to {count - 1} (or -{count} to -1); null takes all.")
    return sorted({layer % count for layer in layers})


# -- resuming -------------------------------------------------------------------------


def _identity(settings: TrainSettings, samples: Sequence[Sample], sampling: Sampling, seed: int, model: Any,
              priors: Callable | None) -> str:
    """Digest [32 hex digits] of everything that determines the trained weights, to tell another training's checkpoint.

    model: with its starting weights, which are read whole; priors: what the samples are aligned to, None for λ = 0.
    """
    described = asdict(settings)
    for name in ("save_every", "log_every", "resume", "workers"):
        del described[name]
    texts = [[s.id, str(s.video), s.question, s.answer] for s in samples]
    aligned_to = None if priors is None else [_prior_identity(priors, sample) for sample in samples]
    parts = [described, texts, asdict(sampling), seed, aligned_to, weights_digest(model)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def weights_digest(model: Any) -> str:
    """SHA-256 (hex) over a torch module's parameters and saved buffers, one tensor in main memory at a time."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _prior_identity(priors: Callable, sample: Sample) -> str | None:
    """The key that a sample's prior is stored under, else a digest of the prior; None without a prior."""
    if hasattr(priors, "key"):
        return priors.key(sample)
    prior = priors(sample)
    if prior is None:
        return None
    described = [prior.text, [asdict(word) for word in prior.words], prior.grid.to_dict(), prior.weight.tolist()]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(prior.maps.contiguous().numpy())
    return digest.hexdigest()


def _checkpoint_to_resume(folder: Path, identity: str, resume: bool) -> Path | None:
    """The newest complete checkpoint, None without one; UserError if it is of another training."""
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{MARKER}")]
    if not complete:
        return None
    newest = max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]))
    if json.loads((newest / MARKER).read_text(encoding="utf-8"))["identity"] != identity:
        raise UserError(
            f"{newest}: is a checkpoint of a training with other settings, samples, priors, seed or starting weights. "
            "Choose another output folder, or set training.resume to false to start over."
        )
    return newest


def warmup_steps(settings: TrainSettings) -> int:
    """Number of steps in which the learning rates rise."""
    return math.ceil(settings.warmup * settings.steps)
