"""What the contract matrix of families needs: their inputs, what diffusers' own attention sees, and a softmax by loops.

Legend: B entries, F latent frames, C channels, h×w latent pixels, H heads of one layer, s queries, k keys.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from tests.vdm_priors.tiny_families import FAMILIES, FRAMES, SIZE, tiny_family
from tests.vdm_priors.tiny_teacher import generator, random_clip

MODULES = {"cogvideox15": "cogvideox", "wan22": "wan", "hunyuan": "hunyuan_video"}
SEPARATE = ("wan", "wan22", "ltx")  # text is attended to by cross-attention
MASKED = ("ltx", "hunyuan", "mochi")  # padding of the text is hidden
TEXTS = ["the red ball moves left", "it spins"]
every_family = pytest.mark.parametrize("name", FAMILIES)


def latents_of(name, batch=2, seed=0, size=SIZE):
    """Noise of the shape that a clip's latents have, [B, F, C, h, w]."""
    teacher = tiny_family(name)
    pixels = teacher.prepare_frames(random_clip(FRAMES[name]).frames, size)
    shape = teacher.encode_video(pixels).shape[1:]
    return torch.randn(batch, *shape, generator=generator(seed))


def text_of(name, batch=2):
    return tiny_family(name).encode_text(TEXTS[:batch])[0]


def middle(name, shape):
    """A timestep of the schedule, told to the first stage where there are two."""
    return tiny_family(name).schedule(shape).levels(4)[3].timestep


@contextmanager
def own_attention(teacher, monkeypatch):
    """q, k, v, mask, out of every call that diffusers' own processors make, by the name of their module."""
    calls, inside, hooks = {}, [], []
    plain = torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, value, attn_mask=None, **options):
        out = plain(query, key, value, attn_mask=attn_mask, **options)
        if inside:
            calls.setdefault(inside[-1], []).append((query, key, value, attn_mask, out))
        return out

    models = {id(model): model for model in [teacher.transformer, getattr(teacher, "transformer_2", None)] if model}
    for number, model in enumerate(models.values()):
        for path, module in model.named_modules():
            if hasattr(module, "processor"):
                label = (number, f"{path}.processor")
                hooks.append(module.register_forward_pre_hook(lambda *_, label=label: inside.append(label)))
                hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    yield calls
    monkeypatch.undo()
    for hook in hooks:
        hook.remove()


def softmax_by_rows(q_hsd, k_hkd, mask_1k=None):
    """Probabilities [H, s, k] of one entry, every row on its own, in float64."""
    heads, rows, width = q_hsd.shape
    p = torch.zeros(heads, rows, k_hkd.shape[1], dtype=torch.float64)
    for h in range(heads):
        for r in range(rows):
            logits = (k_hkd[h].double() @ q_hsd[h, r].double()) / width**0.5
            if mask_1k is not None:
                mask = mask_1k[min(h, len(mask_1k) - 1)].flatten()
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            weights = (logits - logits.max()).exp()
            p[h, r] = weights / weights.sum()
    return p


def entries_of(calls):
    """(q, k, v, mask, out) of each batch entry, whether it was called for in one batch or alone (Mochi)."""
    for query, key, value, mask, out in calls:
        for i in range(len(query)):
            yield query[i], key[i], value[i], None if mask is None else mask[i], out[i]


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=0)


def times_of(name):
    """Arguments of token_grid for the family's clip."""
    frames = FRAMES[name]
    return [i / 8 for i in range(frames)], frames / 8, (0.1, 0.0, 0.9, 1.0), SIZE
