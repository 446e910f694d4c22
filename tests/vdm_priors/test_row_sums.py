"""Row statistics from the log-sum-exp against the maps written out, by plain loops, in chunks, and in real models.

Legend: H heads, S vision tokens, F frames.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vdm_priors.family_contract import latents_of, middle, text_of, times_of
from tests.vdm_priors.metric_loops import in_mask, make_grid, metrics_by_loops
from tests.vdm_priors.tiny_families import FAMILIES, FRAMES, SIZE, tiny_family
from vdm_priors import heads, row_sums
from vdm_priors.attention import Layout
from vdm_priors.conditioning import join_texts
from vdm_priors.errors import ModelError
from vdm_priors.harvest import HarvestRequest, harvest
from vdm_priors.heads import BandMask, HeadAccumulator, MotionMask, RowStatistics, head_metrics, sample_rows
from vdm_priors.memory import Streams, reference_memory
from vdm_priors.row_sums import Neighbourhoods

MASKS = [
    MotionMask(0), MotionMask(1), MotionMask(1, own_frame=False), BandMask(1.5, "places", "frame"),
    BandMask(1.0, "frames", "place", own_frame=False),
]
PARTS = ("mass", "inside", "outside", "same_place")
WIDTH = 8


@pytest.fixture(autouse=True)
def every_mask_is_narrow(monkeypatch):
    """Grids as small as the tests' have no mask that is small beside them."""
    monkeypatch.setattr(row_sums, "NARROW", 1.0)


def random_grid(seed: int, holes: bool):
    valid = torch.ones(3, 3, 4, dtype=torch.bool)
    if holes:
        valid = torch.rand(valid.shape, generator=torch.Generator().manual_seed(seed)) > 0.25
        valid[0, 0, 0] = valid[2, 2, 3] = True
    return make_grid(3, 3, 4, valid)


