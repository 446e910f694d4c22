"""Captured rows against the dense softmax of the same real classes.

B samples, H query heads, R rows, C columns, S sequence positions.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import is_dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from tests.vlm_hooks.tiny_student import make_clip, save_tiny_student, tiny_student
from vlm_hooks.attention_rows import allowed_keys
from vlm_hooks.capture import CaptureError, CaptureRequest, _store, attention_heads, capture, check_token_types
from vlm_hooks.families import load_student

LAYERS = 3


@pytest.fixture(scope="module")
def student():
    return tiny_student()


def encode(student, padding_side="right"):
    """Two samples of different lengths: the shorter is padded."""
    clips = [make_clip(4), make_clip(5, 48, 32, seed=1)]
    prompts = [student.prompt("Where does it go?").text, student.prompt("It?").text]
    encoding = student.encode(clips, prompts, ["left", "up"], padding_side=padding_side)
    _, columns = student.grids(encoding.inputs, clips)
    return encoding.inputs, columns


def request_for(inputs, columns, **settings):
    """A few rows of each sample, the last real token among them."""
    rows = []
    for mask, positions in zip(inputs["attention_mask"], columns, strict=True):
        real = mask.nonzero()[:, 0]
        rows.append([int(positions[-1]) + 2, int(real[-1]), int(positions[2])][: len(rows) + 2])
    return CaptureRequest.from_positions(rows, columns, **settings), rows


def run(student, inputs, request):
    with capture(student.model):
        return student.model(**inputs, motion_capture=request)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_rows_equal_dense_softmax(tmp_path, padding_side, key_heads):
    folder = save_tiny_student(tmp_path, num_key_value_heads=key_heads)
    student, eager = load_student(folder), load_student(folder, attn="eager")
    inputs, columns = encode(student, padding_side)
    request, rows = request_for(inputs, columns)
    with torch.no_grad():
        run(student, inputs, request)
        dense = eager.model(**inputs, output_attentions=True).attentions
    dense = torch.stack(dense).mean(dim=(0, 2))  # [B, S, S]
    rows_brc = request.mean()
    assert rows_brc.dtype == torch.float32 and request.captured_layers == [0, 1, 2]
    for b, (wanted, cols) in enumerate(zip(rows, columns, strict=True)):
        got = rows_brc[b, : len(wanted), : len(cols)]
        assert (got - dense[b][wanted][:, cols]).abs().max() <= 1e-6
        assert got.sum() > 0.01
        assert rows_brc[b, len(wanted) :].abs().sum() == 0
        assert rows_brc[b, :, len(cols) :].abs().sum() == 0


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_chosen_layers_are_averaged(student, layers):
    inputs, columns = encode(student)
    every, _ = request_for(inputs, columns)
    some, _ = request_for(inputs, columns, layers=layers)
    with torch.no_grad():
        run(student, inputs, every)
        run(student, inputs, some)
    assert some.captured_layers == layers
    torch.testing.assert_close(some.mean(), sum(every.layer(i) for i in layers) / len(layers))
    with pytest.raises(CaptureError, match="was not captured"):
        some.layer(5)


@pytest.mark.parametrize("kind", ["none", "bool", "float", "half"])
def test_every_kind_of_mask(kind):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    module = nn.Module()
    module.scaling, module.is_causal = 0.5, True
    allowed = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6).clone()
    if kind != "none":
        allowed[1, :, :, 0] = False  # padding on the left: row 0 of sample 1 sees nothing
    mask = {"none": None, "bool": allowed}.get(kind)
    if kind in ("float", "half"):
        dtype = torch.float32 if kind == "float" else torch.float16
        mask = torch.zeros(2, 1, 6, 6, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    request = CaptureRequest.from_positions([[0, 3, 5]] * 2, [[0, 1, 4]] * 2)
    got = attention_heads(request, module, query, key, mask)
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.5
    dense = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(got, dense[:, :, [0, 3, 5]][..., [0, 1, 4]])


@pytest.mark.parametrize("training", [False, True])
def test_output_is_bit_identical_and_gradients_too(student, training):
    inputs, columns = encode(student)
    student.model.train(training)
    request, _ = request_for(inputs, columns)
    plain = student.model(**inputs)
    captured = run(student, inputs, request)
    assert torch.equal(plain.logits, captured.logits) and torch.equal(plain.loss, captured.loss)
    weight = student.model.model.language_model.layers[0].self_attn.q_proj.weight
    gradients = [torch.autograd.grad(out.loss, weight)[0] for out in (plain, captured)]
    assert torch.equal(*gradients)
    student.model.eval()


def test_gradient_reaches_every_captured_layer_and_the_vision_tower():
    student = tiny_student()
    inputs, columns = encode(student)
    request, _ = request_for(inputs, columns)
    run(student, inputs, request)
    request.mean().square().sum().backward()
    for layer in student.model.model.language_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            assert projection.weight.grad.abs().max() > 0
    assert student.model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("backward_inside", [False, True])
def test_non_reentrant_checkpointing_gives_equal_gradients(backward_inside):
    gradients = []
    for checkpointing in (False, True):
        student = tiny_student()
        student.model.train()
        if checkpointing:
            student.model.activation_checkpointing_enable({"use_reentrant": False})
        inputs, columns = encode(student)
        request, _ = request_for(inputs, columns)
        output = run(student, inputs, request)
        loss = output.loss + request.mean().square().sum()
        captured = [request.layer(index) for index in request.captured_layers]
        with capture(student.model) if backward_inside else nullcontext():
            loss.backward()
        assert request.captured_layers == [0, 1, 2]
        assert all(request.layer(index) is rows for index, rows in enumerate(captured)), "captured once more"
        gradients.append([p.grad for p in student.model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_reentrant_checkpointing_is_refused():
    student = tiny_student()
    student.model.train()
    student.model.activation_checkpointing_enable({"use_reentrant": True})
    inputs, columns = encode(student)
    request, _ = request_for(inputs, columns)
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        run(student, inputs, request)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before_on_exit(student, fails):
    model = student.model
    before = model.config.to_json_string()
    try:
        with capture(model):
            assert model.config.vision_config._attn_implementation == "sdpa"
            assert model.config._attn_implementation == "sdpa"
            assert "motion_capture" not in model.config.to_json_string()
            if fails:
                raise KeyError("stop")
    except KeyError:
        pass
    for config in (model.config, model.config.text_config, model.config.vision_config):
        assert config._attn_implementation == "sdpa"
    assert model.config.to_json_string() == before
    assert not model._forward_pre_hooks


def test_wrapped_models_are_unwrapped(student):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    inputs, columns = encode(student)
    request, _ = request_for(inputs, columns)
    wrapped = Wrapper(student.model)
    with torch.no_grad(), capture(wrapped):
        wrapped(**inputs, motion_capture=request)
    assert request.captured_layers == [0, 1, 2]
    with pytest.raises(CaptureError, match="not a transformers model"), capture(nn.Linear(1, 1)):
        pass


def test_nothing_captured_says_why(student):
    inputs, columns = encode(student)
    outside, _ = request_for(inputs, columns)
    with torch.no_grad():
        student.model(**inputs, motion_capture=outside)
    with pytest.raises(CaptureError, match="not called inside"):
        outside.mean()
    single = CaptureRequest.from_positions([[0]], [[0]])
    ids = inputs["input_ids"][:1, :1]
    with torch.no_grad(), capture(student.model):
        student.model(input_ids=ids, motion_capture=single)
    with pytest.raises(CaptureError, match="single query"):
        single.mean()


def test_wrong_requests_are_refused(student):
    inputs, columns = encode(student)
    cases = [
        (CaptureRequest.from_positions([[0], [0]], columns, layers=[3]), "layers are 0 to 2"),
        (CaptureRequest.from_positions([[0], [0]], columns, layers=[]), "names no layer"),
        (CaptureRequest.from_positions([[0]], columns[:1]), "1 samples, but the model got 2"),
        (CaptureRequest.from_positions([[0], [999]], columns), "position 999"),
        ({"rows": [0]}, "must be a CaptureRequest, not dict"),
    ]
    for request, message in cases:
        with torch.no_grad(), pytest.raises(CaptureError, match=message):
            run(student, inputs, request)
    request, _ = request_for(inputs, columns)
    with torch.no_grad():
        run(student, inputs, request)
        with pytest.raises(CaptureError, match="already served"):
            run(student, inputs, request)
    with pytest.raises(ValueError, match="bool row_mask"):
        CaptureRequest(torch.zeros(1, 2).long(), torch.ones(1, 2), *[torch.zeros(1, 1).long()] * 2)
    with capture(student.model):
        with pytest.raises(CaptureError, match="capture that is open"), capture(student.model):
            pass
        assert student.model.config.text_config._attn_implementation == "motion_capture"
    with pytest.raises(CaptureError, match="'eager'"), capture(tiny_student(attn="eager").model):
        pass


def test_a_cache_does_not_confuse_rows():
    student = tiny_student()  # the model keeps the last batch's M-RoPE deltas
    inputs, _ = encode(student)
    ids = inputs["input_ids"][:1, :12]
    with torch.no_grad():
        past = student.model(input_ids=ids[:, :6], use_cache=True).past_key_values
        request = CaptureRequest.from_positions([[1]], [[0]])
        with capture(student.model), pytest.raises(CaptureError, match="without past_key_values"):
            student.model(input_ids=ids[:, 6:], past_key_values=past, motion_capture=request)


def test_packed_samples_do_not_see_each_other(student):
    ids = torch.arange(10)[None]
    positions = torch.cat([torch.arange(5), torch.arange(5)])[None]
    request = CaptureRequest.from_positions([[7]], [list(range(10))])
    packed = torch.stack([positions] * 4)  # text positions first: transformers' packed form
    with torch.no_grad(), capture(student.model):
        student.model(
            input_ids=ids, position_ids=packed, use_cache=False, motion_capture=request
        )
    row = request.mean()[0, 0]
    assert row[:5].sum() == 0 and row[8:].sum() == 0
    torch.testing.assert_close(row[5:8].sum(), torch.tensor(1.0))


def test_reentrant_checkpointing_is_recognised_by_its_missing_gradient_mode():
    """The refusal above rests on reentrant checkpointing's first pass running without grad."""
    modes = []

    def note(x):
        modes.append(torch.is_grad_enabled())
        return x * 2

    for reentrant in (True, False):
        checkpoint(note, torch.ones(1, requires_grad=True), use_reentrant=reentrant)
    assert modes == [False, True]


