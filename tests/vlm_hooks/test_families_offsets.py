"""Character offsets through replaced placeholders, against a map of single characters."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_hooks.encoding import original_offsets

# lengths of a text, the placeholder after it, and its replacement
PIECES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6)), max_size=3)
CUTS = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@given(pieces=PIECES, tail=st.integers(0, 5), cuts=CUTS, blank=st.booleans())
@settings(max_examples=60, deadline=None)
def test_offsets_are_those_of_the_characters_outside_replacements(pieces, tail, cuts, blank):
    replaced, before = [], 0
    origin = []  # the character that each of the expanded text's was, None inside replacements
    for text, placeholder, replacement in pieces:
        origin += range(before, before + text)
        before += text
        replaced.append({"span": (before, before + placeholder), "new_span": (len(origin), len(origin) + replacement)})
        origin += [None] * replacement
        before += placeholder
    origin += range(before, before + tail)

    edges = sorted({0, len(origin), *(cut for cut in cuts if cut <= len(origin))})
    spans = list(zip(edges, edges[1:])) + [(0, 0)]
    got = original_offsets(torch.tensor([spans]), [replaced], torch.tensor([[blank] + [False] * (len(spans) - 1)]))[0]
    for index, ((start, end), found) in enumerate(zip(spans, got, strict=True)):
        characters = [place for place in origin[start:end] if place is not None]
        outside = characters and not (blank and index == 0)
        assert found == ((characters[0], characters[-1] + 1) if outside else (0, 0))
