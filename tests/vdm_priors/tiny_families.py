"""Small random pipelines of every family, of diffusers' real classes, written and loaded as folders.

Used by the contract matrix and by hand: `python tests/vdm_priors/tiny_families.py wan FOLDER`.
Geometry: two or three latent frames, a few tokens a frame; clips of FRAMES[name] frames, SIZE pixels.
"""

from __future__ import annotations

import functools
import string
import sys
import tempfile
from pathlib import Path

import torch

from tests.tokenizers import T5
from tests.vdm_priors.tiny_teacher import build_tiny_teacher

SIZE = (32, 48)
FRAMES = {"cogvideox": 9, "cogvideox15": 9, "wan": 5, "wan22": 5, "ltx": 5, "hunyuan": 5, "mochi": 7}
FAMILIES = tuple(FRAMES)
VOCABULARY = 32128  # of the T5 tokenizer


def build_cogvideox(folder: Path) -> None:
    build_tiny_teacher(folder)


def build_cogvideox15(folder: Path) -> None:
    build_tiny_teacher(folder, patch_frames=2, ofs=True, latent_side=12)


def build_wan(folder: Path) -> None:
    """Wan 2.1: one transformer, UniPC as its hub folders have it."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    _save_wan(folder, scheduler)


def build_wan22(folder: Path) -> None:
    """Wan 2.2: a second transformer below half of the time, which is told of every token."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    _save_wan(folder, scheduler, transformer_2=_wan_transformer(), boundary_ratio=0.5, expand_timesteps=True)


def _wan_transformer():
    from diffusers import WanTransformer3DModel

    return _livelier(WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ))


def _save_wan(folder: Path, scheduler, **stages) -> None:
    from diffusers import AutoencoderKLWan, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 1.0, 2.0],
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    transformer = _wan_transformer()
    WanPipeline(
        tokenizer=_t5_tokenizer(), text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler,
        **stages,
    ).save_pretrained(folder)


def build_ltx(folder: Path) -> None:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    widths, one = (8, 8, 8, 8), (1, 1, 1, 1, 1)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=one,
        decoder_layers_per_block=one, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), patch_size=2, patch_size_t=1,
        timestep_conditioning=True, temporal_compression_ratio=4, scaling_factor=0.9,
    )
    vae.latents_mean.uniform_(-0.5, 0.5)
    vae.latents_std.uniform_(0.5, 2.0)
    transformer = _livelier(LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    ))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=4, max_image_seq_len=64,
        shift_terminal=0.1,
    )
    LTXPipeline(
        tokenizer=_t5_tokenizer(), text_encoder=_t5_encoder(16), vae=vae, transformer=transformer, scheduler=scheduler
    ).save_pretrained(folder)


def build_hunyuan(folder: Path) -> None:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel

    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    transformer = _livelier(HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ))
    letters = list(string.ascii_lowercase + string.digits + ".,?'")
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer_2 = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    text_encoder_2 = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))
    text_encoder = LlamaModel(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2,
    ))
    HunyuanVideoPipeline(
        tokenizer=_t5_tokenizer(), text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), tokenizer_2=tokenizer_2, text_encoder_2=text_encoder_2,
    ).save_pretrained(folder)


def build_mochi(folder: Path) -> None:
    from diffusers import (
        AutoencoderKLMochi,
        FlowMatchEulerDiscreteScheduler,
        MochiPipeline,
        MochiTransformer3DModel,
    )

    vae = AutoencoderKLMochi(
        latent_channels=4, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1, 1, 1, 1, 1), latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 1.0, 2.0],
    )
    transformer = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4,
    )
    torch.nn.init.normal_(transformer.pos_frequencies, std=0.05)
    MochiPipeline(
        tokenizer=_t5_tokenizer(), text_encoder=_t5_encoder(16), vae=vae, transformer=_livelier(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True), force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)


def _livelier(transformer):
    """Larger queries, keys and texts, so that attention differs visibly from uniform."""
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if ("norm_q" in name or "norm_k" in name or "norm_added" in name) and weight.ndim == 1:
                weight.add_(1.0 + torch.rand_like(weight))
    return transformer


def _t5_encoder(width: int):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def _t5_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(T5)


def build(name: str, folder: str | Path) -> Path:
    """Save the family's pipeline; the same weights every time."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    globals()[f"build_{name}"](Path(folder))
    torch.set_rng_state(state)
    return Path(folder)


@functools.cache
def tiny_family(name: str):
    """The loaded small teacher of a family, one per process."""
    from vdm_priors.families import load_teacher

    folder = tempfile.TemporaryDirectory(prefix=f"tiny-{name}-")
    teacher = load_teacher(build(name, folder.name))
    teacher.kept_folder = folder  # deleted with the teacher, at the end of the process
    return teacher


if __name__ == "__main__":
    print(build(sys.argv[1], sys.argv[2]))