# -- attention that is not sdpa ---------------------------------------------------------


def stand_in_flash(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
    """What flash attention computes from what it is given: a padding mask [B, S] or none, causality by the module."""
    assert attention_mask is None or attention_mask.ndim == 2
    length = query.shape[2]
    allowed = torch.ones(length, length).tril().bool()[None, None]
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, :].bool()
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash_student():
    """transformers' own mask for flash attention, and a function with its signature: the package needs a GPU."""
    AttentionInterface.register("test_fl", stand_in_flash)
    AttentionMaskInterface.register("test_fl", flash_attention_mask)
    student = tiny_student()
    student.model.set_attn_implementation({"text_config": "test_fl"})
    return student


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_rows_beside_flash_attention(flash_student, student, padding_side):
    inputs, columns = encode(flash_student, padding_side)
    ours, rows = request_for(inputs, columns)
    theirs, _ = request_for(inputs, columns)
    with torch.no_grad():
        plain = flash_student.model(**inputs).logits
        assert torch.equal(plain, run(flash_student, inputs, ours).logits)
        run(student, inputs, theirs)
    torch.testing.assert_close(ours.mean(), theirs.mean(), atol=1e-6, rtol=1e-4)
    assert flash_student.model.config.text_config._attn_implementation == "test_fl"


