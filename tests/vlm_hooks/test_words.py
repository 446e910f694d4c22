"""Words of a prior ↔ student tokens, with the real T5 and Qwen2 tokenizers."""

from __future__ import annotations

from functools import cache

import pytest
from transformers import AutoTokenizer

from tests.tokenizers import T5
from tests.vlm_hooks.tiny_student import CHAT_TEMPLATE, make_tokenizer
from vdm_priors.words import Word, split_words, tokens_of_words
from vlm_hooks.words import match_words


@cache
def qwen2():
    return make_tokenizer("qwen2")


@cache
def t5():
    return AutoTokenizer.from_pretrained(T5)


def student_side(text):
    """Token strings and spans of a text; special tokens have empty spans, as in Encoding."""
    encoded = qwen2()(text, return_offsets_mapping=True)
    special = set(qwen2().all_special_ids)
    spans = [
        (0, 0) if token in special else span
        for token, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], spans


def chat(question):
    content = [{"type": "video"}, {"type": "text", "text": question}]
    return qwen2().apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=CHAT_TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )


def matched_texts(question, prompt=None, start=None, words=None):
    """{(word, start): decoded tokens} of all the question's words."""
    prompt = chat(question) if prompt is None else prompt
    start = prompt.index(question) if start is None else start
    words = split_words(question) if words is None else words
    ids, spans = student_side(prompt)
    match = match_words(words, question, prompt, spans, start)
    assert match.unmatched == []
    return {
        (words[i].text, words[i].start): qwen2().decode([ids[p] for p in positions]).strip()
        for i, positions in match.pairs
    }


@pytest.mark.parametrize(
    "question",
    [
        "Which way does the red ball roll?",
        "Does the trampolinist somersault counterclockwise 12.5 times?",  # split words
        "Où va l’éléphant, naïve façade?",  # non-ASCII
        "Кот прыгает 3 раза — куда?",
        "It's the dog's re-entry, isn't it?",
        "球 bounces 2x; then (slowly) stops!!",
    ],
)
def test_every_word_gets_the_tokens_that_spell_it(question):
    for (text, _), spelled in matched_texts(question).items():
        assert text in spelled
        assert len(spelled) <= len(text) + 1  # a token may carry one mark beside the word


def test_emoji_and_decomposed_letters_keep_the_spans():
    question = "A cafe\u0301 🏃 runs"
    texts = {word for word, _ in matched_texts(question)}
    assert texts == {"A", "cafe\u0301", "runs"}


def test_repeated_words_are_told_apart_in_question_and_options():
    question = "Does the ball hit the other ball?"
    prompt = chat(question + "\nA. ball first\nB. the other ball")
    start = prompt.index(question)
    ids, spans = student_side(prompt)
    words = split_words(question)
    match = match_words(words, question, prompt, spans, start)
    balls = [positions for i, positions in match.pairs if words[i].text == "ball"]
    assert len(balls) == 2 and balls[0] != balls[1]
    for positions in balls:
        assert [spans[p][1] <= start + len(question) for p in positions] == [True] * len(positions)
    every_ball = [p for p, i in enumerate(ids) if qwen2().decode([i]).strip() == "ball"]
    assert len(every_ball) == 4 and [b[0] for b in balls] == every_ball[:2]


def test_the_same_text_twice_is_found_where_the_caller_says():
    question = "Is it up?"
    prompt = chat(question + "\n" + question)
    first = prompt.index(question)
    second = prompt.index(question, first + 1)
    _, spans = student_side(prompt)
    a, b = (match_words(split_words(question), question, prompt, spans, s) for s in (first, second))
    assert max(a.rows) < min(b.rows)
    assert len(a.rows) == len(b.rows) == 3


def test_teacher_tokens_and_student_tokens_meet_in_words():
    """T5 and Qwen2 split differently; a text cut by the teacher's limit loses its last words."""
    question = "Does the trampolinist somersault twice before the acrobat cartwheels?"
    words = split_words(question)
    offsets = t5()(question, return_offsets_mapping=True, truncation=True, max_length=12)
    covered = tokens_of_words(words, offsets["offset_mapping"])
    known = [word for word, tokens in zip(words, covered, strict=True) if tokens]
    assert 2 < len(known) < len(words)
    texts = matched_texts(question, words=known)
    assert [word for word, _ in texts] == [word.text for word in known]
    student_counts = [len(p) for _, p in _match(known, question).pairs]
    teacher_counts = [len(tokens) for tokens in covered if tokens]
    assert student_counts != teacher_counts
    assert texts["trampolinist", 9] == "trampolinist"


def test_a_token_is_not_taken_from_a_word_the_prior_leaves_out():
    question = "ab cd"
    spans = [(0, 1), (1, 5)]  # one token covers "b cd": it is the word "cd"
    match = match_words([Word("ab", 0, 2)], question, question, spans, 0)
    assert match.pairs == [(0, [0])]


def test_what_is_not_there_is_counted_and_not_guessed():
    question = "Which way?"
    prompt = chat("Which ways?")
    _, spans = student_side(prompt)
    words = split_words(question)
    for start in (-1, prompt.index("Which"), len(prompt)):
        match = match_words(words, question, prompt, spans, start)
        assert match.pairs == [] and match.unmatched == [0, 1] and match.total == 2
        assert "not 'Which way?'" in match.reason
    hidden = [(0, 0)] * len(spans)
    match = match_words(words, "Which ways"[:10], prompt, hidden, prompt.index("Which"))
    assert match.unmatched == [0, 1] and match.rows == [] and match.reason == ""


def _match(words, question):
    prompt = chat(question)
    return match_words(words, question, prompt, student_side(prompt)[1], prompt.index(question))
