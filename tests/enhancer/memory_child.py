"""Three AdamW steps of a student folder on a clip of noise: prints its tokens and how much the peak memory grew."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil  # noqa: E402
import torch  # noqa: E402

from enhancer.losses import answer_loss  # noqa: E402
from tests.vlm_hooks.tiny_student import make_clip  # noqa: E402
from vlm_hooks.families import load_student  # noqa: E402

torch.set_num_threads(1)
light = load_student(Path(sys.argv[1]))
clip = make_clip(frames=32, height=128, width=128)
encoding = light.encode([clip], [light.prompt("Where does it go?").text], ["left"])
visual = int((encoding.inputs["mm_token_type_ids"] > 0).sum())
with torch.no_grad():
    light.model(**light.encode([make_clip()], ["<|vision_start|><|video_pad|><|vision_end|>"]).inputs)
del light
before = psutil.Process().memory_info().rss
student = load_student(Path(sys.argv[1]))
student.model.train()
for name, parameter in student.model.named_parameters():
    parameter.requires_grad_("visual" not in name or "merger" in name)
optimizer = torch.optim.AdamW([p for p in student.model.parameters() if p.requires_grad], fused=True)
inputs = dict(encoding.inputs)
labels = inputs.pop("labels")
for _ in range(3):
    answer_loss(student.model(**inputs, use_cache=False).logits, labels).backward()
    optimizer.step()
    optimizer.zero_grad()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"tokens": labels.shape[1], "visual": visual, "bytes": peak - before}))
