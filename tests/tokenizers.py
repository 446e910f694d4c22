"""Where the tests find the real tokenizers."""

from pathlib import Path

QWEN2 = Path(__file__).parent / "data" / "tokenizers" / "qwen2"
T5 = Path(__file__).parents[1] / "enhancer" / "models" / "world-teacher" / "tokenizer"
