"""A codec adapter of your own: extend/adapters/pace.py on the shipped student, trained for a few steps.

    python examples/add_adapter.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from clips import samples

import vlm_hooks.adapters

# the file belongs into vlm_hooks/adapters/; while you try it out, add its folder to that package's path instead
vlm_hooks.adapters.__path__.append(str(Path(__file__).parent / "extend" / "adapters"))

from enhancer.adapters.gop_clips import keyed_clip  # noqa: E402
from enhancer.adapters.gops import GopReading, plan_gops, read_gops  # noqa: E402
from enhancer.shipped import quiet_libraries, student_path  # noqa: E402
from vlm_hooks.adapters import find_adapter  # noqa: E402
from vlm_hooks.adapters.model import AdapterModel  # noqa: E402
from vlm_hooks.families import load_student  # noqa: E402

quiet_libraries()
torch.manual_seed(0)
batch = samples()[:4]
how = GopReading(fuse=2, size=(64, 64), longest=32)
clips = []
for sample in batch:
    plan = plan_gops(sample.video, how)
    clips.append(keyed_clip(list(read_gops(sample.video, how, plan=plan)), plan, how.fuse, keys=4))

host = load_student(student_path("world"))
model = AdapterModel.create(host, find_adapter("pace"))
encoding = model.student.encode(clips, [model.student.prompt(sample.question).text for sample in batch],
                                [sample.answer for sample in batch])
grids = model.student.segments(encoding.inputs, clips)[0]
print(f"{len(clips[0].frames)} key frames; {sum(s.num_tokens for s, _ in grids if not s.moving)} tokens of frames, "
      f"{sum(s.num_tokens for s, _ in grids if s.moving)} of motion")

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(4):
    output = model(**encoding.inputs)
    output.loss.backward()
    moved = model.adapter.project.weight.grad.norm()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {output.loss.item():.3f}, gradient on the adapter {moved:.2e}")

with tempfile.TemporaryDirectory() as folder:  # the adapter, and the host too, since it was trained with it
    model.save_pretrained(folder)
    again = AdapterModel.from_pretrained(None, folder)
    with torch.no_grad():
        assert torch.equal(model(**encoding.inputs).logits, again(**encoding.inputs).logits)
    print("saved and loaded: the same logits bit for bit")
