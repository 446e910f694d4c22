"""Alignment inside a training loop of your own: capture, match words, compare, step. No Trainer, no recipe.

    python examples/align_in_your_loop.py
"""

from __future__ import annotations

import torch
from clips import samples, world

from enhancer.shipped import quiet_libraries, student_path
from enhancer.filling import fill_store, stored_prior
from enhancer.sources import SourceContext, build_source
from enhancer.video.clip import Sampling, read_clip
from enhancer.world.truth import load_truth
from vdm_priors.store import PriorStore
from vlm_hooks.alignment import align_batch
from vlm_hooks.capture import CaptureRequest, capture
from vlm_hooks.families import load_student
from vlm_hooks.words import match_words

WEIGHT = 1.0  # λ
quiet_libraries()
torch.manual_seed(0)
batch, sampling = samples()[:4], Sampling(frames=8)

# priors: here the world's ground truth; "frame_difference", "codec", "flow" or "vdm" are made the same way
store = PriorStore(world() / "priors")
source = build_source("oracle", SourceContext(samples=batch, store=store, sampling=sampling, truth=load_truth(world())))
filled = fill_store(source, batch, store)
priors = [stored_prior(store, key) for _, key in filled.rows]

# a batch: stock inputs of the model, and where its visual tokens and its words are
student = load_student(student_path("world"))               # or "Qwen/Qwen2.5-VL-3B-Instruct", …
clips = [read_clip(sample.video, sampling) for sample in batch]
prompts = [student.prompt(sample.question) for sample in batch]
encoding = student.encode(clips, [prompt.text for prompt in prompts], [sample.answer for sample in batch])
grids, columns = student.grids(encoding.inputs, clips)
matches = [match_words(prior.words, prior.text, text, offsets, prompt.question_start)
           for prior, text, offsets, prompt in zip(priors, encoding.texts, encoding.offsets, prompts, strict=True)]
optimizer = torch.optim.AdamW(student.model.parameters(), lr=1e-3)

for step in range(6):
    request = CaptureRequest.from_positions([match.rows for match in matches], columns)
    with capture(student.model):
        output = student.model(**encoding.inputs, motion_capture=request)
    aligned = align_batch(request, matches, grids, priors, compare_on="student")
    (output.loss + WEIGHT * aligned.loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: answers {output.loss.item():.3f}, alignment {aligned.loss.item():.3f} "
          f"({aligned.words_matched} of {aligned.words_total} words)")

student.model.save_pretrained(world() / "aligned")           # stock weights: nothing of this package is needed to use them
