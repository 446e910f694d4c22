"""What can be said of a run's models before they load: whether they are there, whole, and fit its settings.

Only configurations, tokenizers and file sizes are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from enhancer.memory import MB, device_memory, saying
from enhancer.recipe_schema import EnhanceRecipe, TeacherSettings
from enhancer.shipped import student_path, teacher_path
from vdm_priors.errors import ClipError, ModelError, RecipeError

STUDENT_WEIGHTS, TEACHER_WEIGHTS = ("*.safetensors", "*.bin"), ("*.safetensors",)
ANY_SHAPE = (1, 1, 1, 1, 1)  # of latents: how many steps there are does not depend on it
OFFLINE = ("couldn't connect", "offline mode")  # how transformers says that the hub was not asked


@dataclass
class Models:
    """student, teacher: folder or hub name, None where it is a fault; skeleton: of the teacher, None where unknown."""

    student: str | None
    teacher: str | None
    skeleton: Any = None


def resolve_models(recipe: EnhanceRecipe, report: Any, uses_teacher: bool) -> Models:
    """Both models, with a fault or a warning in the report for each that could not be used.

    A teacher that no arm takes priors from only warns.
    """
    models = Models(_resolved(student_path, recipe.student.model, STUDENT_WEIGHTS, report.faults),
                    _resolved(teacher_path, recipe.teacher.model, TEACHER_WEIGHTS,
                              report.faults if uses_teacher else report.warnings))
    for role, name in (("student", models.student), ("teacher", models.teacher)):
        if name is not None and not Path(name).is_dir() and (role == "student" or uses_teacher):
            if role == "teacher" and "/" not in name:
                report.faults.append(f"There is no teacher folder {name}, and that is no hub name like owner/model. "
                                     f"Check the path.")
                models.teacher = None
                continue
            report.unchecked.append(name)
            report.warnings.append(f"{role}.model: {name} is a hub name, which cannot be checked offline: unless it is "
                                   f"in the local cache already, the run begins with its download")
    if uses_teacher and models.teacher is not None:
        models.skeleton = checked_skeleton(models.teacher, recipe.teacher, report)
    return models


def check_further_teachers(recipe: EnhanceRecipe, report: Any) -> None:
    """Faults of those of `teachers` that arms take priors from, each with the teacher's name."""
    from enhancer.extraction import used_teachers

    for name, teacher in used_teachers(recipe).items():
        if not name:
            continue
        found = SimpleNamespace(faults=[], warnings=[], lines=report.lines)
        path = _resolved(teacher_path, teacher.model, TEACHER_WEIGHTS, found.faults)
        if path is not None:
            skeleton = checked_skeleton(path, teacher, found)
            if skeleton is not None:
                teacher_costs(teacher, skeleton, found, f"{name}: ")
        report.faults += [f"teachers.{name}: {fault}" for fault in found.faults]
        report.warnings += [f"teachers.{name}: {warning}" for warning in found.warnings]


def _resolved(path_of: Any, name: str, weights: tuple[str, ...], told: list[str]) -> str | None:
    try:
        path = path_of(name)
    except ModelError as error:
        told.append(str(error))
        return None
    folder = Path(path)
    if folder.is_dir() and not any(next(folder.rglob(kind), None) for kind in weights):
        told.append(f"The model folder {folder} has no weights ({' or '.join(weights)}): copy or download it whole.")
        return None
    return path


def checked_skeleton(path_or_hub: str, settings: TeacherSettings, report: Any) -> Any:
    """The teacher without weights; a fault in the report, and None, where there is none or it refuses the clips.

    A hub model's configurations are asked for; where the hub cannot be reached that is a warning.
    """
    from vdm_priors.families import load_skeleton

    try:
        skeleton = load_skeleton(path_or_hub)
    except ModelError as error:
        (report.faults if Path(path_or_hub).is_dir() else report.warnings).append(str(error))
        return None
    faults = len(report.faults)
    check_teacher_settings(settings, skeleton, report)
    return skeleton if len(report.faults) == faults else None


