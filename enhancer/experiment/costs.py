"""What priors cost: seconds and bytes a clip of every source, kept in the pool as they are made."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from enhancer.recipe import to_plain
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import read_json, write_json
from enhancer.sources import SourceSpec
from vdm_priors.store import content_key


def cost_key(recipe: EnhanceRecipe, spec: SourceSpec) -> str:
    """Hash of what a source's cost depends on: its settings, and the data's."""
    plain = to_plain(recipe)
    teacher = {key: value for key, value in plain["teacher"].items() if key != "store"}
    for asked in [teacher, *plain["teachers"]]:
        asked["extraction"].pop("mode")  # a name for keys that are there
    return content_key(
        source=spec.label,
        teacher=teacher,
        teachers=plain["teachers"],
        sources=plain["sources"],
        world=plain["world"],
        root=plain["data"]["root"],
    )


def add_cost(shared: Path, key: str, label: str, seconds: float, made: int, sizes: list[int]) -> None:
    """Adds what `made` priors took, decoding and the teacher's loading in it, to what earlier ones took."""
    path = shared / "costs" / f"{key}.json"
    before = read_json(path, {"label": label, "made": 0, "seconds": 0.0})
    write_json(
        path,
        {
            "label": label,
            "made": before["made"] + made,
            "seconds": before["seconds"] + (seconds if made else 0.0),
            "bytes": statistics.fmean(sizes),
        },
    )


def cost_of(shared: Path, recipe: EnhanceRecipe, spec: SourceSpec) -> dict[str, Any]:
    """{"seconds", "bytes"} a clip, None where not known; seconds with those of the sources that it is made from."""
    own = read_json(shared / "costs" / f"{cost_key(recipe, spec)}.json", {})
    seconds = own["seconds"] / own["made"] if own.get("made") else None
    for part in spec.of:
        inside = cost_of(shared, recipe, part)["seconds"]
        seconds = None if seconds is None or inside is None else seconds + inside
    return {"seconds": seconds, "bytes": own.get("bytes")}
