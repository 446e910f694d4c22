"""A student of your own: extend/students/llava_next_video.py, on a small random model of transformers' real classes.

    python examples/add_student.py

With weights, the same is `load_student("llava-hf/LLaVA-NeXT-Video-7B-hf")`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from clips import samples
from transformers import (LlavaNextImageProcessor, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration,
                          LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor)

import vlm_hooks.families
from enhancer.shipped import quiet_libraries
from enhancer.video.clip import Sampling, read_clip
from vdm_priors.words import split_words
from vlm_hooks.capture import CaptureRequest, capture
from vlm_hooks.families import load_student
from vlm_hooks.small import train_tokenizer
from vlm_hooks.words import match_words

TEMPLATE = ("{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
            "{% if part['type'] == 'video' %}{{ '<video>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ ' ' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
quiet_libraries()
torch.manual_seed(0)


def save_small_model(folder: str, texts: list[str]) -> None:
    """A LLaVA-NeXT-Video of 56-pixel squares with 2×2 tokens each, with its processor, as save_pretrained writes it."""
    tokenizer = train_tokenizer(texts, vocabulary=400)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokenizer.all_special_tokens, "<image>", "<video>"]})
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "initializer_range": 0.3}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
              "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    config = LlavaNextVideoConfig(text_config=text, vision_config=vision, image_token_index=image, video_token_index=video,
                                  image_grid_pinpoints=[[56, 112]])
    square = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    LlavaNextVideoForConditionalGeneration(config).save_pretrained(folder)
    LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(**square), video_processor=LlavaNextVideoVideoProcessor(**square),
        tokenizer=tokenizer, chat_template=TEMPLATE, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1).save_pretrained(folder)


# the file belongs into vlm_hooks/families/; while you try it out, add its folder to that package's path instead
vlm_hooks.families.__path__.append(str(Path(__file__).parent / "extend" / "students"))

with tempfile.TemporaryDirectory() as folder:
    batch = samples()[:2]
    save_small_model(folder, [sample.question for sample in samples()])
    student = load_student(folder)
    student.model.eval()
    clips = [read_clip(sample.video, Sampling(frames=4)) for sample in batch]
    prompts = [student.prompt(sample.question) for sample in batch]
    encoding = student.encode(clips, [prompt.text for prompt in prompts], [sample.answer for sample in batch])
    grids, columns = student.grids(encoding.inputs, clips)
    print(f"{type(student.model).__name__}: {grids[0].shape} cells a clip, the first token is "
          f"seconds {grids[0].cell(0)[0]}, box {grids[0].cell(0)[1]}")

    matches = [match_words(split_words(sample.question), sample.question, text, offsets, prompt.question_start)
               for sample, prompt, text, offsets in zip(batch, prompts, encoding.texts, encoding.offsets, strict=True)]
    for sample, match in zip(batch, matches, strict=True):
        print(f"{sample.question!r}: {len(match.pairs)} of {match.total} words have tokens")
    request = CaptureRequest.from_positions([match.rows for match in matches], columns)
    with torch.no_grad():
        plain = student.model(**encoding.inputs).logits
        with capture(student.model):
            watched = student.model(**encoding.inputs, motion_capture=request).logits
    print(f"logits with the capture on: {'the same bit for bit' if torch.equal(plain, watched) else 'CHANGED'}; "
          f"rows {list(request.mean().shape)}")
    assert torch.equal(plain, watched)