def test_packed_rows_beside_flash_attention_are_refused(flash_student):
    ids, packed = torch.arange(10)[None], torch.cat([torch.arange(5), torch.arange(5)])[None]
    for extra in ({"position_ids": torch.stack([packed] * 4)}, {"cu_seq_lens_q": torch.tensor([0, 5, 10])}):
        request = CaptureRequest.from_positions([[7]], [[0]])
        with torch.no_grad(), capture(flash_student.model), pytest.raises(CaptureError, match="packed in one row"):
            flash_student.model(input_ids=ids, use_cache=False, motion_capture=request, **extra)


def test_a_sliding_window_is_re_applied():
    allowed, _ = allowed_keys(torch.tensor([[0, 3, 5]]), 6, True, None, window=2)
    assert allowed[0, 0].int().tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]


def test_a_sliding_window_without_a_mask_reaches_the_rows(flash_student):
    for layer in flash_student.model.model.language_model.layers:
        layer.self_attn.sliding_window = 4
    request = CaptureRequest.from_positions([[9]], [list(range(10))])
    with torch.no_grad():
        run(flash_student, {"input_ids": torch.arange(10)[None]}, request)
    row = request.mean()[0, 0]
    assert row[:6].tolist() == [0.0] * 6 and (row[6:] > 0).all() and float(row.sum()) == pytest.approx(1)


KINDS = st.sampled_from(["none", "padding", "bool", "float"])


