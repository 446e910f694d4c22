"""How a score was made: everything that must be equal before two of them may be compared, kept beside the answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from enhancer.data.samples import Sample
from enhancer.evaluation.parsing import RULES
from enhancer.recipe import differences
from enhancer.runfolder import machine, read_json, versions, write_json
from enhancer.video.clip import FrameCache, Sampling
from vdm_priors.errors import UserError

FILE = "protocol.json"
PROTOCOLS = ("option_text", "letter", "generate")
DECODING = {
    "option_text": "likelihood of every option's text as the answer, with its end token; the prompt does not list them",
    "letter": "likelihood of every option's letter after a prompt that lists the options",
    "generate": "greedy generation after a prompt that lists the options and asks for the letter; what the answer "
    f"means is decided by the rules of version {RULES}",
}
# what may change between two calls that fill one folder
FREE = ("machine", "versions", "batch_size", "example")


@dataclass
class Protocol:
    """model, data: with their hashes; request: what asks for the letter (None: no options are listed); new_tokens: at
    most so many are generated (None: nothing is); example: of the first clip that can be read, its prompt, its frames'
    pixels in the file and the visual tokens that it became, and what the checkpoint adds to greedy decoding."""

    benchmark: str | None
    model: dict[str, str]
    data: dict[str, Any]
    protocol: str
    request: str | None
    frames: int
    fps: float | None
    new_tokens: int | None
    dtype: str
    batch_size: int
    decoding: str = ""
    example: dict[str, Any] | None = None
    machine: str = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        self.decoding = DECODING[self.protocol]

    def keep(self, folder: Path) -> None:
        """Writes protocol.json; UserError, with what differs, if the folder holds answers of another protocol."""
        kept, ours = read_json(folder / FILE, None), asdict(self)
        if kept is not None:
            lines = differences(_binding(kept), _binding(ours))
            if lines:
                listed = "\n".join(f"  - {line}" for line in lines)
                raise UserError(
                    f"{folder} holds answers that were made otherwise; what differs:\n{listed}\nGive another --out, or "
                    f"--fresh to ask everything again."
                )
        write_json(folder / FILE, ours)


def _binding(values: dict) -> dict:
    return {key: value for key, value in values.items() if key not in FREE}


def example_of(
    student: Any, samples: list[Sample], sampling: Sampling, cache: FrameCache, request: str | None
) -> dict[str, Any] | None:
    """What the student is shown for the first sample that it can take; None where it can take none of the first few.

    request: as Protocol's.
    """
    for sample in samples[:8]:
        try:
            clip = cache.get(sample.video, sampling)
            listed = {} if request is None else {"options": sample.options, "request": request}
            prompt = student.prompt(sample.question, **listed).text
            inputs = student.encode([clip], [prompt]).inputs
            grid = student.grids(inputs, [clip])[0][0].shape
        except UserError:
            continue
        return {
            "id": sample.id,
            "prompt": prompt,
            "frames": len(clip.frames),
            "pixels": list(clip.frames.shape[1:3]),
            "visual_tokens": list(grid),
            "tokens": int(inputs["attention_mask"].sum()),
        }
    return None
