"""CoPE-VideoLM's Δ-encoder and what it is made of."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import resnet18

from vlm_hooks.adapters.conv_trunk import ConvTrunk
from vlm_hooks.adapters.cope_encoder import CoPEConfig, DeltaEncoder, _patches
from vlm_hooks.adapters.cope_pretraining import DeltaPretraining, next_frame_recall
from vlm_hooks.adapters.query_transformer import QueryTransformer, TransformerLayer, sine_positions

SMALL = CoPEConfig(motion_tokens=2, residual_tokens=3, width=16, layers=1, heads=2, trunk_width=4, trunk_blocks=1)


def maps(count=2, rows=4, columns=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    displacement = torch.rand(count, rows, columns, 2, generator=generator) - 0.5
    valid = torch.rand(count, rows, columns, generator=generator) > 0.3
    error = torch.rand(count, 3, 8 * rows, 8 * columns, generator=generator) - 0.5
    return torch.cat([displacement * valid[..., None], valid[..., None]], dim=-1), error


def test_the_trunk_is_resnet18s():
    theirs = resnet18().eval()
    pictures = torch.randn(1, 3, 64, 64)
    for stride in (32, 16):
        ours = ConvTrunk(stride=stride).eval()
        ours.load_state_dict({n: v for n, v in theirs.state_dict().items() if not n.startswith("fc.")})
        if stride == 32:
            expected = torch.nn.Sequential(*list(theirs.children())[:-2])(pictures)
            torch.testing.assert_close(ours(pictures), expected, rtol=0, atol=0)
    assert ours(pictures).shape == (1, 512, 4, 4)  # stride 16: H/16, as the paper has its residual features
    with pytest.raises(ValueError, match="stride must be 8, 16 or 32"):
        ConvTrunk(stride=4)


def test_a_transformer_layer_is_pre_norm_attention_and_mlp():
    layer, tokens = TransformerLayer(8, 2), torch.randn(1, 3, 8)
    query, key, value = layer.qkv(layer.norm_attention(tokens))[0].split(8, dim=-1)
    expected = torch.zeros(3, 8)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        for s in range(3):
            weights = torch.softmax(torch.stack([query[s, part] @ key[t, part] / 2 for t in range(3)]), 0)
            expected[s, part] = sum(weights[t] * value[t, part] for t in range(3))
    after = tokens + layer.out(expected)
    torch.testing.assert_close(layer(tokens), after + layer.mlp(layer.norm_mlp(after)))


def test_queries_read_all_tokens_in_any_number():
    reader = QueryTransformer(8, 1, 2, queries=3)
    assert reader(torch.randn(2, 5, 8)).shape == reader(torch.randn(2, 50, 8)).shape == (2, 3, 8)


def test_positions_say_the_same_of_the_same_place_in_finer_grids():
    coarse, fine = sine_positions(2, 2, 16), sine_positions(6, 6, 16)
    torch.testing.assert_close(fine.reshape(6, 6, 16)[1::3, 1::3].reshape(4, 16), coarse)
    assert len({tuple(row.tolist()) for row in sine_positions(9, 13, 16)}) == 9 * 13


def test_patches_are_the_cells_of_16_pixels():
    cells = torch.arange(3 * 5 * 3.0).reshape(1, 3, 5, 3)
    patches, rows, columns = _patches(cells)
    assert (rows, columns) == (2, 3)
    for row in range(2):
        for column in range(3):
            inside = [
                cells[0, r, c] if r < 3 and c < 5 else torch.zeros(3)
                for r in (2 * row, 2 * row + 1)
                for c in (2 * column, 2 * column + 1)
            ]
            torch.testing.assert_close(patches[0, row * 3 + column], torch.cat(inside))


def test_tokens_come_from_both_branches_and_every_weight_learns():
    encoder = DeltaEncoder(SMALL, hidden=12)
    tokens = encoder(*maps())
    assert tokens.shape == (2, 5, 12)
    tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    encoder.eval()
    vectors, errors = maps()
    valid = vectors * torch.tensor([0, 0, 1])
    before, still = encoder(vectors, errors), encoder(valid, errors)
    assert (before[:, :2] - still[:, :2]).abs().max() > 1e-4  # motion tokens change with motion alone
    torch.testing.assert_close(before[:, 2:], still[:, 2:])
    blind = encoder(torch.zeros_like(vectors), errors)
    assert (blind[:, :2] - still[:, :2]).abs().max() > 1e-4  # not known is another thing than not moving


def test_a_frame_alone_gives_what_it_gives_in_a_batch():
    encoder = DeltaEncoder(SMALL, hidden=12).eval()
    inputs = maps(3)
    torch.testing.assert_close(encoder(*inputs)[1:2], encoder(*(value[1:2] for value in inputs)))


def test_where_things_move_changes_the_tokens():
    encoder, (vectors, errors) = DeltaEncoder(SMALL, hidden=12).eval(), maps()
    assert (encoder(vectors.flip(2), errors) - encoder(vectors, errors))[:, :2].abs().max() > 1e-4


def test_the_encoder_has_less_than_15_million_parameters_in_the_papers_width():
    with torch.device("meta"):
        count = sum(p.numel() for p in DeltaEncoder(CoPEConfig(), hidden=1152).parameters())
        wide = sum(p.numel() for p in DeltaEncoder(CoPEConfig(width=1152), hidden=1152).parameters())
    assert 14e6 < count < 15e6
    assert wide > 130e6  # what "hidden dimension d" would be: the two cannot both hold


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="normalise must be one of fixed, clip"):
        CoPEConfig(normalise="frame")
    with pytest.raises(ValueError, match="motion_tokens must be at least 1"):
        CoPEConfig(motion_tokens=0)
    with pytest.raises(ValueError, match="must be a multiple of heads"):
        CoPEConfig(width=20, heads=3)


def test_pretraining_begins_as_the_frame_before_and_learns_from_both_branches():
    torch.manual_seed(0)
    encoder, pretraining = DeltaEncoder(SMALL, hidden=12), DeltaPretraining(SMALL, hidden=12)
    before, target = torch.randn(2, 3, 4, 12), torch.randn(2, 3, 4, 12)
    _, first = pretraining(before, encoder(*maps()), target)
    torch.testing.assert_close(first["loss"], (before - target).square().mean())
    assert first["of_copying"] == 1
    parameters = [*encoder.parameters(), *pretraining.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(12):
        loss = pretraining(before, encoder(*maps()), target)[1]["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.9 * first["loss"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_retrieval_ranks_as_loops_do():
    frames, queries = torch.randn(6, 2, 3), torch.randn(5, 2, 3)
    found = next_frame_recall(queries, frames, torch.arange(1, 6))
    for t in range(1, 6):
        query = queries[t - 1].flatten()
        cosines = {n: float(query @ frames[n].flatten() / frames[n].norm()) for n in range(6) if n != t - 1}
        rank = sorted(cosines, key=cosines.get, reverse=True).index(t)
        assert [bool(found[k][t - 1]) for k in (1, 2, 5)] == [rank < 1, rank < 2, rank < 5]
    assert all(hit.all() for hit in next_frame_recall(frames[1:], frames, torch.arange(1, 6)).values())
    assert not next_frame_recall(torch.ones(2, 4), torch.ones(3, 4), torch.arange(1, 3))[
        1
    ].any()  # all alike: nothing is found
