"""One clip and one question to a motion prior: where does a video diffusion model look for each word?

    python examples/prior_of_a_clip.py
"""

from __future__ import annotations

import torch
from clips import samples

from enhancer.shipped import quiet_libraries, teacher_path
from enhancer.video.clip import Sampling, read_clip
from vdm_priors.extract import extract_priors
from vdm_priors.families import load_teacher
from vdm_priors.settings import ExtractionSettings

quiet_libraries()
sample = samples()[0]
clip = read_clip(sample.video, Sampling(frames=9))          # the shipped CogVideoX takes 9 frames
teacher = load_teacher(teacher_path("world"))               # or a diffusers folder, or "THUDM/CogVideoX-5b"
settings = ExtractionSettings(harvest_at="noise", direction="v2t", words="content", head_scope="layer_head",
                              reconstruction=False)
[prior] = extract_priors(teacher, [clip], [sample.question], settings)

print(sample.question)
print(f"{len(prior.words)} words × {prior.grid.frames} frames × {prior.grid.rows} × {prior.grid.columns} cells")
for word, map_fhw in zip(prior.words, prior.maps, strict=True):
    frame, row, column = torch.unravel_index(map_fhw.argmax(), map_fhw.shape)
    (start, end), (top, left, bottom, right) = prior.grid.cell(int(map_fhw.argmax()))
    print(f"  {word.text:8s} most at {start:.2f} to {end:.2f} s, x {left:.2f} to {right:.2f}, y {top:.2f} to {bottom:.2f}")
prior.save(sample.video.with_suffix(".prior.safetensors"))  # MotionPrior.load reads it, and runs no code
