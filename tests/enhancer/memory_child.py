"""Two AdamW steps of a student folder on clips of noise: prints the tokens and how much the peak memory grew.

    python memory_child.py FOLDER '{"batch_size": 2, "lora": {"rank": 8}}'      # keys of training
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil  # noqa: E402
import torch  # noqa: E402

from enhancer.losses import answer_loss  # noqa: E402
from enhancer.recipe import build  # noqa: E402
from enhancer.train_settings import TrainSettings  # noqa: E402
from tests.vlm_hooks.tiny_student import make_clip  # noqa: E402
from vlm_hooks.families import load_student  # noqa: E402
from vlm_hooks.lora import add_lora, is_adapter  # noqa: E402

torch.set_num_threads(1)
folder, settings = Path(sys.argv[1]), build(TrainSettings, json.loads(sys.argv[2]))
light = load_student(folder)
clips = [make_clip(frames=32, height=128, width=128)] * settings.batch_size
prompts = [light.prompt("Where does it go?").text] * settings.batch_size
inputs = light.encode(clips, prompts, ["left"] * settings.batch_size).inputs
visual = len(light.videos(inputs)[0][0].positions)
with torch.no_grad():
    light.model(**light.encode([make_clip()], prompts[:1]).inputs)  # what libraries set up at the first forward
del light
before = psutil.Process().memory_info().rss
student = load_student(folder)
student.model.train()
lora = settings.lora
if lora is not None:
    add_lora(student, lora.rank, lora.alpha, lora.dropout, lora.targets, lora.parts)
for part, members in student.parts().items():
    adapters_alone = lora is not None and part in lora.parts
    for name, parameter in members:
        rate = getattr(settings, f"learning_rate_{part}")
        parameter.requires_grad_(rate > 0 and (is_adapter(name) or not adapters_alone))
if settings.gradient_checkpointing:
    student.model.gradient_checkpointing_enable({"use_reentrant": False})
optimizer = torch.optim.AdamW([p for p in student.model.parameters() if p.requires_grad], fused=True)
labels = inputs.pop("labels")
for _ in range(2):
    answer_loss(student.model(**inputs, use_cache=False).logits, labels).backward()
    optimizer.step()
    optimizer.zero_grad()
# not getrusage's peak, which a process takes over from the one that started it
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"tokens": labels.shape[1], "visual": visual, "bytes": peak - before}))
