"""One row a step in history.jsonl: what the losses, the words and the waiting for data were, over all processes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SUMS = ("loss", "ar_loss", "alignment_loss", "words_matched", "words_total", "video_mass", "aligned", "data_seconds")


def waiting_share(rows: Sequence[dict]) -> float | None:
    """The share of a training's time that was spent waiting for batches, its first tenth left out; None without a step.

    rows: of history.jsonl. The first steps wait for the worker processes to start.
    """
    rows = [row for row in rows if row.get("data_seconds") is not None]
    rows = rows[math.ceil(len(rows) / 10):]
    seconds = sum(row["seconds"] for row in rows)
    return sum(row["data_seconds"] for row in rows) / seconds if seconds else None


def rows_until(path: Path, steps: int) -> list[dict]:
    """Rows of a history.jsonl up to that step; those after it come again. None for 0; the last line may be cut."""
    lines = path.read_text(encoding="utf-8").splitlines() if steps else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if row["step"] <= steps]


class StepLog:
    """Sums the values of a step's batches, joins those of all processes, and writes them; process 0 alone writes.

    A row has: step; loss = ar_loss + λ · alignment_loss, means over the step; words_matched of words_total; video_mass,
    the share of the matched words' attention that falls on the video; ar_grad_norm and alignment_grad_norm, every so
    many steps, on parameters that both losses reach; learning_rate; seconds of the step, data_seconds of them spent
    waiting for its batches (mean over processes) and data_share, how much of the step that is. None stands for what
    there was not.
    """

    def __init__(self, path: Path, accelerator: Any) -> None:
        self.path = path
        self.rows: list[dict] = []
        self._accelerator = accelerator
        self._sums: dict[str, Any] = {}
        self._gradients: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor | float) -> None:
        """Add to the step's sums; tensors stay on their device until the step ends."""
        for name, value in values.items():
            assert name in SUMS, name
            self._sums[name] = self._sums.get(name, 0.0) + (value.detach() if isinstance(value, Tensor) else value)

    def add_gradients(self, parameters: Sequence[nn.Parameter], **losses: Tensor) -> None:
        """Add to the step's gradients of each loss on those of the parameters that all losses reach.

        Their .grad is left alone. Which these are must be the same in all batches of a step, and in all processes.
        """
        found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                 for loss in losses.values()]
        shared = [all(gradient is not None for gradient in each) for each in zip(*found, strict=True)]
        for name, gradients in zip(losses, found, strict=True):
            reached = [gradient.detach() for gradient, counts in zip(gradients, shared, strict=True) if counts]
            before = self._gradients.get(name)
            self._gradients[name] = reached if before is None else [a + b for a, b in zip(before, reached, strict=True)]

    def finish(self, step: int, learning_rate: float, seconds: float) -> dict:
        """The step's row, which is kept and written; the sums begin anew. All processes must call it."""
        sums = self._joined()
        norms = {f"{name}_grad_norm": self._norm(parts) for name, parts in self._gradients.items()}
        self._sums, self._gradients = {}, {}
        matched, waited = int(sums["words_matched"]), sums["data_seconds"] / self._accelerator.num_processes
        row = {
            "step": step, "loss": sums["loss"], "ar_loss": sums["ar_loss"],
            "alignment_loss": sums["alignment_loss"] if sums["aligned"] else None,
            "words_matched": matched, "words_total": int(sums["words_total"]),
            "video_mass": sums["video_mass"] / matched if matched else None,
            "ar_grad_norm": norms.get("ar_grad_norm"), "alignment_grad_norm": norms.get("alignment_grad_norm"),
            "learning_rate": learning_rate, "seconds": round(seconds, 4),
            "data_seconds": round(waited, 4), "data_share": round(waited / seconds, 4) if seconds else None,
        }
        self.rows.append(row)
        if self._accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def _joined(self) -> dict[str, float]:
        device = self._accelerator.device
        sums = [self._sums.get(name, 0.0) for name in SUMS]
        values = torch.stack([torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in sums])
        if self._accelerator.num_processes > 1:
            # GPUs of some kinds have no float64
            values = self._accelerator.reduce(values.to(device, torch.float32), "sum").double()
        return dict(zip(SUMS, values.tolist(), strict=True))

    def _norm(self, gradients: list[Tensor]) -> float:
        flat = torch.cat([gradient.float().flatten() for gradient in gradients])
        if self._accelerator.num_processes > 1:
            flat = self._accelerator.reduce(flat, "sum")
        return float(flat.norm())

    def rewind(self, steps: int) -> None:
        """Keep the rows of the first steps; those after them come again. None of them is kept for 0."""
        self.rows = rows_until(self.path, steps)
        if self._accelerator.is_main_process:
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        self._accelerator.wait_for_everyone()
