"""Small random models of every student family's real classes, each with its full processor folder.

A name is a family file's, or, where one file serves two makes, "file-make". Geometry is that of the public checkpoints
in small: patches of 8 pixels, pairs of frames and 2×2 merging for the Qwens; 32-pixel squares, 2×2 tokens for InternVL;
and for LLaVA-OneVision 44-pixel squares of which 5×5 patches cover 40, pooled to 3×3 tokens.
"""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.vlm_hooks.tiny_student import CHAT_TEMPLATE, VISION_TOKENS, make_tokenizer, save_tiny_student
from vlm_hooks.families import load_student

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # attention far from uniform
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
# as their checkpoints have them, in short: no system message, the video first, the question on a line of its own
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _ids(tokenizer) -> dict:
    """Token ids that every text config names."""
    ids = tokenizer.convert_tokens_to_ids
    return {"vocab_size": len(tokenizer), "bos_token_id": ids("<|endoftext|>"), "eos_token_id": ids("<|im_end|>")}


def _qwen_ids(tokenizer) -> dict:
    ids = tokenizer.convert_tokens_to_ids
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: ids(token) for name, token in names.items()}


def save_qwen2_vl(folder: Path, vocabulary: str) -> None:
    tokenizer = make_tokenizer(vocabulary, VISION_TOKENS)
    config = Qwen2VLConfig(
        text_config={**TEXT, **_ids(tokenizer), "rope_parameters": MROPE},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 8,
                       "spatial_merge_size": 2, "temporal_patch_size": 2},
        tie_word_embeddings=True, **_qwen_ids(tokenizer))
    sizes = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"size": {"shortest_edge": 16 * 16, "longest_edge": 128 * 128}}
    _save(folder, Qwen2VLForConditionalGeneration(config), Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes, **pixels),
        video_processor=Qwen2VLVideoProcessor(**sizes, **pixels),
        tokenizer=tokenizer, chat_template=CHAT_TEMPLATE))


def save_qwen3_vl(folder: Path, vocabulary: str) -> None:
    tokenizer = make_tokenizer(vocabulary, VISION_TOKENS)
    config = Qwen3VLConfig(
        text_config={**TEXT, **_ids(tokenizer), "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
                       "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32,
                       "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=True, **_qwen_ids(tokenizer))
    sizes = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"shortest_edge": 2 * 16 * 16, "longest_edge": 8 * 128 * 128}  # of all frames together
    _save(folder, Qwen3VLForConditionalGeneration(config), Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes, size={"shortest_edge": 16 * 16, "longest_edge": 128 * 128}),
        video_processor=Qwen3VLVideoProcessor(**sizes, size=pixels),
        tokenizer=tokenizer, chat_template=CHAT_TEMPLATE))


def save_internvl(folder: Path, vocabulary: str, text: dict | None = None) -> None:
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
             "video_token": "<video>"}
    tokenizer = make_tokenizer(vocabulary, list(marks.values()), extra_special_tokens=marks)
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, **_ids(tokenizer), **(text or {})},
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
                       "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, tie_word_embeddings=True)
    square = {"size": {"height": 32, "width": 32}}
    _save(folder, InternVLForConditionalGeneration(config), InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(**square), video_processor=InternVLVideoProcessor(**square),
        tokenizer=tokenizer, image_seq_length=4, chat_template=INTERNVL_TEMPLATE))


def save_internvl3_5(folder: Path, vocabulary: str) -> None:
    save_internvl(folder, vocabulary, {"model_type": "qwen3", "head_dim": 8})


def save_llava_onevision(folder: Path, vocabulary: str) -> None:
    tokenizer = make_tokenizer(vocabulary, ["<image>", "<video>"])
    ids = tokenizer.convert_tokens_to_ids
    pinpoints = [[44, 44], [44, 88], [88, 44]]
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, **_ids(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48,
                       "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 44, "patch_size": 8,
                       "vision_use_head": False},
        image_token_index=ids("<image>"), video_token_index=ids("<video>"), image_grid_pinpoints=pinpoints,
        tie_word_embeddings=True)
    square = {"size": {"height": 44, "width": 44}}
    _save(folder, LlavaOnevisionForConditionalGeneration(config), LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**square, image_grid_pinpoints=pinpoints),
        video_processor=LlavaOnevisionVideoProcessor(**square), tokenizer=tokenizer, num_image_tokens=25,
        vision_feature_select_strategy="full", chat_template=LLAVA_TEMPLATE))


def _save(folder: Path, model, processor) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


SAVERS: dict[str, Callable[[Path, str], object]] = {
    "qwen2_vl": save_qwen2_vl,
    "qwen2_5_vl": save_tiny_student,
    "qwen3_vl": save_qwen3_vl,
    "internvl": save_internvl,
    "internvl-3.5": save_internvl3_5,
    "llava_onevision": save_llava_onevision,
}


@cache
def family_folder(name: str, vocabulary: str = "bytes") -> Path:
    folder = Path(mkdtemp(prefix=f"tiny-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    SAVERS[name](folder, vocabulary)
    return folder


def family_student(name: str, vocabulary: str = "bytes", attn: str = "sdpa"):
    """A fresh student each time: tests may train it."""
    student = load_student(family_folder(name, vocabulary), attn=attn)
    student.model.eval()
    return student
