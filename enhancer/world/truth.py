"""Ground truth of a world folder: masks, flow and per-word evidence, rendered again from the stored scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from enhancer.world.render import render_masks
from enhancer.world.scene import Scene
from enhancer.world.text import CAMERA, Mention
from vdm_priors.errors import UserError
from vdm_priors.grid import TokenGrid, frame_spans, regrid
from vdm_priors.words import Word


class WorldTruth:
    """Scenes and texts of one world folder, by video file name."""

    def __init__(self, records: dict[str, dict]):
        self._records = records

    def __contains__(self, video: str) -> bool:
        return Path(video).name in self._records

    def _record(self, video: str) -> dict:
        try:
            return self._records[Path(video).name]
        except KeyError:
            raise UserError(f"{video}: no scene of this name in the world's scenes.jsonl; the oracle source works on clips "
                            "made by `enhancer world make` only.") from None

    def scene(self, video: str) -> Scene:
        return Scene.from_dict(self._record(video)["scene"])

    def mentions(self, video: str, text: str) -> list[Mention]:
        """Which characters of a known text speak of which thing. Raises UserError for a text not of this clip."""
        texts = self._record(video)["texts"]
        if text not in texts:
            raise UserError(f"{video}: the world has no ground truth for the text {text!r}; it knows: {list(texts)}")
        return [Mention(*m) for m in texts[text]]

    def evidence(self, video: str, text: str, words: list[Word], grid: TokenGrid) -> torch.Tensor:
        """Ground-truth mass per word, [W, F, H, W'] float32, rows summing to 1 (or to 0: a word without evidence).

        A word that names a thing, or its motion, has that thing's visible pixels over the whole clip as evidence; a word
        of the camera's motion has the whole frame.
        """
        scene = self.scene(video)
        masks = np.stack([render_masks(scene, n) for n in range(scene.frames)], axis=1)  # [n, N, H, W]
        values = torch.zeros(len(words), scene.frames, scene.height, scene.width)
        mentions = self.mentions(video, text)
        for row, word in enumerate(words):
            for mention in mentions:
                if word.start < mention.end and mention.start < word.end:
                    seen = 1.0 if mention.thing == CAMERA else torch.from_numpy(masks[mention.thing]).float()
                    values[row] = torch.maximum(values[row], torch.as_tensor(seen))
        times = [n / scene.fps for n in range(scene.frames)]
        source = TokenGrid.regular(frame_spans(times, scene.frames / scene.fps), scene.height, scene.width)
        mass = regrid(values, source, grid)
        return mass / mass.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)


def load_truth(folder: Path | str) -> WorldTruth:
    """Read <folder>/scenes.jsonl. Raises UserError if the folder is no world."""
    path = Path(folder) / "scenes.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: not found; ground truth exists only for worlds made by `enhancer world make`.")
    with path.open(encoding="utf-8") as lines:
        return WorldTruth({record["video"]: record for record in map(json.loads, lines)})
