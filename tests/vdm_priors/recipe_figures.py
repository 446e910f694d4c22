"""What the headers of recipes/teachers and the table of docs/teachers.md say of a teacher's cost, from the estimate.

    python -m tests.vdm_priors.recipe_figures        prints them; test_recipe_figures.py compares
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from tests.vdm_priors.real_configs import write_configs
from vdm_priors.estimate import CARDS, PARTS, Estimate, estimate
from vdm_priors.families import load_skeleton
from vdm_priors.settings import ExtractionSettings

FOLDER = Path(__file__).parents[2] / "recipes" / "teachers"
# recipe: configurations of the published model it names
MODELS = {"cogvideox": "cogvideox-5b", "cogvideox15": "cogvideox15-5b", "wan21": "wan21-1.3b", "wan22": "wan22-5b",
          "ltx": "ltx-video", "hunyuan_video": "hunyuan-video", "mochi": "mochi-1"}
GPUS = (24, 40, 80)  # GB
ROOM = 1.2  # for the VAE's activations, which the estimate leaves out


@dataclass(frozen=True)
class Figures:
    """A recipe's cost. gigabytes: 2^30 bytes, as GPUs are sold."""

    model: str
    cost: Estimate

    @property
    def gigabytes(self) -> float:
        return self.cost.memory / 2**30

    @property
    def minutes(self) -> float:
        return self.cost.seconds(CARDS["H100"]) / 60

    def header(self) -> tuple[str, str]:
        """The beginnings of the lines Hardware and Minutes."""
        gpu = next(size for size in GPUS if size >= ROOM * self.gigabytes)
        thousand = float(f"{1000 * self.minutes:.2g}")
        return (f"# Hardware: priors one GPU of {gpu} GB (about {self.gigabytes:.0f} GB and the VAE's own; estimate)",
                f"# Minutes:  priors about {self.minutes:.2f} a clip on an H100, {thousand:.0f} for 1,000 clips "
                f"(estimate)")

    def row(self, recipe: str) -> str:
        """Of the table in docs/teachers.md."""
        cost, seconds = self.cost, 60 * self.minutes
        encoders = sum(cost.parameters.get(part, 0) for part in PARTS if part.startswith("text_encoder"))
        networks = sum(cost.parameters.get(part, 0) for part in PARTS if part.startswith("transformer"))
        billions = " + ".join(f"{count / 1e9:.2f}" for count in (networks, cost.parameters["vae"], encoders))
        return (f"| `{recipe}` | {self.model} | {billions} | {cost.frames} × {cost.size[0]} × {cost.size[1]} | "
                f"{cost.vision_tokens:,} | {_power(cost.forward_flops)} | {cost.forwards} | "
                f"{_power(cost.clip_flops)} | {seconds:.{0 if seconds >= 10 else 1}f} | {self.gigabytes:.0f} |")


def _power(flops: float) -> str:
    return f"{flops:.1e}".replace("e+", "e")


@cache
def figures(recipe: str) -> Figures:
    """Of one of recipes/teachers."""
    teacher = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8"))["teacher"]
    with tempfile.TemporaryDirectory() as folder:
        skeleton = load_skeleton(write_configs(MODELS[recipe], Path(folder)))
    cost = estimate(skeleton, ExtractionSettings(**teacher["extraction"]), teacher["sampling"]["frames"],
                    teacher["size"], teacher["batch_size"], teacher["dtype"])
    return Figures(teacher["model"], cost)


if __name__ == "__main__":
    for name in MODELS:
        print(figures(name).row(name), *figures(name).header(), sep="\n")
