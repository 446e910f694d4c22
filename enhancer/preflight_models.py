"""What can be said of a run's models before they load: whether they are there, whole, and fit its settings.

Only configurations, tokenizers and file sizes are read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from enhancer.recipe_schema import EnhanceRecipe, TeacherSettings
from enhancer.shipped import student_path, teacher_path
from vdm_priors.errors import ModelError

STUDENT_WEIGHTS, TEACHER_WEIGHTS = ("*.safetensors", "*.bin"), ("*.safetensors",)
OFFLINE = ("couldn't connect", "offline mode")  # how transformers says that the hub was not asked


@dataclass(frozen=True)
class Geometry:
    """What a teacher's configurations say of sizes.

    joined: frames to a latent (it takes joined·k + 1 frames); cell: pixels a side of a token;
    rows, columns: of tokens at the size it was trained on.
    """

    joined: int
    cell: int
    rows: int
    columns: int

    def cells(self, settings: TeacherSettings) -> int:
        """Cells of a prior's grid."""
        rows, columns = (side // self.cell for side in settings.size) if settings.size else (self.rows, self.columns)
        return (((settings.sampling.frames or 1) - 1) // self.joined + 1) * rows * columns


@dataclass
class Models:
    """student, teacher: folder or hub name, None where it is a fault; geometry: of the teacher, None where unknown."""

    student: str | None
    teacher: str | None
    geometry: Geometry | None = None


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
                continue
            report.unchecked.append(name)
            report.warnings.append(f"{role}.model: {name} is a hub name, which cannot be checked offline: unless it is in "
                                   f"the local cache already, the run begins with its download")
    if uses_teacher and models.teacher is not None and Path(models.teacher).is_dir():
        try:
            models.geometry = teacher_geometry(Path(models.teacher))
        except ModelError as error:
            report.faults.append(str(error))
        else:
            check_teacher_settings(recipe.teacher, models.geometry, report)
    return models


def check_further_teachers(recipe: EnhanceRecipe, report: Any) -> None:
    """Faults of those of `teachers` that arms take priors from, each with the teacher's name."""
    from enhancer.extraction import used_teachers

    for name, teacher in used_teachers(recipe).items():
        if not name:
            continue
        found = SimpleNamespace(faults=[], warnings=[])
        path = _resolved(teacher_path, teacher.model, TEACHER_WEIGHTS, found.faults)
        if path is not None and Path(path).is_dir():
            try:
                check_teacher_settings(teacher, teacher_geometry(Path(path)), found)
            except ModelError as error:
                found.faults.append(str(error))
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


def teacher_geometry(folder: Path) -> Geometry | None:
    """A teacher folder's geometry, None where its configurations do not say it in diffusers' names.

    Raises ModelError for a folder without readable configurations, or of no known family.
    """
    from vdm_priors.families import family_of

    family_of(folder)
    vae, transformer = (_config(folder / part / "config.json") for part in ("vae", "transformer"))
    try:
        reduction = 2 ** (len(vae["block_out_channels"]) - 1)
        patch = int(transformer["patch_size"])
        return Geometry(int(vae["temporal_compression_ratio"]), reduction * patch,
                        transformer["sample_height"] // patch, transformer["sample_width"] // patch)
    except (KeyError, TypeError):
        return None


def _config(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"The teacher's {path} cannot be read ({error}): copy the folder whole.") from error


def check_teacher_settings(settings: TeacherSettings, geometry: Geometry | None, report: Any) -> None:
    """Faults for a number of frames or a frame size that the teacher would refuse."""
    if settings.sampling.frames is None:  # a local teacher's own number was filled in before, if it has one
        report.faults.append("teacher.sampling.frames is null, but the teacher's configurations do not say how many "
                             "frames it was trained on: set it.")
    elif geometry is None:
        report.warnings.append("the teacher's configurations do not say which clips it takes: teacher.sampling.frames "
                               "and teacher.size are not checked")
    if settings.sampling.frames is None or geometry is None:
        return
    frames, r = settings.sampling.frames, geometry.joined
    if settings.sampling.fps is not None:
        report.warnings.append(f"teacher.sampling.fps: how many frames are taken depends on the clip, and a clip whose "
                               f"number is not {r}k+1 has no prior; null takes teacher.sampling.frames of each")
    elif (frames - 1) % r:
        lower = max(frames - 1, 1) // r * r + 1
        report.faults.append(f"teacher.sampling.frames is {frames}, but the teacher takes clips of {r}k+1 frames: set "
                             + (f"{lower} or {lower + r}." if lower > 1 else f"{lower + r}."))
    if settings.size and any(side < geometry.cell or side % geometry.cell for side in settings.size):
        report.faults.append(f"teacher.size is {settings.size}, but the teacher takes heights and widths that are multiples "
                             f"of {geometry.cell} pixels; it was trained on [{geometry.rows * geometry.cell}, "
                             f"{geometry.columns * geometry.cell}].")


def light_student(name: str) -> tuple[Any, int]:
    """A student without its model, for prompts and token counts, and the longest sequence it takes."""
    from transformers import AutoConfig, AutoProcessor

    from vlm_hooks.families import known_families

    try:
        config = AutoConfig.from_pretrained(name)
        families = known_families()
        if config.model_type not in families:
            raise ModelError(f"The student {name} is of the family {config.model_type!r}; known: "
                             f"{', '.join(families)}.")
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"The student {name} cannot be read: {' '.join(str(error).split())[:300]}") from error
    student = families[config.model_type].Student(model=None, processor=processor, folder=name)
    return student, config.get_text_config().max_position_embeddings


def hub_unreachable(error: ModelError) -> bool:
    """Whether a model could not be read only because the hub was not asked or could not be reached."""
    return any(sign in str(error).lower() for sign in OFFLINE)
