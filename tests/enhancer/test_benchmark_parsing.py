"""Free answers and the options they mean: plain ones, those of talkative models, and hostile ones."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from enhancer.data.questions import LETTERS
from enhancer.evaluation.parsing import MOST, parse_answer

OPTIONS = ("to the left", "to the right", "to the right, then up", "It stops.")


@pytest.mark.parametrize(
    "response, expected",
    [
        ("B", 1),
        ("b", 1),
        ("(C)", 2),
        ("**D.**", 3),
        (" d) ", 3),
        ("Ｂ", 1),
        ("B\u200b", 1),
        ("B: it is obvious", 1),
        ("(b) to the right", 1),
        ("to the right", 1),
        ("To the right, then up.", 2),
        ("it STOPS", 3),
        ("A. to the left", 0),
        ("The answer is B.", 1),
        ("answer: (C)", 2),
        ("The answer is A. No, wait: the answer is B", 1),
        ("I choose option D", 3),
        ("It moves to the right, then up, I think", 2),
        ("The square moves to the left.", 0),
        ("Surely B, as it moves", 1),
        ("<think>A or B? The answer is A.</think>B", 1),
        ("<think>never ends, the answer is A", None),
        ("first <answer>A</answer> then <answer>to the right</answer>", 1),
        (r"so \boxed{C}", 2),
        (r"\boxed{\text{B}} is it", 1),
        ("", None),
        ("   \n", None),
        ("E", None),
        ("Z.", None),
        ("I do not know", None),
        ("A or B", None),
        ("The answer is A or B", None),
        ("option A or option B", None),
        ("to the left or it stops", None),
        ("A square moves up", None),
        ("AB", None),
        ("ABCD", None),
        ("\x00\x1b[31m", None),
        ("\ud800", None),
        ("42", None),
        ("C" * 50, None),
    ],
)
def test_answers(response, expected):
    assert parse_answer(response, OPTIONS) == expected


LISTED = "A. to the left\nB. to the right\nC. to the right, then up\nD. It stops."


@pytest.mark.parametrize(
    "response, expected",
    [
        # the list of options said again
        (LISTED, None),
        (f"{LISTED}\n\nThe correct answer is C.", 2),
        (f"{LISTED}\nB", 1),
        (f"{LISTED.replace(chr(10), ' ')} I choose D", 3),
        ("to the left\nto the right\nto the right, then up\nIt stops.", None),
        ("to the left " * 500, 0),
        # several letters
        ("(A) or (B)", None),
        ("A, B", None),
        ("A/B", None),
        ("D. B. A.", None),
        ("A\nB", None),
        ("B. to the right\nC. to the right, then up", None),
        ("Both A and B", None),
        # a letter, and then why
        ("A\n\nExplanation: option B is wrong", 0),
        ("**C**\nbecause it turns. B would be half of it", 2),
        ("Answer is A because not B", 0),
        ("option B is wrong, so option D", 3),
        # denials
        ("Not A, but B.", 1),
        ("It is not B. It is C.", 2),
        ("The answer isn't A; it's B.", 1),
        ("Neither A nor B; C", 2),
        ("Not B.", None),
        ("B is wrong.", None),
        ("It moves to the left, not to the right.", 0),
        ("It does not move to the left; it moves to the right", 1),
        # refusals
        ("I'm sorry, but I can't help with that.", None),
        ("As an AI, I cannot watch videos.", None),
        ("I cannot determine which. A person moves.", None),
        # other dresses
        ('{"answer": "B"}', 1),
        ("{'answer': 'B'}", 1),
        ('```json\n{"choice": "C", "why": "A is wrong"}\n```', 2),
        ("### Answer\n\n**B**", 1),
        ("the answer is a", 0),
        ("answer: b", 1),
        ("the answer is a square", None),
        (r"\boxed{\mathrm{B}}", 1),
        ("$B$", 1),
        ("答案是B。", 1),
        ("Ⓑ", 1),
        ("В", None),  # Cyrillic, which no key for B writes
        ("A is tempting, C too.</think>\n\nB", 1),  # the template had opened the thinking
        ("B<|im_end|>", 1),
    ],
)
def test_hostile_answers(response, expected):
    assert parse_answer(response, OPTIONS) == expected


def test_options_that_deny_are_not_taken_for_denials():
    options = ("It moves", "It does not move", "It never stops")
    assert parse_answer("It does not move, I think", options) == 1
    assert parse_answer("I am sure that it never stops", options) == 2


@pytest.mark.parametrize("text", ["B", "A. ", "answer ", "not ", "(", "A or ", "\n", "</think", "<answer>", "\\boxed{"])
def test_very_long_answers_take_no_time(text):
    began = time.process_time()
    parse_answer(text * (100_000 // len(text)), OPTIONS)
    assert time.process_time() - began < 1


def test_a_shorter_option_inside_a_longer_one_is_not_meant_too():
    assert parse_answer("it goes left, then right", ("left", "left, then right")) == 1
    assert parse_answer("it goes left", ("left", "left, then right")) == 0


def test_the_letter_is_asked_for_so_it_counts_before_a_text_that_is_a_letter():
    assert parse_answer("A", ("B", "A")) == 0


TEXTS = st.lists(st.text(alphabet="abcXYZé0", min_size=2, max_size=5), min_size=2, max_size=3).map(" ".join)


@given(st.text(max_size=200), st.lists(st.text(max_size=20), min_size=2, max_size=26))
@example("B" * (MOST + 7) + "A", ["x", "y"])
@example("\\boxed{" * 400, ["x", "y"])
@example("<answer>" * 400, ["x", "y"])
@settings(max_examples=120, deadline=None)
def test_any_answer_gives_an_option_or_none(response, options):
    found = parse_answer(response, options)
    assert found is None or 0 <= found < len(options)


@given(st.integers(2, 26), st.data())
@settings(max_examples=60, deadline=None)
def test_letters_name_their_options_in_every_dress(count, data):
    number = data.draw(st.integers(0, count - 1))
    letter = LETTERS[number]
    dress = data.draw(
        st.sampled_from(
            [
                "{}",
                "({})",
                "{}.",
                "**{}**",
                "\n {}) \n",
                "The answer is {}.",
                "Answer: {}",
                "<answer>{}</answer>",
                "<think>hm, A</think> {}",
                "\\boxed{{{}}}",
            ]
        )
    )
    assert parse_answer(dress.format(letter), [f"thing {n} moves" for n in range(count)]) == number


@given(st.lists(TEXTS, min_size=2, max_size=5), st.data())
@settings(max_examples=60, deadline=None)
def test_an_options_text_means_it(options, data):
    plain = [" ".join(option.casefold().split()) for option in options]
    if len(set(plain)) < len(plain):
        return
    number = data.draw(st.integers(0, len(options) - 1))
    assert parse_answer(f"  {options[number].upper()}! ", options) == number