@given(seed=st.integers(0, 10**6), key_heads=st.sampled_from([1, 2, 4]), kind=KINDS)
@settings(max_examples=12, deadline=None)
def test_backward_of_the_mean_is_that_of_the_dense_softmax(seed, key_heads, kind):
    torch.manual_seed(seed)
    batch, heads, length, size = 2, 4, 7, 3
    query = torch.randn(batch, heads, length, size).requires_grad_()
    key = torch.randn(batch, key_heads, length, size).requires_grad_()
    real = torch.ones(batch, length).bool()
    real[1, :2] = False
    dense_mask = torch.ones(length, length).tril().bool() & (real[:, None, None, :] if kind != "none" else True)
    mask = {"none": None, "padding": real.long(), "bool": dense_mask}.get(kind)
    if kind == "float":
        mask = torch.zeros(dense_mask.shape).masked_fill(~dense_mask, torch.finfo(torch.float32).min)
    request = CaptureRequest.from_positions([[0, 4, 6], [5]], [[1, 2], [2, 4, 5]])
    module = nn.Module()
    module.scaling, module.is_causal, module.layer_idx = 0.7, True, 0
    request.start(1, batch, length)
    _store(request, module, query, key, mask, {})
    scores = query @ key.repeat_interleave(heads // key_heads, dim=1).transpose(2, 3) * 0.7
    dense = scores.masked_fill(~dense_mask, -torch.inf).softmax(-1).nan_to_num(0.0).mean(1)
    expected = torch.zeros(2, 3, 3)
    for b, (rows, cols) in enumerate((([0, 4, 6], [1, 2]), ([5], [2, 4, 5]))):
        for r, row in enumerate(rows):
            for c, column in enumerate(cols):
                expected[b, r, c] = dense[b, row, column]
    torch.testing.assert_close(request.mean(), expected)
    weights = torch.randn(2, 3, 3)
    gradients = [torch.autograd.grad((rows * weights).sum(), (query, key)) for rows in (request.mean(), expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_half_precision_scores_are_not_rounded(student):
    inputs, columns = encode(student)
    full, _ = request_for(inputs, columns)
    cast, _ = request_for(inputs, columns)
    with torch.no_grad():
        run(student, inputs, full)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(student, inputs, cast)
    assert cast.mean().dtype == torch.float32
    assert (cast.mean() - full.mean()).abs().max() < 0.03  # of the activations' rounding alone
    student = tiny_student()
    student.model.to(torch.bfloat16)
    half, _ = request_for(inputs, columns)
    inputs = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in inputs.items()}
    run(student, inputs, half).loss.backward(retain_graph=True)
    half.mean().square().sum().backward()
    assert half.mean().dtype == torch.float32
    assert student.model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0


def test_what_capture_keeps_for_the_backward_pass_is_small(student):
    """Neither scores nor probabilities over all keys: the queries' rows and masks; the keys are the attention's own."""
    torch.manual_seed(0)
    batch, heads, length, size = 1, 4, 512, 8
    query, key = (torch.randn(batch, h, length, size, requires_grad=True) for h in (heads, 2))
    request = CaptureRequest.from_positions([[300, 400, 511]], [range(256)])
    module = nn.Module()
    module.scaling, module.is_causal, module.layer_idx = 0.7, True, 0
    request.start(1, 1, length)
    _store(request, module, query, key, None, {})
    saved = request.mean().grad_fn  # through stack and mean
    while not hasattr(saved, "saved_tensors") or type(saved).__name__ != "MeanRowsBackward":
        saved = saved.next_functions[0][0]
    own = [t for t in saved.saved_tensors if t is not None and t.data_ptr() != key.data_ptr()]
    assert sum(t.numel() * t.element_size() for t in own if t.is_floating_point()) <= 3 * heads * size * 4
    assert sum(t.numel() for t in own if t.dtype == torch.bool) <= 3 * length + 3 * 256


# -- what is refused --------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["softcap", "s_aux"])
def test_attention_that_rows_do_not_follow_is_refused(student, extra):
    request = CaptureRequest.from_positions([[7]], [[0]])
    with torch.no_grad(), pytest.raises(CaptureError, match=f"attention has {extra}"):
        run(student, {"input_ids": torch.arange(10)[None], extra: torch.tensor(30.0)}, request)


def test_dropped_token_types_are_refused(student):
    inputs, columns = encode(student)
    request, _ = request_for(inputs, columns)
    without = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    with torch.no_grad(), pytest.raises(CaptureError, match="no mm_token_type_ids.*one dimension"):
        run(student, without, request)
    check_token_types(student.model, inputs)
    check_token_types(student.model, {"input_ids": inputs["input_ids"]})  # nothing visual


def test_compiled_models_are_refused():
    student = tiny_student()
    with pytest.raises(CaptureError, match="torch.compile"), capture(torch.compile(student.model, backend="eager")):
        pass
    student.model.model.language_model.layers[1].compile(backend="eager")
    with pytest.raises(CaptureError, match="torch.compile"), capture(student.model):
        pass


def test_a_request_is_opaque_to_wrappers_that_rebuild_arguments():
    """FSDP2 rebuilds dataclasses among a forward's arguments: rows captured in the copy would be lost."""
    from torch.utils._pytree import tree_leaves

    request = CaptureRequest.from_positions([[0]], [[0]])
    assert not is_dataclass(request) and tree_leaves({"motion_capture": request}) == [request]