def drawn(seed: int, text: int, cells: int, references: int):
    """q [H, S, d]; for the clip and each reference its text's and its cells' keys; a bias that hides a text key."""
    draw = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(2, cells, WIDTH, generator=draw)
    keys = [tuple(torch.randn(2, n, WIDTH, generator=draw) for n in (text, cells)) for _ in range(1 + references)]
    bias = torch.zeros((1 + references) * text)
    if text > 1:
        bias[1] = -torch.inf
    return q, keys, bias


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from(MASKS), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 1),
    st.booleans(),
)
def test_statistics_are_those_of_the_map(seed, mask, holes, sampled, text, references, own):
    """Any mask, invalid cells, rows, text beside the cells or none, a reference whose cells are added or left out."""
    grid = random_grid(seed, holes)
    rows = sample_rows(grid, 9 if sampled else "all", seed)
    q, keys, bias = drawn(seed, text, grid.num_tokens, references)
    scale = WIDTH**-0.5
    everything = torch.cat([k for pair in keys for k in pair], dim=1)
    hidden = torch.cat([torch.cat([part, torch.zeros(grid.num_tokens)]) for part in bias.split(text)]
                       if text else [torch.zeros(everything.shape[1])])
    logits = (q.double() @ everything.double().transpose(1, 2)) * scale + hidden
    p = logits.softmax(-1).unflatten(-1, (len(keys), -1))[..., text:]
    attention = p[..., 0, :] if own else p.sum(dim=-2)

    taken = HeadAccumulator(grid, mask, rows)
    assert taken.reads_queries(q.device)
    shown = [cells for _, cells in keys[: 1 if own else None]]
    rest = None if own and references else torch.cat([words for words, _ in keys], dim=1)
    taken.add_queries(q, shown, logits.logsumexp(-1).float(), scale, rest, None if rest is None else bias)
    found = taken.statistics()

    chunks = HeadAccumulator(grid, mask, rows)
    chunks.add(attention[:, rows], rows)
    expected = chunks.statistics()
    assert torch.equal(found.rows, expected.rows)
    energy = expected.inside + expected.outside
    for name in PARTS:
        one, other = getattr(found, name), getattr(expected, name)
        # of energies, as parts of the row's: what lies outside M is a difference
        of = energy if name in ("inside", "outside") else torch.ones_like(one[..., :1].expand_as(one))
        assert ((one - other).abs() <= 1e-5 * of).all(), name
    torch.testing.assert_close(found.metrics().dfc, expected.metrics().dfc, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own_frame", [True, False])
def test_metrics_are_the_papers(own_frame):
    """The three metrics by plain loops over their definitions; here no entry lies within rounding of τ."""
    grid = random_grid(3, holes=True)
    q, keys, _ = drawn(3, 2, grid.num_tokens, 0)
    (words, cells), scale = keys[0], WIDTH**-0.5
    logits = (q @ torch.cat([words, cells], dim=1).transpose(1, 2)) * scale
    rows = sample_rows(grid, "all", 0)
    taken = HeadAccumulator(grid, MotionMask(1, own_frame), rows)
    taken.reads_queries(q.device)
    taken.add_queries(q, [cells], logits.logsumexp(-1), scale, words)
    found = taken.statistics().metrics()
    expected = metrics_by_loops(
        logits.double().softmax(-1)[:, rows, 2:], grid, rows.tolist(),
        lambda query, key: in_mask(query, key, grid, 1, own_frame), own_frame,
    )
    torch.testing.assert_close(torch.stack([found.dfc, found.tcs, found.dsr], dim=1), expected, rtol=1e-5, atol=0)


def test_neighbourhoods_are_the_masks():
    for mask in MASKS:
        for holes in (False, True):
            grid = random_grid(5, holes)
            rows = sample_rows(grid, 7, 1)
            near = Neighbourhoods.of(mask, grid, rows)
            held = torch.zeros(*near.cells.shape, grid.num_tokens, dtype=torch.bool)
            for u, f, n in near.inside.nonzero().tolist():
                assert not held[u, f, near.keys[u, n]]  # once each
                held[u, f, near.keys[u, n]] = True
            assert torch.equal(near.cells.flatten()[near.of_row], rows)
            assert torch.equal(held.flatten(0, 1)[near.of_row], mask(rows, grid))
            assert not near.whole


def test_wide_masks_and_orders_of_rows(monkeypatch):
    grid = make_grid(3, 3, 4)
    assert Neighbourhoods.of(MotionMask(1), grid, torch.arange(36)).whole
    assert not Neighbourhoods.of(MotionMask(1), grid, torch.arange(36).flip(0)).whole
    monkeypatch.setattr(row_sums, "NARROW", 0.5)
    assert HeadAccumulator(grid, MotionMask(0)).reads_queries(torch.device("cpu"))
    assert not HeadAccumulator(grid, MotionMask(1)).reads_queries(torch.device("cpu"))  # 27 of 36 cells


def test_attention_wholly_inside_the_mask_has_no_negative_rest():
    """Energies of 1 − 1: what is outside is 0 or rounding, never below 0."""
    grid = make_grid(3, 3, 4)
    place = torch.eye(12).repeat(3, 1)[None] * 12.0
    taken = HeadAccumulator(grid, MotionMask(0))
    taken.reads_queries(place.device)
    lse = torch.logsumexp(place @ place.transpose(1, 2) * 12**-0.5, dim=-1)
    taken.add_queries(place, [place], lse, 12**-0.5, place[:, :0])
    found = taken.statistics()
    assert (found.outside >= 0).all() and (found.outside <= 1e-5).all()
    torch.testing.assert_close(found.inside, torch.full_like(found.inside, 1 / 3), rtol=1e-4, atol=0)


# ---- in the models ------------------------------------------------------------------------------


def streamed(teacher, inputs, mask, grid, memory: bool, **request):
    """(statistics from queries, from kept rows) of the first entry of one forward."""
    rows = sample_rows(grid, "all", 0)
    common = {"text_tokens": 3, "rows": rows, "batch_index": [0], "head_scope": "layer_head", **request}
    streams = Streams.of_clips(1, guided=True)
    with (
        reference_memory(teacher, streams) if memory else harvest(teacher, HarvestRequest(3)),
        harvest(teacher, HarvestRequest(**common)) as kept,
        harvest(teacher, HarvestRequest(**common, row_taker=lambda _: HeadAccumulator(grid, mask, rows))) as taken,
    ):
        teacher.predict(*inputs)
    assert taken.v2v is None
    found = RowStatistics.of_layers([taker.statistics() for taker in taken.row_takers(0)])
    return found, heads.row_statistics(kept.v2v[0], grid, mask, rows)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("columns", ["none", "sum", "own"])
def test_every_family_hands_on_its_queries(name, columns, monkeypatch):
    """Joint attention with text first and last, self-attention, hidden padding, reference streams; layers × heads."""
    teacher, latents = tiny_family(name), latents_of(name, batch=3)
    grid, mask = teacher.token_grid(*times_of(name)), MotionMask(0, own_frame=False)
    text = join_texts([text_of(name), text_of(name, batch=1)])
    inputs = (latents, middle(name, latents.shape), text)
    memory = columns != "none"
    called = []
    own = HeadAccumulator.add_queries
    monkeypatch.setattr(HeadAccumulator, "add_queries", lambda self, *given: (called.append(1), own(self, *given)))
    found, expected = streamed(teacher, inputs, mask, grid, memory, memory_columns=columns if memory else "sum")
    assert len(called) == 2  # layers
    energy = expected.inside + expected.outside
    for part in PARTS:
        of = energy if part in ("inside", "outside") else torch.ones_like(getattr(expected, part))
        assert ((getattr(found, part) - getattr(expected, part)).abs() <= 1e-5 * of).all(), part


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan", "wan"])
def test_a_wide_mask_is_judged_by_whole_rows(name, monkeypatch):
    monkeypatch.setattr(row_sums, "NARROW", 0.0)
    monkeypatch.setattr(HeadAccumulator, "add_queries", None)
    teacher, latents = tiny_family(name), latents_of(name)
    grid = teacher.token_grid(*times_of(name))
    found, expected = streamed(
        teacher, (latents, middle(name, latents.shape), text_of(name)), MotionMask(1), grid, False
    )
    for part in PARTS:
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), atol=1e-7, rtol=1e-5)


