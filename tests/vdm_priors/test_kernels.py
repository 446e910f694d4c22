"""Log-sum-exp from the kernels: outputs are PyTorch's own bit for bit, and the numbers are those of a plain softmax."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from vdm_priors import kernels
from vdm_priors.families._processors import RecordingProcessor
from vdm_priors.kernels import attention_and_lse, log_sum_exp, probabilities, scaled_products, sharpened_lse

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
TYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}


def tensors(device="cpu", dtype=torch.float32, batch=2, heads=3, rows=37, keys=53, width=32):
    draw = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, rows, width), (batch, heads, keys, width), (batch, heads, keys, width))
    return [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]


def masks(keys=53, rows=37):
    hidden = torch.zeros(2, 1, 1, keys, dtype=torch.bool)
    hidden[0, ..., 40:] = True
    bias = torch.zeros(2, 1, 1, keys).masked_fill(hidden, -torch.inf)
    full = torch.randn(1, 3, rows, keys, generator=torch.Generator().manual_seed(1))
    return {"none": None, "bool": ~hidden, "bias": bias, "full bias": full}


def plain_lse(q, k, scale, bias=None):
    logits = q.double() @ k.double().transpose(2, 3) * scale
    return (logits if bias is None else logits + bias.double()).logsumexp(dim=-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", masks())
def test_output_is_bit_for_bit_and_lse_exact(device, dtype, kind):
    q, k, v = tensors(device, dtype)
    mask = masks()[kind]
    if mask is not None:
        mask = mask.to(device, torch.bool if kind == "bool" else dtype)
    out, lse = attention_and_lse(q, k, v, mask)
    assert torch.equal(out, scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    expected = plain_lse(q, k, 32**-0.5, kernels.as_bias(mask))
    torch.testing.assert_close(lse.double(), expected, atol=TYPES[dtype], rtol=0)


@pytest.mark.parametrize("kind", masks())
def test_a_kernel_without_lse_gives_the_same(monkeypatch, kind):
    q, k, v = tensors()
    mask = masks()[kind]
    fused = attention_and_lse(q, k, v, mask)
    monkeypatch.setattr(kernels, "_fused", lambda *given: None)
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 2 * 3 * 53 * 5)  # five rows at a time
    beside = attention_and_lse(q, k, v, mask)
    assert torch.equal(fused[0], beside[0])
    torch.testing.assert_close(fused[1], beside[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["none", "bias"])
def test_sums_of_powers_of_probabilities(power, kind):
    q, k, v = tensors()
    bias = masks()[kind]
    _, lse = attention_and_lse(q, k, v, bias)
    p = (q @ k.transpose(2, 3) * 32**-0.5 + (0 if bias is None else bias)).softmax(dim=-1)
    found = (sharpened_lse(q, k, 32**-0.5, power, bias) - power * lse).exp()
    torch.testing.assert_close(found, p.pow(power).sum(dim=-1), atol=1e-5, rtol=1e-4)


def test_log_sum_exp_of_one_row_at_a_time(monkeypatch):
    q, k, _ = tensors()
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(log_sum_exp(q, k, 0.3).double(), plain_lse(q, k, 0.3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [0.125, 0.3])
def test_products_are_those_of_the_very_numbers(device, dtype, scale):
    q, k, _ = tensors(device, dtype)
    found = scaled_products(q, k, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), q.double() @ k.double().transpose(2, 3) * scale, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["none", "bias", "full bias"])
@pytest.mark.parametrize("sharp", [1.0, 30.0])
def test_probabilities_are_a_softmaxs(device, kind, sharp):
    """Also of logits of hundreds, of which nearly all are 0."""
    q, k, _ = tensors(device)
    bias = masks()[kind]
    logits = q.double() @ k.double().transpose(2, 3) * sharp
    if bias is not None:
        bias = bias.to(device)
        logits = logits + bias.double()
    found = probabilities(q, k, logits.logsumexp(-1).float()[..., None], sharp, bias)
    expected = logits.softmax(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-30, rtol=float(logits.abs().max()) * 1e-6)


@pytest.mark.parametrize("scale", [0.125, 0.3])
def test_products_on_a_gpu_are_called_rightly(scale):
    """Shapes and types alone, where there is no GPU to compute on."""
    with FakeTensorMode():
        q = torch.empty(2, 3, 5, 8, device="cuda", dtype=torch.bfloat16)
        found = scaled_products(q[:, 1:, ::2], torch.empty(2, 2, 7, 8, device="cuda", dtype=torch.bfloat16), scale)
    assert (found.shape, found.dtype) == ((2, 2, 3, 7), torch.float32)


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("backend", [None, "native", "_native_math"])
def test_the_dispatchers_attention_with_its_log_sum_exp(kind, backend):
    """Of PyTorch's own backend the very call's, beside any other; outputs are the dispatcher's bit for bit."""
    (q, k, v), mask = tensors(), masks()[kind]
    kernel = RecordingProcessor(backend=backend).kernel()
    out, none = kernel(q, k, v, attn_mask=mask)
    again, lse = kernel(q, k, v, attn_mask=mask, lse=True)
    assert none is None and torch.equal(out, again)
    torch.testing.assert_close(lse.double(), plain_lse(q, k, 32**-0.5, kernels.as_bias(mask)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend, calls", [("native", 1), ("_native_math", 0)])
def test_a_backend_that_is_set_for_a_while_is_respected(monkeypatch, backend, calls):
    q, k, v = tensors()
    made = []
    own = kernels.attention_and_lse
    monkeypatch.setattr(kernels, "attention_and_lse", lambda *given: (made.append(1), own(*given))[1])
    with attention_backend(backend):
        RecordingProcessor().kernel()(q, k, v, lse=True)
    assert len(made) == calls
