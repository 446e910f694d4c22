"""A training in processes of its own: `python train_child.py FOLDER MODE` (or under torchrun) makes what tests compare.

MODE ddp, fsdp2: an uninterrupted training to FOLDER/MODE-whole, and one from its checkpoint 12 to FOLDER/MODE-resumed;
MODE slow: a single training that waits a little in every step, so that it can be killed in one.
The trained weights go to <folder>/model, by `export`.
"""

from __future__ import annotations

import shutil
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
from enhancer.train_settings import AlignmentSettings, TrainSettings  # noqa: E402
from enhancer.training import HISTORY, train  # noqa: E402
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


def samples_in(folder: Path) -> list[Sample]:
    return [Sample(f"s{n}", folder / f"{n}.mp4", f"Where goes ball {n}?", answer) for n, answer in enumerate(ANSWERS)]


def run(root: Path, folder: Path, settings: TrainSettings, progress=None) -> int:
    torch.manual_seed(0)
    student = load_student(root / "student")
    result = train(student, samples_in(root), settings, folder, prior_of, Sampling(frames=4), progress=progress)
    if Process.this().rank == 0:
        export(student, folder / "model")
    return result.start_step


def whole_and_resumed(root: Path, mode: str) -> None:
    settings = replace(SETTINGS, fsdp="launch/fsdp2.json" if mode == "fsdp2" else None)
    whole, resumed = root / f"{mode}-whole", root / f"{mode}-resumed"
    assert run(root, whole, settings) == 0
    if Process.this().rank == 0:
        shutil.copytree(whole / CHECKPOINTS / f"checkpoint-{CUT}", resumed / CHECKPOINTS / f"checkpoint-{CUT}")
        shutil.copy(whole / HISTORY, resumed / HISTORY)
    torch.distributed.barrier()
    assert run(root, resumed, settings) == CUT


def shard_on_cpus() -> None:
    """accelerate shards over GPUs alone and gives processes on CPUs whole copies, though torch's FSDP2 works on gloo:
    what it asks for is said otherwise here, so that the rest of the way is walked on CPUs."""
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
        if mode == "fsdp2":
            shard_on_cpus()
        whole_and_resumed(root, mode)
