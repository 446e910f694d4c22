"""The estimate of `enhancer validate` against forwards that really ran: arithmetic and time of the shipped teacher.

    python tests/benchmarks/bench_estimate.py [FOLDER]      another teacher instead, on the GPU where there is one
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from enhancer.shipped import teacher_path, torch_device
from vdm_priors.estimate import estimate
from vdm_priors.extract import ExtractionSettings
from vdm_priors.families import load_teacher

ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default="world")
    name = parser.parse_args().folder
    torch.set_num_threads(1)
    device = torch_device("auto")
    dtype = "float32" if device == "cpu" else "bfloat16"
    teacher = load_teacher(teacher_path(name), dtype=getattr(torch, dtype), device=device)
    cost = estimate(teacher, ExtractionSettings(), dtype=dtype)
    frames = torch.randint(0, 256, (cost.frames, *cost.size, 3), dtype=torch.uint8)
    latents = teacher.encode_video(teacher.prepare_frames(frames))
    text, _ = teacher.encode_text(["the red disc slides left"])
    timestep = teacher.schedule(latents.shape).levels(4)[3].timestep

    # on a CPU, CPU seconds of the one thread: other work on the machine stretches the clock
    clock = time.process_time if device == "cpu" else time.perf_counter

    def forward() -> float:
        begun = clock()
        teacher.predict(latents, timestep, text).cpu()
        return clock() - begun

    forward()
    seconds = [forward() for _ in range(ROUNDS)]
    with FlopCounterMode(display=False) as counter:
        forward()
    counted, median = counter.get_total_flops(), statistics.median(seconds)
    print(f"{name}: {cost.frames} frames {cost.size[0]}×{cost.size[1]}, {cost.vision_tokens} + {cost.text_tokens} "
          f"tokens, {dtype}")
    print(f"estimate {cost.forward_flops:.3g} FLOP, counted {counted:.3g}: ratio {cost.forward_flops / counted:.2f}")
    print(f"a forward {1000 * median:.1f} ms (median of {ROUNDS}, fastest {1000 * min(seconds):.1f}): "
          f"{counted / median / 1e12:.3g} TFLOP/s at the median, {counted / min(seconds) / 1e12:.3g} at the fastest")


if __name__ == "__main__":
    main()
