"""Words, and their tokens under the real T5 and Qwen2 tokenizers."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.tokenizers import QWEN2, T5

from vdm_priors.words import Word, is_content_word, split_words, tokens_of_words


def texts(text: str) -> list[str]:
    return [word.text for word in split_words(text)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The red ball moves left.", ["The", "red", "ball", "moves", "left"]),
        ("don't re-enter, rock--paper", ["don't", "re-enter", "rock", "paper"]),
        ("'quoted' end- -2", ["quoted", "end", "2"]),
        ("12.5 times, 1,000 of 3. A.B", ["12.5", "times", "1,000", "of", "3", "A", "B"]),
        ("café 漢字 😀 ❤️ x_y", ["café", "漢字", "x", "y"]),
        ("cafe\u0301 हिन्दी", ["cafe\u0301", "हिन्दी"]),
        ("dog’s\ttail\n", ["dog’s", "tail"]),
        ("?!… —", []),
        ("", []),
    ],
)
def test_split_words(text, words):
    assert texts(text) == words


@given(st.text(max_size=60))
def test_words_are_ordered_spans_of_the_text_and_miss_no_letter(text):
    words = split_words(text)
    covered = set()
    for word in words:
        assert text[word.start : word.end] == word.text != ""
        assert not covered & set(range(word.start, word.end))
        assert not any(character.isspace() for character in word.text)
        covered |= set(range(word.start, word.end))
    assert [w.start for w in words] == sorted(w.start for w in words)
    assert all(i in covered for i, character in enumerate(text) if character.isalnum())


@given(st.text(alphabet=string.ascii_lowercase + " .", max_size=40), st.data())
def test_tokens_of_words_equals_counting_shared_characters(text, data):
    words = split_words(text)
    span = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted).map(tuple)
    offsets = data.draw(st.lists(span, max_size=8))
    expected: list[list[int]] = [[] for _ in words]
    for position, (start, end) in enumerate(offsets):
        best, best_shared = None, 0
        for index, word in enumerate(words):
            shared = len(set(range(start, end)) & set(range(word.start, word.end)))
            if shared > best_shared:
                best, best_shared = index, shared
        if best is not None:
            expected[best].append(position)
    assert tokens_of_words(words, offsets) == expected


def test_special_and_padding_tokens_belong_to_no_word():
    assert tokens_of_words([Word("go", 0, 2)], [(0, 2), (0, 0), (1, 1)]) == [[0]]
    assert tokens_of_words([], [(0, 2)]) == []


def test_content_words():
    function = ["The", "of", "does", "What", "it's", "It’s", "don't", "won't", "themselves"]
    content = ["ball", "ball's", "moves", "left", "up", "into", "before", "twice", "3", "漢字"]
    assert not any(map(is_content_word, function))
    assert all(map(is_content_word, content))
    assert is_content_word(Word("ball", 4, 8))


@pytest.fixture(scope="module")
def tokenizers():
    folders = {"t5": T5, "qwen2": QWEN2}
    return {name: AutoTokenizer.from_pretrained(folder, local_files_only=True) for name, folder in folders.items()}


def pieces(tokenizer, text: str, **options) -> dict[str, list[str]]:
    """Word -> the source text of its tokens, whitespace trimmed."""
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    offsets = encoded["offset_mapping"]
    words = split_words(text)
    return {
        f"{word.text}@{word.start}": [text[slice(*offsets[i])].strip() for i in tokens]
        for word, tokens in zip(words, tokens_of_words(words, offsets), strict=True)
    }


def test_words_split_differently_on_either_side(tokenizers):
    text = "Does the trapezoid ricochet counterclockwise?"
    t5, qwen = (pieces(tokenizers[name], text) for name in ("t5", "qwen2"))
    assert list(t5) == list(qwen)
    for side in (t5, qwen):
        assert all("".join(parts).endswith(key.split("@")[0][-2:]) for key, parts in side.items())
    assert any(len(t5[key]) != len(qwen[key]) for key in t5)


@pytest.mark.parametrize("name", ["t5", "qwen2"])
@pytest.mark.parametrize(
    "text",
    [
        "The ball, which moves (left), stops!",
        "It bounces 12 times in 3.5 seconds.",
        "Le café près de la mer: 漢字 😀 naïve",
        "  the ball\n hits   the ball ",
        "The dog's re-entry isn't slow",
    ],
)
def test_every_word_gets_the_tokens_that_cover_it(tokenizers, name, text):
    encoded = tokenizers[name](text, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    words = split_words(text)
    groups = tokens_of_words(words, offsets)
    for word, group in zip(words, groups, strict=True):
        assert group, word
        covered = set().union(*(range(*offsets[i]) for i in group))
        assert set(range(word.start, word.end)) <= covered
    taken = [i for group in groups for i in group]
    assert len(taken) == len(set(taken))
    for i in set(range(len(offsets))) - set(taken):  # what is left has no letter or digit
        assert not any(character.isalnum() for character in text[slice(*offsets[i])])


def test_punctuation_and_special_tokens_are_left_out(tokenizers):
    text = "left, (right)?"
    for tokenizer in tokenizers.values():
        parts = pieces(tokenizer, text)
        assert set(parts) == {"left@0", "right@7"}
        assert "".join(parts["left@0"]) == "left"
        assert "".join(parts["right@7"]) in ("right", "rright")  # T5's lone "▁" has the "r"


def test_repeated_words_keep_their_own_tokens(tokenizers):
    text = "red moves, then red moves"
    for tokenizer in tokenizers.values():
        encoded = tokenizer(text, return_offsets_mapping=True)
        groups = tokens_of_words(split_words(text), encoded["offset_mapping"])
        assert len(groups) == 5
        assert max(groups[0]) < min(groups[1]) < min(groups[2]) < min(groups[3]) < min(groups[4])


def test_words_beyond_a_truncated_text_have_no_tokens(tokenizers):
    text = " ".join(["ball"] * 20)
    encoded = tokenizers["t5"](
        text, return_offsets_mapping=True, truncation=True, max_length=8, padding="max_length"
    )
    groups = tokens_of_words(split_words(text), encoded["offset_mapping"])
    assert all(groups[:7]) and not any(groups[7:])  # 7 words and </s>


def test_padding_belongs_to_no_word(tokenizers):
    encoded = tokenizers["t5"](
        "a ball", return_offsets_mapping=True, max_length=12, padding="max_length"
    )
    groups = tokens_of_words(split_words("a ball"), encoded["offset_mapping"])
    assert max(i for group in groups for i in group) < sum(encoded["attention_mask"]) - 1
