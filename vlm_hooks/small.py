"""A small Qwen2.5-VL of the real classes with its own small tokenizer: the embedded world's student before training.

Geometry for 64 x 64 frames: patch 8, temporal patch 2, merge 2, so 8 frames become 4 x 4 x 4 = 64 visual tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2Tokenizer,
                          Qwen2VLImageProcessor, Qwen2VLVideoProcessor)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>")
# Qwen2's own splitting rule
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: list[str], vocabulary: int = 1024) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen2's normaliser, splitting rule and special tokens, trained on `texts`."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, min_frequency=2,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    core.train_from_iterator(texts, trainer)
    trained = json.loads(core.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=trained["vocab"], merges=merges, unk_token=None, bos_token=None,
                               eos_token="<|im_end|>", pad_token="<|endoftext|>")
    further = [token for token in SPECIAL if token not in tokenizer.all_special_tokens]
    tokenizer.add_special_tokens({"additional_special_tokens": further})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_small_student(folder: Path | str, texts: list[str], *, hidden: int = 128, layers: int = 4, heads: int = 4,
                        vision_hidden: int = 64, vision_depth: int = 2, patch: int = 8, seed: int = 0) -> None:
    """Write an untrained student (weights, tokenizer, processors) to `folder` in the stock save_pretrained layout."""
    tokenizer = train_tokenizer(texts)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    head_dim = hidden // heads
    section = [head_dim // 2 - 2 * (3 * head_dim // 16), 3 * head_dim // 16, 3 * head_dim // 16]  # time, row, column
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
            "max_position_embeddings": 4096, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section},
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": vision_depth, "hidden_size": vision_hidden, "intermediate_size": 2 * vision_hidden, "num_heads": 4,
            "patch_size": patch, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 64,
            "fullatt_block_indexes": list(range(vision_depth)), "out_hidden_size": hidden, "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    limits = {"size": {"shortest_edge": patch * patch * 16, "longest_edge": patch * patch * 4 * 4096}}
    shared = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2, **limits}
    processor = Qwen2_5_VLProcessor(image_processor=Qwen2VLImageProcessor(**shared),
                                    video_processor=Qwen2VLVideoProcessor(**shared, do_sample_frames=False),
                                    tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
