"""The benchmarks that are known by name: their question types and sizes, published scores, and files to hand in.

Their rows are read by enhancer/data/formats.py and asked by enhancer/evaluation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from enhancer.recipe import nearest_name
from vdm_priors.errors import UserError

AUTO = "auto"


@dataclass(frozen=True)
class Benchmark:
    """types: short name to the long one in files; counts: scored questions of each; form: of rows (data.format)."""

    name: str
    title: str
    form: str
    types: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int | None:
        """How many questions are scored, None where that is not fixed."""
        return sum(self.counts.values()) or None

    def short(self, question_type: str) -> str:
        """A question type's short name; others as they are."""
        named = {long.casefold(): short for short, long in self.types.items()}
        return named.get(question_type.casefold(), question_type)


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "motionbench",
            "MotionBench (dev)",
            "motionbench",
            {
                "MR": "Motion Recognition",
                "LM": "Location-related Motion",
                "CM": "Camera Motion",
                "MO": "Motion-related Objects",
                "AO": "Action Order",
                "RC": "Repetition Count",
            },
            {"MR": 1478, "LM": 546, "CM": 385, "MO": 690, "AO": 519, "RC": 400},
        ),
        Benchmark(
            "favor",
            "FAVOR-Bench",
            "favor",
            {
                "AS": "Action Sequence",
                "HAC": "Holistic Action Classification",
                "SAD": "Single Action Detail",
                "MAD": "Multiple Action Details",
                "CM": "Camera Motion",
                "NSM": "Non-Subject Motion",
            },
            {"AS": 2637, "HAC": 1541, "SAD": 1662, "MAD": 1205, "CM": 1075, "NSM": 64},
        ),
        Benchmark(
            "ema_motionbench",
            "MotionBench of EMA",
            "plain",
            {"Lin": "Linear", "Cur": "Curved", "Rot": "Rotation", "Con": "Contact"},
            {"Lin": 800, "Cur": 500, "Rot": 300, "Con": 700},
        ),
        Benchmark("videomme", "Video-MME", "videomme"),
        Benchmark("motionvid_qa", "MotionVid-QA", "conversations"),
    )
}


def find_benchmark(name: str, forms: set[str], question_types: set[str]) -> Benchmark | None:
    """The benchmark of that name; `auto`: the one whose form and question types these are, None where there is none.

    Raises UserError with the nearest name.
    """
    if name != AUTO:
        if name not in BENCHMARKS:
            nearest = nearest_name(name, list(BENCHMARKS))
            raise UserError(
                f"There is no benchmark '{name}'"
                + (f"; did you mean '{nearest}'?" if nearest else "")
                + f" Known: {', '.join(BENCHMARKS)}."
            )
        return BENCHMARKS[name]
    for benchmark in BENCHMARKS.values():
        known = {text.casefold() for pair in benchmark.types.items() for text in pair}
        fits = (
            question_types and {kind.casefold() for kind in question_types} <= known
            if known
            else benchmark.form == "videomme"
        )
        if fits and forms == {benchmark.form}:
            return benchmark
    return None


@cache
def published(name: str) -> dict[str, Any]:
    """{"source", "protocol", "rows": [{"model", "frames", "reproduced", "overall", "average", "types"}]} of a
    benchmark, in per cent; no rows where none are known."""
    tables = json.loads(resources.files(__name__).joinpath("published.json").read_text(encoding="utf-8"))
    return tables.get(name, {"source": "", "protocol": "", "rows": []})
