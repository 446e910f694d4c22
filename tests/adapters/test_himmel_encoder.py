"""HY-Himmel's encoder, its scan, its gates and the losses of its first stage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm_priors.errors import SampleError
from vlm_hooks.adapters.himmel_alignment import AlignmentHead, MotionAlignment, anchor_difference, two_way_infonce
from vlm_hooks.adapters.himmel_encoder import STREAMS, HimmelConfig, StreamFusion, TriStreamEncoder
from vlm_hooks.adapters.state_space import MotionSSM, StateSpaceBlock, scan

SMALL = dict(rows=2, columns=3, width=8, ssm_blocks=1, ssm_states=2, trunk_width=4, trunk_blocks=1)


def maps(count=3, steps=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(count, steps, 4, 6, generator=generator) > 0.2
    displacement = (torch.rand(count, steps, 4, 6, 2, generator=generator) - 0.5) * valid[..., None] / 4
    error = torch.rand(count, steps, 3, 32, 48, generator=generator) - 0.5
    context = torch.rand(count, 3, 32, 48, generator=generator) - 0.5
    known = torch.arange(steps) < torch.tensor([steps, 2, 0])[:count, None]
    vectors = torch.cat([displacement * 4, valid[..., None]], dim=-1)
    return dict(vectors=vectors, errors=error, context=context, known=known)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 17), st.integers(0, 10))
def test_the_scan_is_the_loop(length, seed):
    generator = torch.Generator().manual_seed(seed)
    decay, inflow = torch.rand(2, 2, length, 3, dtype=torch.float64, generator=generator)
    state, expected = torch.zeros(2, 3, dtype=torch.float64), []
    for step in range(length):
        state = decay[:, step] * state + inflow[:, step]
        expected.append(state)
    torch.testing.assert_close(scan(decay, inflow), torch.stack(expected, dim=1))


def test_the_scans_gradient_is_the_loops():
    decay, inflow = (torch.rand(1, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(scan, (decay, inflow))


def test_a_block_is_mambas_recurrence():
    block, tokens = StateSpaceBlock(4, states=2).double(), torch.randn(1, 5, 4, dtype=torch.float64)
    values, gate = block.enter(block.norm(tokens))[0].chunk(2, dim=-1)
    values, state, expected = torch.nn.functional.silu(values), torch.zeros(8, 2, dtype=torch.float64), []
    for step in range(5):
        into, out_of = block.select(values[step]).chunk(2)
        pace = torch.nn.functional.softplus(block.pace(values[step]))
        for i in range(8):
            for s in range(2):
                state[i, s] = (
                    torch.exp(-pace[i] * block.log_rates[i, s].exp()) * state[i, s]
                    + pace[i] * values[step, i] * into[s]
                )
        read = state @ out_of + block.skip * values[step]
        expected.append(tokens[0, step] + block.leave(read * torch.nn.functional.silu(gate[step])))
        state = state.clone()
    torch.testing.assert_close(block(tokens, torch.ones(1, 5, dtype=torch.bool))[0], torch.stack(expected))


def test_steps_that_are_not_known_do_not_matter():
    ssm = MotionSSM(8, blocks=2, states=2)
    tokens, known = torch.randn(2, 6, 8), torch.tensor([[1, 1, 0, 1, 0, 0], [0] * 6]).bool()
    alone = ssm(tokens[:1, [0, 1, 3]], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(ssm(tokens, known)[:1], alone)
    torch.testing.assert_close(ssm(tokens, known)[1], ssm.nothing)
    assert (
        ssm(tokens[:, [1, 0, 3]], torch.ones(2, 3, dtype=torch.bool))[:1] - alone
    ).abs().max() > 1e-4  # order counts


@pytest.mark.parametrize("encoder", ["ssm", "conv"])
@pytest.mark.parametrize("fusion", ["gated", "mlp", "weighted", "concat"])
def test_every_encoder_and_fusion_learns_and_ignores_padding(encoder, fusion):
    reader = TriStreamEncoder(HimmelConfig(**SMALL, encoder=encoder, fusion=fusion))
    inputs = maps()
    fused, hidden, weights = reader(**inputs)
    assert fused.shape == (3, 6, 8) and list(hidden) == list(STREAMS)
    fused.square().sum().backward()
    learning = {name for name, p in reader.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learning == {name for name, _ in reader.named_parameters()}
    if fusion in ("gated", "weighted"):
        torch.testing.assert_close(sum(weights.values()), torch.ones(3))
    reader.eval()
    fused = reader(**inputs)[0]
    spoilt = {name: value.clone() for name, value in inputs.items()}
    spoilt["vectors"][~inputs["known"]], spoilt["errors"][~inputs["known"]] = 9.0, -9.0
    torch.testing.assert_close(reader(**spoilt)[0], fused, rtol=0, atol=0)
    torch.testing.assert_close(reader(**{n: v[1:2] for n, v in inputs.items()})[0], fused[1:2])


@pytest.mark.parametrize(
    "streams", [("motion",), ("residual", "motion"), ("motion", "context"), ("residual", "context")]
)
def test_a_stream_left_out_has_no_weights_and_no_effect(streams):
    reader = TriStreamEncoder(HimmelConfig(**SMALL, streams=list(streams))).eval()
    inputs = maps()
    fused, hidden, weights = reader(**inputs)
    assert list(hidden) == list(weights) == [stream for stream in STREAMS if stream in streams]
    names = {"motion": "vectors", "residual": "errors", "context": "context"}
    for stream, name in names.items():
        other = reader(**{**inputs, name: inputs[name] * 0.5 + 0.01})[0]
        assert torch.equal(other, fused) == (stream not in streams)


@pytest.mark.parametrize("rows, columns, cells", [(4, 4, (8, 8)), (2, 3, (8, 12)), (4, 2, (32, 32))])
def test_what_moves_is_told_by_the_place_where_it_moves(rows, columns, cells):
    """Where few cells of vectors come to many places, no place reads what lies on the other side of the frame."""
    torch.manual_seed(0)
    reader = TriStreamEncoder(HimmelConfig(**{**SMALL, "rows": rows, "columns": columns}, streams=["motion"])).eval()
    still = torch.zeros(1, 1, *cells, 3)
    moving = still.clone()
    moving[:, :, : cells[0] // rows, : cells[1] // columns, 0] = 1.0
    rest = {"errors": torch.zeros(1, 1, 3, 8, 8), "context": torch.zeros(1, 3, 8, 8), "known": torch.ones(1, 1).bool()}
    with torch.no_grad():
        change, before = (reader(vectors, **rest)[0] for vectors in (moving, still))
    moved = (change - before).norm(dim=-1).view(rows, columns)
    assert moved[0, 0] > 2 * moved[-1, -1]


def test_gates_are_equations_3_and_4():
    fusion, values = StreamFusion(HimmelConfig(**SMALL)), {s: torch.randn(2, 6, 8) for s in STREAMS}
    fused, weights = fusion(values)
    for n in range(2):
        shares = torch.zeros(3)
        for p in range(6):
            h_mv, h_res, h_ctx = (values[s][n, p] for s in STREAMS)
            g = torch.sigmoid(fusion.gates[0](torch.cat([h_mv, h_res])))
            h = g * h_mv + (1 - g) * h_res
            k = torch.sigmoid(fusion.gates[1](torch.cat([h, h_ctx])))
            torch.testing.assert_close(fused[n, p], k * h + (1 - k) * h_ctx)
            shares += torch.stack([(k * g).mean(), (k * (1 - g)).mean(), (1 - k).mean()]) / 6
        torch.testing.assert_close(torch.stack([weights[s][n] for s in STREAMS]), shares)


def test_infonce_is_the_sum_over_the_batch_both_ways():
    motion, target, temperature = torch.randn(4, 5), torch.randn(4, 5), torch.tensor(0.3)
    similar = [[float(torch.dot(m, t) / m.norm() / t.norm() / temperature) for t in target] for m in motion]
    total = 0.0
    for n in range(4):
        total -= math.log(math.exp(similar[n][n]) / sum(math.exp(similar[n][k]) for k in range(4))) / 8
        total -= math.log(math.exp(similar[n][n]) / sum(math.exp(similar[k][n]) for k in range(4))) / 8
    torch.testing.assert_close(two_way_infonce(motion, target, temperature), torch.tensor(total))


@pytest.mark.parametrize("objective", ["infonce", "mse", "both"])
def test_stage_1_is_least_where_motion_says_the_difference(objective):
    align, head = (
        MotionAlignment(HimmelConfig(**SMALL, streams=["motion"], alignment=objective), 8),
        torch.nn.Identity(),
    )
    align.branches["motion"].layers = head
    before, after = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    target = anchor_difference(before, after)
    fused = target[:, None].expand(-1, 6, -1)
    right = align(head, fused, {"motion": fused}, target)
    wrong = align(head, fused.roll(1, 0), {"motion": fused}, target)
    swapped = align(head, fused, {"motion": fused.roll(1, 0)}, target)
    assert right["loss"] < wrong["loss"] and right["loss"] < swapped["loss"]
    assert right["recall"] == 1 and wrong["recall"] == 0
    torch.testing.assert_close(target, torch.stack([a.mean(0) - b.mean(0) for a, b in zip(after, before, strict=True)]))


def test_what_cannot_be_is_refused():
    with pytest.raises(SampleError, match="needs two intervals"):
        MotionAlignment(HimmelConfig(**SMALL), 8)(torch.nn.Identity(), torch.randn(1, 6, 8), {}, torch.randn(1, 8))
    with pytest.raises(ValueError, match="infonce, mse, both"):
        HimmelConfig(alignment="cosine")
    with pytest.raises(ValueError, match="encoder must be one of ssm, conv"):
        HimmelConfig(encoder="vit")
    with pytest.raises(ValueError, match="needs motion or residual"):
        HimmelConfig(streams=["context"])


def test_the_head_keeps_its_width():
    assert AlignmentHead(8, 12)(torch.randn(2, 6, 8)).shape == (2, 6, 12)
