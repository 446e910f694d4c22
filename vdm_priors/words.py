"""Words of a text that teacher and student share, and which tokens belong to them.

Teacher (T5) and student (BPE) split text differently; both say from which characters a
token came. Words are therefore character spans of the shared text, and a token belongs to
the word whose characters it covers. Nothing here knows a tokenizer.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

APOSTROPHES = frozenset("'\u2019")
HYPHENS = frozenset("-\u2010\u2011")
JOINERS = frozenset("\u200c\u200d")  # zero-width, inside words of Persian and Indic scripts
DECIMAL_MARKS = frozenset(".,")


@dataclass(frozen=True)
class Word:
    """A word and its characters [start, end) in the shared text: text[start:end] == word.text."""

    text: str
    start: int
    end: int


def split_words(text: str) -> list[Word]:
    """Unicode words of `text` in order, as character spans.

    Letters, digits and the marks on them make words. Apostrophes and hyphens are kept between
    two of them (don't, re-entry), decimal marks between two digits (12.5). Punctuation,
    symbols and emoji are never words.
    """
    words = []
    start = None
    for position in range(len(text) + 1):
        inside = position < len(text) and _belongs(text, position, start is not None)
        if inside and start is None:
            start = position
        elif not inside and start is not None:
            words.append(Word(text[start:position], start, position))
            start = None
    return words


def tokens_of_words(
    words: Sequence[Word], offsets: Sequence[tuple[int, int]]
) -> list[list[int]]:
    """Positions of the tokens of each word, one list a word, in token order.

    `offsets` are the tokens' character spans (start, end) in the text the words come from, as
    fast tokenizers return them; an empty span is a special or padding token. A token belongs
    to the word it shares most characters with (the earlier at a tie), to none if it shares
    no character. Words hold no whitespace, so the spaces that tokenizers count into a token's
    span ("Ġmoves") never decide. A word beyond a truncated text gets [].

    T5 writes a lone "▁" before a word it cannot join to it and gives it the span of the word's
    first character: it is part of how the word was written, and counted to it.
    """
    tokens: list[list[int]] = [[] for _ in words]
    for position, (start, end) in enumerate(offsets):
        shared = [min(end, word.end) - max(start, word.start) for word in words]
        best = max(range(len(words)), key=shared.__getitem__, default=None)
        if best is not None and shared[best] > 0:
            tokens[best].append(position)
    return tokens


def is_content_word(word: Word | str) -> bool:
    """Whether a word is more than English grammar (`the`, `of`, `does`, `what`, `it's`, …).

    Words of place, direction, order and number count as content (`up`, `into`, `before`,
    `twice`): in a question about motion they are often what is asked. Words of other
    languages count as content.
    """
    text = word.text if isinstance(word, Word) else word
    text = text.casefold().replace("\u2019", "'")
    stem = text.split("'")[0]  # it's, they're; also the ball's, whose stem is content
    return not (text in FUNCTION_WORDS or stem in FUNCTION_WORDS or text.endswith("n't"))


FUNCTION_WORDS = frozenset(
    """
    a an the this that these those such some any each every either neither
    i me my mine myself we us our ours ourselves you your yours yourself yourselves
    he him his himself she her hers herself it its itself they them their theirs themselves
    one's there here
    who whom whose which what when where why how whether
    am is are was were be been being do does did doing done have has had having
    can could will would shall should may might must cannot
    and or but nor so yet if because although though while as than
    of to for with without by at in on from about
    not no yes very too also just only please
    """.split()
)


def _belongs(text: str, position: int, in_word: bool) -> bool:
    """Whether the character at `position` is part of a word that may have begun before it."""
    character = text[position]
    category = unicodedata.category(character)
    if category[0] in "LN":
        return True
    if not in_word:
        return False
    if category[0] == "M":
        return True
    if position + 1 == len(text):
        return False
    before, after = text[position - 1], text[position + 1]
    if character in DECIMAL_MARKS:
        return before.isdigit() and after.isdigit()
    if character in APOSTROPHES | HYPHENS | JOINERS:
        # `before` may be a mark on a letter, never another apostrophe ("rock--paper")
        return unicodedata.category(before)[0] in "LNM" and unicodedata.category(after)[0] in "LN"
    return False