def test_layers_and_forwards_are_averaged_as_chunks_are():
    """head_scope head: mass and same-place entries of the mean map, the mean of the energies."""
    grid = make_grid(3, 3, 4)
    ways = HeadAccumulator(grid), HeadAccumulator(grid)
    ways[0].reads_queries(torch.device("cpu"))
    for seed in (0, 1, 2):
        q, keys, _ = drawn(seed, 2, 36, 0)
        logits = q @ torch.cat(keys[0], dim=1).transpose(1, 2) * 0.4
        ways[0].add_queries(q, [keys[0][1]], logits.logsumexp(-1), 0.4, keys[0][0])
        ways[1].add(logits.softmax(-1)[..., 2:], torch.arange(36))
    found, expected = (way.statistics() for way in ways)
    for name in PARTS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-6, rtol=1e-5)


def test_nan_in_streamed_rows_names_the_layer():
    teacher = tiny_family("wan")
    grid = teacher.token_grid(*times_of("wan"))
    broken = latents_of("wan")
    broken[0, 0, 0, 0, 0] = torch.nan
    request = HarvestRequest(
        2, torch.arange(grid.num_tokens), row_taker=lambda _: HeadAccumulator(grid, MotionMask(0))
    )
    with pytest.raises(ModelError, match=r"\(v2v\) of layer blocks\.0.*NaN"), harvest(teacher, request):
        teacher.predict(broken, 900.0, text_of("wan"))


def test_the_log_sum_exp_is_computed_only_where_it_is_needed():
    """None: it is used where it costs nothing."""
    joint, alone = Layout.text_first(4, 40), Layout.vision_only(36)
    rows = torch.arange(36)
    for request, expected in (
        (HarvestRequest(2), (None, False)),
        (HarvestRequest(2, rows), (None, None)),
        (HarvestRequest(2, direction="v2t"), (True, False)),
        (HarvestRequest(2, rows, row_taker=lambda _: None), (True, True)),
    ):
        with harvest(tiny_family("cogvideox"), request) as harvested:
            assert (harvested.wants_lse(joint), harvested.wants_lse(alone)) == expected


@pytest.mark.parametrize("name", ["cogvideox", "wan", "hunyuan"])
@pytest.mark.parametrize("memory", [False, True])
def test_rows_by_the_log_sum_exp_are_those_of_a_softmax(name, memory, monkeypatch):
    """Also over a reference stream's keys, and with hidden text."""
    teacher, latents, text = tiny_family(name), latents_of(name), text_of(name)
    streams = Streams((1,)) if memory else None
    entries = [0] if memory else None
    tokens = teacher.token_grid(range(FRAMES[name]), 1.0, size=SIZE).num_tokens
    request = HarvestRequest(3, torch.arange(0, tokens, 2), batch_index=entries)
    found = []
    for free in (True, False):
        if not free:
            monkeypatch.setattr("vdm_priors.kernels._fused", lambda *rest: None)
        with reference_memory(teacher, streams) if memory else nullcontext():
            with harvest(teacher, request) as harvested:
                teacher.predict(latents, middle(name, latents.shape), text)
        found.append(harvested)
    for corner in ("t2v", "v2v"):
        torch.testing.assert_close(getattr(found[0], corner), getattr(found[1], corner), rtol=1e-5, atol=1e-7)


def test_head_metrics_of_low_precision_keys():
    """bfloat16 keys: the sums are those of the very numbers; a CPU's kernel takes bfloat16's exponentials roughly."""
    grid = make_grid(3, 3, 4)
    q, keys, _ = drawn(1, 0, 36, 1)
    q, shown = q.bfloat16(), [cells.bfloat16() for _, cells in keys]
    logits = q.double() @ torch.cat(shown, dim=1).double().transpose(1, 2) * 0.4
    taken = HeadAccumulator(grid)
    taken.reads_queries(q.device)
    taken.add_queries(q, shown, logits.logsumexp(-1).float(), 0.4, q[:, :0])
    expected = head_metrics(logits.softmax(-1).unflatten(-1, (2, 36)).sum(dim=-2), grid)
    torch.testing.assert_close(taken.statistics().metrics().dfc, expected.dfc, rtol=1e-3, atol=0)
