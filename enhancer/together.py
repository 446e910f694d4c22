"""Several processes train one student after another: `torchrun` and `accelerate launch` start them.

Process 0 keeps the run folder: it alone makes the data's world, checks, exports, evaluates and reports. For every
training it calls the others, which wait in between; no wait is too long, since evaluations take hours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from enhancer.processes import Process
from vdm_priors.errors import UserError

PATIENCE = timedelta(days=30)  # how long a process waits to be called
END = -1


class Together:
    """The processes of one launch, and the calls of process 0. One process alone calls nobody."""

    def __init__(self, process: Process, group: Any) -> None:
        self.process, self._group = process, group

    @classmethod
    @contextmanager
    def joined(cls, process: Process, device: str) -> Iterator[Together]:
        """Connects the processes; all of them must come here. device: cpu, or cuda for a GPU each."""
        if process.count == 1:
            yield cls(process, None)
            return
        import torch.distributed as dist
        from accelerate import PartialState

        # The group of the training, which transformers' Trainer finds. On GPUs also for tensors in main memory, as
        # accelerate opens it where FSDP2 keeps whole state dicts: the Trainer cannot ask for that any more.
        PartialState(cpu=True) if device == "cpu" else PartialState(backend="cuda:nccl,cpu:gloo")
        yield cls(process, dist.new_group(backend="gloo", timeout=PATIENCE))
        dist.destroy_process_group()  # not after an error: the others may never come to it

    def call(self, number: int) -> None:
        """Process 0: let the others begin the training of that number, or end (END)."""
        if self._group is not None:
            self._send(number)

    def calls(self) -> Iterator[int]:
        """The other processes: the number of every training, as process 0 begins it. UserError where it is gone."""
        try:
            while (number := self._send(END)) != END:
                yield number
        except RuntimeError as error:
            raise UserError("process 0 has ended, and said why.") from error

    def wait(self) -> None:
        """Returns when all processes have come here. UserError where one is gone."""
        if self._group is None:
            return
        import torch.distributed as dist

        try:
            dist.barrier(group=self._group)
        except RuntimeError as error:
            raise UserError("another process has ended, and said why.") from error

    def _send(self, number: int) -> int:
        import torch
        import torch.distributed as dist

        message = torch.tensor([number])
        dist.broadcast(message, src=0, group=self._group)
        return int(message)
