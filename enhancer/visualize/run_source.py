"""A run folder as far as it can be read: half-finished, moved, or with the recipe of another version."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from enhancer.recipe import build
from enhancer.recipe_schema import StudentSettings, TeacherSettings
from enhancer.report.run_folder import RunFolder, read_run_folder
from enhancer.world.make import WorldSettings
from vdm_priors.errors import UserError


@dataclass
class Source:
    """A run's folder with what is known of it. job, teacher, student: of its recipe, None where this version cannot
    read them; arms: names; roots: folders that its clips may lie in; gaps: sentences that hold for every clip."""

    run: RunFolder
    job: str | None = None
    teacher: TeacherSettings | None = None
    student: StudentSettings | None = None
    arms: list[str] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)
    gaps: list[tuple[str, str]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.run.folder


def read_run(folder: Path) -> Source:
    """The folder, read as far as it can be; a recipe of another version section by section."""
    run = read_run_folder(folder)
    source = Source(
        run, gaps=[(missing.section, missing.sentence) for missing in run.missing if missing.section == "run"]
    )
    status = run.info.get("status")
    if run.info and status != "finished":
        source.gaps.append(
            ("run", f"The run is not finished (its run.json says '{status}'); what it has so far is shown.")
        )
    raw = _recipe(run.recipe, source)
    source.job = str(raw["job"]) if raw.get("job") else None
    source.teacher = _section(TeacherSettings, raw.get("teacher"), "teacher", source)
    source.student = _section(StudentSettings, raw.get("student"), "student", source)
    arms = raw.get("arms") if isinstance(raw.get("arms"), list) else []
    source.arms = [str(arm["name"]) for arm in arms if isinstance(arm, dict) and arm.get("name")]
    root = raw["data"].get("root") if isinstance(raw.get("data"), dict) else None
    source.roots = [Path("."), folder, *([Path(str(root))] if root else [])]
    worlds = [folder.parent / "worlds", *([Path(str(raw["output"])) / "worlds"] if raw.get("output") else [])]
    world = _section(WorldSettings, raw.get("world"), "world", source) if raw.get("world") else None
    digest = world.digest()[:12] if world is not None else ""
    found = [place for folder in dict.fromkeys(worlds) if folder.is_dir() for place in sorted(folder.iterdir())]
    source.roots += sorted(found, key=lambda place: place.name != digest)  # its own world before the others
    return source


def _recipe(text: str, source: Source) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        source.gaps.append(("run", f"recipe.yaml is damaged ({' '.join(str(error).split())[:200]})."))
        raw = {}
    return raw if isinstance(raw, dict) else {}


def _section(schema: type, raw: Any, name: str, source: Source) -> Any:
    if raw is None:
        return None
    try:
        return build(schema, raw, f"recipe.yaml, {name}")
    except UserError as error:
        source.gaps.append(
            ("run", f"The recipe's {name} is not of this version and is left out: {' '.join(str(error).split())}")
        )
        return None


def stores(source: Source) -> list[Path]:
    shared = source.teacher.store if source.teacher is not None else None
    return [source.folder / "priors", *([Path(shared)] if shared else [])]


def find_video(recorded: str, source: Source) -> Path | None:
    """The clip's file: where the run read it, under the data's root, or in a world beside the run (which may have
    moved)."""
    if not recorded:
        return None
    places = [root / recorded for root in source.roots]
    places += [root / Path(*Path(recorded).parts[-2:]) for root in source.roots]
    return next((place.resolve() for place in places if place.is_file()), None)


def prior_beside_run(path: Path) -> tuple[Source, dict] | None:
    """The run whose store a prior lies in and its row there; None where there is none."""
    folder = path.resolve().parent.parent.parent
    try:
        rows = json.loads((folder / "priors.json").read_text(encoding="utf-8"))
        row = next((row for row in rows if row.get("key") == path.stem), None)
    except (OSError, ValueError, AttributeError):
        return None
    return (read_run(folder), row) if row is not None else None
