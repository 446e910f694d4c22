"""Words of a prior ↔ tokens of the student, by the characters both came from.

The teacher split the shared text its way, the student splits the whole prompt its own way.
Both know characters: the prior's words are spans of the shared text, the student's tokens
spans of the prompt, and the caller knows at which character of the prompt the shared text
begins. What cannot be matched is listed, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vdm_priors.words import Word, split_words, tokens_of_words


@dataclass(frozen=True)
class WordMatch:
    """The student's tokens of each of a prior's words.

    pairs: (index of the word in the prior, sequence positions of its tokens), in prior order;
    unmatched: indices of the prior's words without a token; reason: why all are unmatched;
    answer: sequence position whose row gives the answer's first token, where it is aligned too.
    """

    pairs: list[tuple[int, list[int]]]
    unmatched: list[int]
    reason: str = ""
    answer: int | None = None

    @property
    def total(self) -> int:
        """Number of words of the prior."""
        return len(self.pairs) + len(self.unmatched)

    @property
    def rows(self) -> list[int]:
        """Sequence positions to capture: all matched words' tokens, word after word, then the answer's row."""
        return [p for _, positions in self.pairs for p in positions] + ([] if self.answer is None else [self.answer])


def match_words(
    prior_words: Sequence[Word],
    shared_text: str,
    prompt_text: str,
    student_offsets: Sequence[tuple[int, int]],
    text_start: int,
) -> WordMatch:
    """Find the student's tokens of a prior's words.

    prior_words: spans of `shared_text`, which stands in `prompt_text` from character
    `text_start` on (the caller knows which occurrence is meant); student_offsets: the
    character span in `prompt_text` of every sequence position, empty for special, visual and
    padding tokens. A token belongs to the word it shares most characters with, counting the
    text's other words too, so that it is never taken from one that the prior leaves out.
    """
    text_end = text_start + len(shared_text)
    if text_start < 0 or prompt_text[text_start:text_end] != shared_text:
        found = prompt_text[max(text_start, 0) : text_end]
        return WordMatch(
            pairs=[],
            unmatched=list(range(len(prior_words))),
            reason=f"the prompt has {found!r} at character {text_start}, not {shared_text!r}",
        )
    others = [word for word in split_words(shared_text) if not _meets(word, prior_words)]
    positions, spans = [], []
    for position, (start, end) in enumerate(student_offsets):
        if start < end and start < text_end and end > text_start:
            positions.append(position)
            spans.append((start - text_start, end - text_start))
    tokens = tokens_of_words([*prior_words, *others], spans)
    pairs, unmatched = [], []
    for index in range(len(prior_words)):
        if tokens[index]:
            pairs.append((index, [positions[token] for token in tokens[index]]))
        else:
            unmatched.append(index)
    return WordMatch(pairs, unmatched)


def _meets(word: Word, words: Sequence[Word]) -> bool:
    return any(word.start < other.end and other.start < word.end for other in words)
