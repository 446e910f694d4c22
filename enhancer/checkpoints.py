"""What a training is, so that its checkpoints are known from another's, and which of them to go on from.

Weights and aligner are safetensors. The optimizer's moments, the schedule and the random state are files of torch.save,
as the Trainer writes them, and so are sharded weights; all are read with weights_only, which takes tensors and plain
values and runs no code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError  # torch raises it for what weights_only refuses
from typing import Any

from enhancer.data.samples import Picture, Sample
from enhancer.recipe import differences
from enhancer.train_settings import AUTO, NEVER, UNCHANGING, TrainSettings
from enhancer.video.clip import Sampling
from enhancer.video.footage import Footage, Video
from vdm_priors.errors import UserError

CHECKPOINTS = "checkpoints"
MARKER = "complete.json"  # written last into a checkpoint
CALLED = {"samples": "the samples or their order", "priors": "the priors", "weights": "the student's starting weights"}


def identity(
    settings: TrainSettings, samples: Sequence[Sample], sampling: Sampling, seed: int, processes: int, model: Any,
    priors: Callable | None,
) -> dict:
    """All that determines the trained weights: plain values, and digests of what is large.

    model: with its starting weights, which are read whole; priors: what the samples are aligned to, None for λ = 0.
    """
    described = {key: value for key, value in asdict(settings).items() if key not in UNCHANGING}
    texts = [[s.id, _shown(s.video), s.question, s.answer, *map(_beside, s.shown)] for s in samples]
    views = [view for sample in samples for view in sample.views()]
    aligned_to = None if priors is None else _digest([_prior_identity(priors, view) for view in views])
    return {"training": described, "sampling": asdict(sampling), "seed": seed, "processes": processes,
            "samples": _digest(texts), "priors": aligned_to, "weights": weights_digest(model)}


@contextmanager
def readable_state(checkpoint: Path | None) -> Iterator[None]:
    """Of going on from a checkpoint: UserError for an optimizer's or random state that torch cannot or will not read."""
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"{checkpoint}: the optimizer's or the random state cannot be read ({str(error)[:200]}): it is "
            "damaged, or holds more than tensors. Delete this checkpoint to go on from the one before."
        ) from error


def checkpoint_to_resume(folder: Path, described: dict, resume: str = AUTO) -> Path | None:
    """The checkpoint to go on from, None without one; UserError, with what differs, if it is of another training.

    folder: the training's own checkpoints; resume: as the recipe's key training.resume.
    """
    if resume == NEVER:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    newest = _newest(folder) if resume == AUTO else _named(Path(resume), folder)
    if newest is None:
        return None
    kept = json.loads((newest / MARKER).read_text(encoding="utf-8"))["identity"]
    described = json.loads(json.dumps(described))  # as it was written: lists for tuples
    if kept != described:
        listed = [f"{CALLED[line.split(':')[0]]} are others" if line.split(":")[0] in CALLED else line
                  for line in differences(kept, described)]
        raise UserError(
            f"{newest}: is a checkpoint of another training; what differs: {'; '.join(listed)}. Choose another output "
            "folder, or set training.resume to never to start over."
        )
    return newest


def _newest(folder: Path) -> Path | None:
    """The complete checkpoint of the most steps in a folder of checkpoints."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{MARKER}")]
    return max(complete, key=_steps, default=None)


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _named(path: Path, folder: Path) -> Path | None:
    """The checkpoint that `path` is, or the newest in it: a folder of checkpoints, of a student, or of a run.

    folder: as above; where it ends in arms/<arm>/seed<k>/checkpoints, so it does in another run's folder. The student's
    own checkpoint goes first where it is further, so that the same command continues what it began.
    """
    if (path / MARKER).is_file():
        found = path
    else:
        inside = (path, path / CHECKPOINTS, path.joinpath(*folder.parts[-4:]))
        found = next((newest for newest in map(_newest, inside) if newest is not None), None)
    if found is None:
        raise UserError(f"training.resume: {path} is no complete checkpoint and holds none ({MARKER} is written last). "
                        f"Give a checkpoint-<step> folder, or set training.resume to {AUTO}.")
    own = None if found.parent.resolve() == folder.resolve() else _newest(folder)
    return found if own is None or _steps(own) < _steps(found) else own


def remove_checkpoints(folder: str | Path) -> None:
    """Delete a training's checkpoints, which nothing needs once its student is exported."""
    shutil.rmtree(Path(folder) / CHECKPOINTS, ignore_errors=True)


def weights_digest(model: Any) -> str:
    """SHA-256 (hex) over a torch module's parameters and saved buffers, one tensor in main memory at a time."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _shown(video: Video) -> str | list:
    """All that says what a sample shows; a Footage's own text leaves out all pictures but the first."""
    if not isinstance(video, Footage):
        return str(video)
    return [*map(str, video.files), video.start, video.end, video.fps]


def _beside(shown: Video | Picture) -> str | list:
    return ["picture", str(shown.file)] if isinstance(shown, Picture) else _shown(shown)


def _prior_identity(priors: Callable, sample: Sample) -> str | None:
    """The key that a sample's prior is stored under, else a digest of the prior; None without a prior."""
    if hasattr(priors, "key"):
        return priors.key(sample)
    prior = priors(sample)
    if prior is None:
        return None
    described = [prior.text, [asdict(word) for word in prior.words], prior.grid.to_dict(), prior.weight.tolist()]
    return _digest(described, prior.maps.contiguous().numpy())


def _digest(value: Any, further: Any = b"") -> str:
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    digest.update(further)
    return digest.hexdigest()[:32]
