"""Means over layers and forwards of what a harvest keeps, summed where they lie.

Legend: B harvested batch entries, H heads (layers × heads where layers are kept apart).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vdm_priors.errors import ModelError


class RunningMeans:
    """Named float32 means [B, H, rows, columns], of all layers together or of each by itself."""

    def __init__(self, by_layer: bool) -> None:
        self.by_layer = by_layer
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._counts: dict[str, dict[int, int]] = {}
        self._means: dict[str, Tensor] = {}

    def add(
        self, name: str, layer: int, shape: Sequence[int], device: torch.device, parts: Iterable[tuple[Any, Tensor]]
    ) -> None:
        """Add a layer's numbers [B, heads, rows, columns] of a forward: (index, values), together all of them.

        Raises ModelError if the shape is not that of the forwards before.
        """
        sums, counts = self._sums.setdefault(name, {}), self._counts.setdefault(name, {})
        place = layer if self.by_layer else 0
        counts[place] = counts.get(place, 0) + 1
        if place not in sums:
            sums[place] = torch.empty(tuple(shape), device=device)
            for where, values in parts:
                sums[place][where] = values
            return
        if sums[place].shape != tuple(shape):
            raise ModelError(
                f"Harvest: {name} was [B, heads, rows, columns] = {list(sums[place].shape)}, and is {list(shape)} in a "
                f"later forward. Harvest clips of one size and one batch at a time."
            )
        for where, values in parts:
            sums[place][where] += values

    def mean(self, name: str) -> Tensor:
        """The mean [B, H, rows, columns] of what was added, layers in order. Raises ModelError if nothing was."""
        if name in self._means:
            return self._means[name]
        if name not in self._sums:
            raise ModelError("Harvest: nothing was recorded. Run the teacher inside `with harvest(...)`.")
        sums, counts = self._sums[name], self._counts[name]
        return torch.cat([sums[place] / counts[place] for place in sorted(sums)], dim=1)

    def close(self) -> None:
        """Nothing is added any more: sums become means in place, for they may be larger than all else of a clip."""
        for name, sums in self._sums.items():
            for place, total in sums.items():
                total /= self._counts[name][place]
            means = [sums[place] for place in sorted(sums)]
            self._means[name] = means[0] if len(means) == 1 else torch.cat(means, dim=1)
        self._sums.clear()
