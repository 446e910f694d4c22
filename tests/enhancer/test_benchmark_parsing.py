"""Free answers and the options they mean: plain ones, those of talkative models, and hostile ones."""

from __future__ import annotations

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
