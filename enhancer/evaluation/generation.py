"""Questions answered in the model's own words: greedy decoding in batches, and the option that the answer means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from enhancer.data.samples import HIDDEN_ANSWER, Sample
from enhancer.evaluation.parsing import parse_answer
from enhancer.video.clip import Clip, FrameCache, Sampling
from vdm_priors.errors import ClipError, SampleError
from vlm_hooks.student import LETTER_REQUEST

NEW_TOKENS = 64  # most that an answer may have: more than a letter with its reason, less than an essay
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


def generate(
    student: Any,
    samples: Sequence[Sample],
    sampling: Sampling = Sampling(),
    frame_cache: FrameCache | None = None,
    batch_size: int = 8,
    new_tokens: int = NEW_TOKENS,
    progress: Callable[[int, int, str], None] | None = None,
    request: str = LETTER_REQUEST,
) -> list[dict]:
    """One row a sample, in order: as those of `multiple_choice.evaluate`, with "response" in place of "scores".

    Options are listed in the prompt and `request` asks for the letter. An answer that means no option is wrong, its
    `chosen` None.
    A question without options is answered and not scored. A question that cannot be asked has "error".
    """
    cache = frame_cache or FrameCache()
    training = student.model.training
    student.model.eval()
    rows: list[dict] = []
    try:
        with torch.inference_mode():
            for first in range(0, len(samples), batch_size):
                rows += _answers(student, samples[first : first + batch_size], sampling, cache, new_tokens, request)
                if progress:
                    progress(len(rows), len(samples), "")
    finally:
        student.model.train(training)
    return rows


def _answers(
    student: Any, samples: Sequence[Sample], sampling: Sampling, cache: FrameCache, new_tokens: int, request: str
) -> list[dict]:
    rows: dict[int, dict] = {}
    askable: list[tuple[int, Clip, str]] = []
    for n, sample in enumerate(samples):
        try:
            prompt = student.prompt(sample.question, sample.options or None, request=request).text
            askable.append((n, cache.get(sample.video, sampling), prompt))
        except (ClipError, SampleError) as error:
            rows[n] = _row(sample, None, str(error))
    for n, response, error in _responses(student, samples, askable, new_tokens):
        rows[n] = _row(samples[n], response, error)
    return [rows[n] for n in range(len(samples))]


def _responses(
    student: Any, samples: Sequence[Sample], asked: list[tuple[int, Clip, str]], new_tokens: int
) -> list[tuple[int, str | None, str | None]]:
    """(number, response, None), or (number, None, why) of a question that the student refuses; the others are asked."""
    if not asked:
        return []
    try:
        inputs = student.encode(
            [clip for _, clip, _ in asked],
            [prompt for *_, prompt in asked],
            names=[samples[n].id for n, *_ in asked],
            padding_side="left",
        ).inputs
    except SampleError as error:
        if len(asked) == 1:
            return [(asked[0][0], None, str(error))]
        return [found for one in asked for found in _responses(student, samples, [one], new_tokens)]
    tokenizer = student.tokenizer
    out = student.model.generate(
        **inputs,
        **GREEDY,
        max_new_tokens=new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [(n, text.strip(), None) for (n, *_), text in zip(asked, texts, strict=True)]


def checkpoint_decoding(student: Any) -> dict[str, Any]:
    """What a checkpoint's own generation settings add to greedy decoding, a repetition penalty for one."""
    ours = {*GREEDY, "max_new_tokens", "max_length", "use_cache", "transformers_version"}
    settings = student.model.generation_config.to_diff_dict().items()
    set_ones = {name: value for name, value in settings if value not in (None, False) and not name.startswith("_")}
    return {name: value for name, value in set_ones.items() if name not in ours and not name.endswith("_token_id")}


def _row(sample: Sample, response: str | None, error: str | None = None) -> dict:
    number = None if response is None or not sample.options else parse_answer(response, sample.options)
    chosen = None if number is None else sample.options[number]
    scored = response is not None and bool(sample.options) and sample.answer != HIDDEN_ANSWER
    row = {
        "id": sample.id,
        "question_type": sample.question_type,
        "options": list(sample.options),
        "answer": sample.answer,
        "chosen": chosen,
        "correct": chosen == sample.answer if scored else None,
        "response": response,
    }
    return row if error is None else {**row, "error": error}
