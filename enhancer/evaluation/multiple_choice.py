"""Multiple-choice questions answered by the likelihood of their options.

"letter": the prompt lists the options, and the letters are compared. "option_text": the
question alone is the prompt, and every option's text is scored as the answer: the sum of the
log-probabilities of its tokens and of the end token (without which "left" would always beat
"left, then right"). The prompt with its video runs once a question; the options continue from
its keys and values. Where every option is a single token, the prompt alone scores them all,
and the end token, which follows each alike, is left out.

Legend: B questions, K options, T tokens of an option with the end token, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from enhancer.data.samples import HIDDEN_ANSWER, LETTERS, Sample
from enhancer.video.clip import Clip, FrameCache, Sampling
from vdm_priors.errors import ClipError, SampleError, UserError
from vlm_hooks.student import LETTER_REQUEST

PROTOCOLS = ("option_text", "letter")


# questions are sorted within this many batches, since only equal shapes go together
WINDOW = 4


@dataclass
class _Question:
    sample: Sample
    clip: Clip
    prompt: str
    prompt_length: int  # tokens, the video counting as one
    options: list[list[int]]  # tokens of each, with the end token


def evaluate(
    student: Any,
    samples: Sequence[Sample],
    sampling: Sampling = Sampling(),
    frame_cache: FrameCache | None = None,
    batch_size: int = 32,
    protocol: str = "option_text",
    progress: Callable[[int, int, str], None] | None = None,
    request: str = LETTER_REQUEST,
) -> list[dict]:
    """One row a sample, in order: {"id","question_type","options","answer","chosen","correct","scores"}.

    answer and chosen are option texts, scores log-probabilities in nats. `correct` is None for a
    hidden answer ("NA") and for a question that cannot be asked (unreadable video, over-long
    text), whose row has "error" and no scores. batch_size: questions a forward. request: with
    "letter", what asks for the letter.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"evaluate.protocol {protocol!r} is unknown: choose one of {', '.join(PROTOCOLS)}.")
    cache = frame_cache or FrameCache()
    training = student.model.training
    student.model.eval()
    rows: list[dict] = []
    try:
        with torch.inference_mode():
            for window in _chunks(samples, WINDOW * batch_size):
                rows += _answer(student, window, sampling, cache, batch_size, protocol, request)
                if progress:
                    progress(len(rows), len(samples), "")
    finally:
        student.model.train(training)
    return rows


def _answer(student, samples, sampling, cache, batch_size, protocol, request) -> list[dict]:
    rows: dict[int, dict] = {}
    groups: dict[tuple, list[tuple[int, _Question]]] = defaultdict(list)
    for n, sample in enumerate(samples):
        try:
            question = _prepare(student, sample, cache.get(sample.video, sampling), protocol, request)
        except (ClipError, SampleError) as error:
            rows[n] = _row(sample, None, str(error))
            continue
        # equal lengths need no padding, which continuing from keys and values does not bear
        # adapters' tokens depend on more than frames
        shape = question.clip.frames.shape, student.clip_tokens(question.clip)
        groups[question.prompt_length, shape, len(question.options)].append((n, question))
    for group in groups.values():
        for chunk in _chunks(group, batch_size):
            questions = [question for _, question in chunk]
            for (n, _), result in zip(chunk, _score_or_say_why(student, questions), strict=True):
                rows[n] = _row(samples[n], result) if isinstance(result, list) else _row(samples[n], None, result)
    return [rows[n] for n in range(len(samples))]


def _prepare(student: Any, sample: Sample, clip: Clip, protocol: str, request: str) -> _Question:
    if not sample.options:
        raise SampleError("the question has no options to choose from")
    if protocol == "letter":
        texts, listed = LETTERS[: len(sample.options)], sample.options
    else:
        texts, listed = sample.options, ()
    prompt = student.prompt(sample.question, listed, request=request).text
    before = student.tokenizer(prompt)["input_ids"]
    options = []
    answered = student.tokenizer([prompt + text + student.end_token for text in texts])["input_ids"]
    for text, ids in zip(texts, answered, strict=True):
        if ids[: len(before)] != before:
            raise SampleError(
                f"the option {text!r} does not begin at a token of its own after the prompt: end the prompt as the "
                f"processor's chat template does"
            )
        options.append(ids[len(before) :])
    return _Question(sample, clip, prompt, len(before), options)


def _score_or_say_why(student: Any, questions: list[_Question]) -> list[list[float] | str]:
    """Scores of every question; a question that the student refuses has the reason instead."""
    try:
        return _score(student, questions)
    except SampleError as error:
        if len(questions) == 1:
            return [str(error)]
        return [result for question in questions for result in _score_or_say_why(student, [question])]


def _score(student: Any, questions: list[_Question]) -> list[list[float]]:
    """Log-probabilities [B][K] of the options of questions of one shape."""
    names = [question.sample.id for question in questions]
    inputs = student.encode([q.clip for q in questions], [q.prompt for q in questions], names=names).inputs
    assert bool(inputs["attention_mask"].all()), "questions of one shape need no padding"
    single = all(len(tokens) == 2 for question in questions for tokens in question.options)
    output = student.model(**inputs, use_cache=not single, logits_to_keep=1)

    count, longest = len(questions[0].options), max(len(tokens) for q in questions for tokens in q.options)
    padded = [tokens + tokens[-1:] * (longest - len(tokens)) for q in questions for tokens in q.options]
    lengths = torch.tensor([len(tokens) for q in questions for tokens in q.options])
    options_nt = torch.tensor(padded, device=output.logits.device)  # n = B·K
    logits_n1v = output.logits[:, -1:].repeat_interleave(count, dim=0)
    if single:
        logits_ntv, target_nt, lengths = logits_n1v, options_nt[:, :1], lengths - 1
    else:
        past = output.past_key_values
        past.batch_repeat_interleave(count)
        continued = student.model(input_ids=options_nt[:, :-1], past_key_values=past, use_cache=True)
        logits_ntv, target_nt = torch.cat([logits_n1v, continued.logits], dim=1), options_nt
    logprobs_nt = logits_ntv.float().log_softmax(dim=-1).gather(2, target_nt[..., None])[..., 0].cpu()
    scored_nt = torch.arange(logprobs_nt.shape[1]) < lengths[:, None]
    return torch.where(scored_nt, logprobs_nt, 0.0).sum(dim=1).reshape(-1, count).tolist()


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _row(sample: Sample, scores: list[float] | None, error: str | None = None) -> dict:
    chosen = None if scores is None else sample.options[max(range(len(scores)), key=scores.__getitem__)]
    scored = scores is not None and sample.answer != HIDDEN_ANSWER
    row = {
        "id": sample.id,
        "question_type": sample.question_type,
        "options": list(sample.options),
        "answer": sample.answer,
        "chosen": chosen,
        "correct": chosen == sample.answer if scored else None,
        "scores": scores,
    }
    return row if error is None else {**row, "error": error}
