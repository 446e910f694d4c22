"""A small random Qwen2.5-VL of the real classes, with its full processor folder.

vocabulary "qwen2": the real Qwen2 tokenizer; "bytes": the same class
with a byte vocabulary, which is quick and needs no file.
"""

from __future__ import annotations

import atexit
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.tokenizers import QWEN2
from vlm_hooks.families import load_student

VISION_TOKENS = [  # in Qwen2.5-VL's order: ids 151646 to 151656 of the real vocabulary
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Clip:
    """What the student needs of enhancer's Clip."""

    frames: np.ndarray
    times: list[float]
    duration: float
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


def make_clip(frames: int = 4, height: int = 32, width: int = 48, fps: float = 2.0, seed: int = 0):
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)
    return Clip(pixels, [index / fps for index in range(frames)], frames / fps)


def make_tokenizer(vocabulary: str, added: list[str] = VISION_TOKENS, **settings) -> Qwen2Tokenizer:
    """Qwen2's tokenizer, or the same class with a byte vocabulary, with `added` special tokens."""
    chat = ["<|im_start|>", "<|im_end|>"]
    if vocabulary == "qwen2":
        tokenizer = Qwen2Tokenizer.from_pretrained(QWEN2, **settings)
    else:
        vocab = {symbol: index for index, symbol in enumerate(_byte_alphabet())}
        ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], **ends, **settings)
        tokenizer.add_special_tokens({"additional_special_tokens": chat})
    tokenizer.add_special_tokens({"additional_special_tokens": chat + added})
    return tokenizer


def save_tiny_student(folder: Path, vocabulary: str = "bytes", seed: int = 0, **text) -> Path:
    """Write model and processor; `text` changes the decoder's config."""
    tokenizer = make_tokenizer(vocabulary)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]
            },
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "initializer_range": 0.3,  # attention far from uniform
            **text,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 32, "fullatt_block_indexes": [1], "out_hidden_size": 32,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"size": {"shortest_edge": 16 * 16, "longest_edge": 128 * 128}}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes, **pixels),
        video_processor=Qwen2VLVideoProcessor(**sizes, **pixels),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


@cache
def tiny_folder(vocabulary: str = "bytes") -> Path:
    folder = Path(mkdtemp(prefix="tiny-student-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save_tiny_student(folder, vocabulary)


def tiny_student(vocabulary: str = "bytes", attn: str = "sdpa"):
    """A fresh student each time: tests may train it."""
    student = load_student(tiny_folder(vocabulary), attn=attn)
    student.model.eval()
    return student


def _byte_alphabet() -> list[str]:
    """GPT-2's printable symbol of every byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())