def check_teacher_settings(settings: TeacherSettings, skeleton: Any, report: Any) -> None:
    """Faults for a number of frames or of steps, a frame size or layers that the teacher would refuse."""
    if settings.sampling.frames is None:  # a local teacher's own number was filled in before, if it has one
        report.faults.append("teacher.sampling.frames is null, but the teacher's configurations do not say how many "
                             "frames it was trained on: set it.")
    elif settings.sampling.fps is not None:
        report.warnings.append("teacher.sampling.fps: how many frames are taken depends on the clip, and a clip whose "
                               "number the teacher does not take has no prior; null takes teacher.sampling.frames of "
                               "each")
    else:
        try:
            skeleton.check_frames(settings.sampling.frames)
        except ClipError as error:
            report.faults.append(f"teacher.sampling.frames: {error}")
    try:
        skeleton.frame_size(tuple(settings.size) if settings.size else None)
    except ModelError as error:
        report.faults.append(f"teacher.size: {error}")
    try:
        settings.extraction.layers_of(len(skeleton.attention_layers))
    except RecipeError as error:
        report.faults.append(str(error))
    try:
        if settings.extraction.denoises or settings.extraction.harvest_at == "inversion":
            skeleton.schedule(ANY_SHAPE).levels(settings.extraction.steps)
    except ModelError as error:
        report.faults.append(f"teacher.extraction.steps: {error}")


def teacher_costs(settings: TeacherSettings, skeleton: Any, report: Any, whose: str = "") -> None:
    """Lines of what a teacher is and what its priors cost, all of them estimates (vdm_priors.estimate)."""
    from vdm_priors.estimate import CARDS, estimate, smaller_choices, taken_frames

    frames = taken_frames(skeleton, settings.sampling.frames)  # with fps they are the most that there may be
    cost = estimate(skeleton, settings.extraction, frames, settings.size, settings.batch_size, settings.dtype,
                    offload=settings.offload)
    visiting = f" (and in turn {cost.visiting / MB:,.0f} MB of a part that is offloaded)" if cost.offload else ""
    kept = f" + keys and values kept {cost.kept / MB:,.0f} (main memory where a GPU is full)" if cost.kept else ""
    parts = ", ".join(f"{part} {_count(number)}" for part, number in cost.parameters.items())
    report.lines += [
        (f"{whose}teacher", f"{_count(sum(cost.parameters.values()))} parameters", parts),
        (f"{whose}tokens of the teacher", f"{cost.vision_tokens:,} vision, {cost.text_tokens} text",
         f"{cost.frames} frames of {cost.size[0]}×{cost.size[1]} pixels"),
        (f"{whose}arithmetic of a prior", f"about {cost.clip_flops:.2g} FLOP",
         f"{cost.forwards} forwards of {cost.forward_flops:.2g} (2·parameters·tokens + 4·tokens²·width·layers), those "
         f"that see a reference more; VAE {cost.vae_flops:.2g}"),
        (f"{whose}time of a prior", f"about {_seconds(cost.seconds(CARDS['H100']))} on an H100",
         "an estimate; " + ", ".join(f"{name}: {_seconds(cost.seconds(tflops))} at {tflops:g} TFLOP/s"
                                     for name, tflops in CARDS.items())),
        (f"{whose}memory of the teacher", f"about {cost.memory / MB:,.0f} MB",
         f"weights {cost.weights / MB:,.0f}{visiting} + activations {cost.activations / MB:,.0f} + harvest "
         f"{cost.harvest / MB:,.0f}{kept} MB for teacher.batch_size {cost.batch_size} in {cost.dtype}, without the "
         f"VAE's own"),
    ]
    have = device_memory()
    if have and cost.memory > have:
        report.warnings.append(
            f"{whose}the teacher needs about {cost.memory / MB:,.0f} MB and this machine has {have / MB:,.0f} MB: "
            + saying(smaller_choices(skeleton, settings.extraction, cost)))


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def light_student(name: str) -> tuple[Any, int]:
    """A student without its model, for prompts and token counts, and its longest sequence. Raises ModelError."""
    from vlm_hooks.families import find_family

    student = find_family(name).Student.without_weights(name)
    return student, student.max_length


def hub_unreachable(error: ModelError) -> bool:
    """Whether a model could not be read only because the hub was not asked or could not be reached."""
    return any(sign in str(error).lower() for sign in OFFLINE)
