"""The aligner's own optimizer: it is no part of the model, so no wrapper averages, shards, clips or exports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = "aligner.safetensors"


class AlignerSteps:
    """Steps an aligner beside the model, at `rate` times the course of the model's learning rate.

    optimizer_class, arguments: of the Trainer, so that both are trained alike; accelerator: averages over processes.
    Without an aligner that has parameters nothing is done.
    """

    def __init__(self, aligner: nn.Module | None, rate: float, args: Any, optimizer_class: type, arguments: dict,
                 accelerator: Any) -> None:
        self.parameters = [] if aligner is None else list(aligner.parameters())
        self.aligner, self._rate, self._args, self._accelerator = aligner, rate, args, accelerator
        self._optimizer = None
        if self.parameters:
            kinds = ((True, args.weight_decay), (False, 0.0))  # biases have one dimension and no decay
            groups = [{"params": [p for p in self.parameters if (p.ndim > 1) == matrices], "weight_decay": decay}
                      for matrices, decay in kinds]
            self._optimizer = optimizer_class(groups, **arguments)

    def step(self, course: float) -> None:
        """One step; course: the model's learning rate as a share of its peak."""
        if self._optimizer is None:
            return
        for parameter in self.parameters:
            if parameter.grad is None:  # no word of this process was aligned
                parameter.grad = torch.zeros_like(parameter)
            if self._args.world_size > 1:
                parameter.grad = self._accelerator.reduce(parameter.grad, "mean")
        if self._args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters, self._args.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * course
        self._optimizer.step()
        self._optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        """Weights and the optimizer's moments, in one file of a checkpoint."""
        if self._optimizer is not None:
            save_file(self._tensors(), folder / FILE)

    def load(self, folder: Path) -> None:
        """What `save` wrote, if it wrote anything."""
        if self._optimizer is None or not (folder / FILE).is_file():
            return
        kept = load_file(folder / FILE)
        self.aligner.load_state_dict({name.removeprefix("weights."): tensor for name, tensor in kept.items()
                                      if name.startswith("weights.")})
        state = self._optimizer.state_dict()
        for name, tensor in kept.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, entry = rest.split(".")
                state["state"].setdefault(int(index), {})[entry] = tensor
        self._optimizer.load_state_dict(state)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"weights.{name}": tensor for name, tensor in self.aligner.state_dict().items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()})
        return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
