"""Which option a model's free answer means.

The rules, in order; the first that decides is taken, and an answer that none decides counts as wrong:

 1. the last \\boxed{…} or <answer>…</answer>, and nothing of <think>…</think>;
 2. a letter alone: `B`, `(b)`, `**B.**`;
 3. a letter with a mark, or alone in its line, at the beginning: `B. to the left`, `(B) to the left`; no other line may
    begin with another letter;
 4. an option's text alone;
 5. the last "answer is B" or "answer: B", or the only letter of "option B", "choice B";
 6. the only option whose text occurs in it, longer ones before those that they hold;
 7. the only capital letter of an option that stands alone, the article "A" not counted.

The whole list of options said again is no answer, and is left out; so are, but for "answer is B", clauses that deny
("not A but B" is B), unless an option denies something itself.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from enhancer.data.questions import LETTERS

RULES = 2  # raise when some answer would mean another option than before
MOST = 20_000  # characters that are looked at: the beginning and the end of what is longer
# a template may have opened the thinking in the prompt
_THINKING = re.compile(r"\A.*</think>|<think>.*", re.S | re.I)
_FRAMED = (
    re.compile(r"\\boxed\s*\{\s*(?:\\[a-z]+\s*\{)?([^{}]*)\}", re.I),
    re.compile(r"<answer>((?:(?!<answer>).)*?)(?:</answer>|$)", re.S | re.I),
)
_ALONE = re.compile(r"[\s\"'`*_(\[{]*([A-Za-z])[\s\"'`*_)\]}.:,;!]*")
_OR_ANOTHER = r"(?!\s*(?:or\b|and\b|[/,&])?\s*[(\[]?[A-Z](?:[)\].:]|\s*$))(?!\s*(?:or|and|/|,|&)\s*[(\[]?[A-Z]\b)"
_LEADING = re.compile(
    r"[\s\"'`*_]*(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Z])[*_]*\s*(?:[.):*](?![a-z])|$))" + _OR_ANOTHER
)
_LETTER = r"[\s:*=\"'`]*(?:option\s+)?[(\[]?\s*\b([A-Z])\b(?!['’]?[a-z])"
_ANSWER = re.compile(
    r"(?i:\banswer\b(?:\s+(?:is|would\s+be|should\s+be))?)" + _LETTER + r"(?!\s*(?:or|and|/|,)\s*\(?[A-Z]\b)"
)
_SMALL = re.compile(r"(?i:\banswer\b(?:\s+is\b|[\"'`*]*\s*:))[\s*\"'`]*\(?([a-z])\)?[\s.*\"'`}]*$", re.M)
_OPTION = re.compile(r"(?i:\b(?:option|choice)\b(?:\s+is)?)" + _LETTER)
_CAPITAL = re.compile(r"(?<![A-Za-z0-9'’])([A-Z])(?![A-Za-z0-9'’])")
_ARTICLE = re.compile(r"(?<![A-Za-z0-9'’])A(?=\s+(?!(?:or|and)\b)[a-z])")
_DENIAL = re.compile(r"\b(?:not|never|neither|nor|cannot|wrong|incorrect)\b|n['’]t\b", re.I)
_CLAUSE = re.compile(r"(?:(?!\bbut\b)[^,.;:!?\n])+", re.I)


def parse_answer(response: str, options: Sequence[str]) -> int | None:
    """The number (from 0) of the option that a free answer means, or None. Never raises, whatever the answer holds."""
    text = _readable(response)
    for framed in _FRAMED:
        found = framed.findall(text)
        if found:
            decided = _decide(found[-1], options)
            if decided is not None:
                return decided
    return _decide(text, options)


def _readable(response: str) -> str:
    """Composed characters of one width, without those that are not shown and without what was only thought."""
    if len(response) > MOST:
        response = f"{response[: MOST // 2]}\n{response[-MOST // 2 :]}"
    text = unicodedata.normalize("NFKC", response)
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c)[0] != "C")
    return _THINKING.sub(" ", text).strip()


def _decide(text: str, options: Sequence[str]) -> int | None:
    count = len(options)
    alone = _ALONE.fullmatch(text)
    if alone:
        return _number(alone[1], count)
    text = _without_list(text, options)
    leading = _leading(text, count)
    if leading is not None:
        return leading
    plain = [_plain(option) for option in options]
    if plain.count(_plain(text)) == 1:
        return plain.index(_plain(text))
    answers = _numbers(_ANSWER, text, count) or _numbers(_SMALL, text, count)
    text = _affirmed(text, options)
    named = _numbers(_OPTION, text, count)
    if answers or len(set(named)) == 1:
        return (answers or named)[-1]
    mentioned = _mentioned(_plain(text), plain)
    if len(mentioned) == 1:
        return mentioned.pop()
    letters = set(_numbers(_CAPITAL, _ARTICLE.sub(" ", text), count))
    return letters.pop() if len(letters) == 1 and not mentioned else None


def _without_list(text: str, options: Sequence[str]) -> str:
    """The text without "A. …", "B. …" where it says all of the options again, as some models do before they answer."""
    rest = text
    for letter, option in zip(LETTERS, options, strict=False):
        said = re.compile(rf"(?<!\w)[(\[]?{letter}[.):\]]+\s*{re.escape(option.strip())}(?!\w)[.,;]?", re.I)
        rest, times = said.subn(" ", rest)
        if times == 0:
            return text
    return rest.strip()


def _leading(text: str, count: int) -> int | None:
    """The option whose letter the text begins with, if no further line begins with another's."""
    found = [_LEADING.match(line) for line in text.splitlines() if line.strip()]
    if not found or not found[0]:
        return None
    numbers = {_number(match[1] or match[2], count) for match in found if match} - {None}
    first = _number(found[0][1] or found[0][2], count)
    return first if numbers == {first} else None


def _affirmed(text: str, options: Sequence[str]) -> str:
    """The text without the clauses that deny something."""
    if any(_DENIAL.search(option) for option in options):
        return text
    return _CLAUSE.sub(lambda clause: " " if _DENIAL.search(clause[0]) else clause[0], text)


def _numbers(pattern: re.Pattern, text: str, count: int) -> list[int]:
    return [n for letter in pattern.findall(text) if (n := _number(letter, count)) is not None]


def _number(letter: str, count: int) -> int | None:
    number = LETTERS.index(letter.upper())
    return number if number < count else None


def _plain(text: str) -> str:
    """Words alone: case, punctuation and white space do not tell options apart."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _mentioned(text: str, options: list[str]) -> set[int]:
    """Numbers of the options whose words occur in the text; what a longer option covers is gone for the shorter."""
    padded, found = f" {text} ", set()
    for number in sorted(range(len(options)), key=lambda n: -len(options[n])):
        words = f" {options[number]} "
        if options[number] and words in padded:
            found.add(number)
            padded = padded.replace(words, "  ")
    return found
