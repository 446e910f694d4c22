"""A training in processes of its own: `python train_child.py FOLDER MODE` (or under torchrun) makes what tests compare.

MODE of SHARDING: an uninterrupted training of the shipped student to FOLDER/MODE; with -resumed: one from
the checkpoint of those at step 12; slow: a single training that waits a little in every step, so that it can be killed
in one. The trained weights go to <folder>/model, by `export`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from enhancer.checkpoints import CHECKPOINTS  # noqa: E402
from enhancer.data.samples import Sample  # noqa: E402
from enhancer.processes import Process  # noqa: E402
from enhancer.shipped import student_path  # noqa: E402
from enhancer.train_settings import AlignmentSettings, LoraSettings, TrainSettings  # noqa: E402
from enhancer.training import train  # noqa: E402
from enhancer.video.clip import Sampling  # noqa: E402
from tests.enhancer.priors import prior_of  # noqa: E402
from vlm_hooks.export import export  # noqa: E402
from vlm_hooks.families import load_student  # noqa: E402

ANSWERS = ["up", "down", "to the left", "up", "round", "it stops", "left", "away"]
SETTINGS = TrainSettings(
    steps=20, batch_size=2, learning_rate_llm=3e-3, learning_rate_merger=3e-3, learning_rate_vision=1e-3, log_every=5,
    save_every=12, warmup=0.1, alignment=AlignmentSettings(aligner="conv3d"),
)
CUT = 12
SHARDING = {
    "ddp": {}, "fsdp2": {"fsdp": "launch/fsdp2.json"}, "zero2": {"deepspeed": "launch/zero2.json"},
    "zero3": {"deepspeed": "launch/zero3.json"},
    "zero3lora": {"deepspeed": "launch/zero3.json", "lora": LoraSettings(rank=4)},
}


def samples_in(folder: Path) -> list[Sample]:
    return [Sample(f"s{n}", folder / f"{n}.mp4", f"Where goes ball {n}?", answer) for n, answer in enumerate(ANSWERS)]


def run(root: Path, folder: Path, settings: TrainSettings, progress=None) -> int:
    torch.manual_seed(0)
    student = load_student(student_path("world"))
    result = train(student, samples_in(root), settings, folder, prior_of, Sampling(frames=4), progress=progress)
    if Process.this().rank == 0:
        export(student, folder / "model")
    return result.start_step


def several(root: Path, mode: str) -> None:
    parallel, _, resumed = mode.partition("-")
    settings = replace(SETTINGS, **SHARDING[parallel])
    if resumed:
        settings = replace(settings, resume=str(root / parallel / CHECKPOINTS / f"checkpoint-{CUT}"))
    assert run(root, root / mode, settings) == (CUT if resumed else 0)


def shard_on_cpus() -> None:
    """Says MULTI_GPU for MULTI_CPU: accelerate (1.15, AcceleratorState) takes up an FSDP plugin on accelerators alone
    and gives processes on CPUs whole copies, though torch's FSDP2 works on gloo. There is no setting for it. Users get
    an error instead (AlignedTrainer); here all the rest of the way is walked on CPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def said_otherwise(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = said_otherwise


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for mode in sys.argv[2:]:
        if mode == "slow":
            settings = replace(SETTINGS, save_every=3, log_every=1, batch_size=4)
            run(root, root / "slow", settings, progress=lambda *_: time.sleep(0.15))
            continue
        if mode.startswith("fsdp2"):
            shard_on_cpus()
        several(root, mode)
