"""Configurations of published teachers, as their folders on the hub hold them: JSON files and no weights.

    folder = write_configs("cogvideox-5b", tmp_path)

Values are those that decide sizes, and the schedulers' own; what is left out is diffusers' default, which the published
files repeat. docs/teachers.md says which of them were compared with public documents.
"""

from __future__ import annotations

import json
from pathlib import Path

T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
          "feed_forward_proj": "gated-gelu"}
UMT5_XXL = {**T5_XXL, "vocab_size": 256384}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128320}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "vocab_size": 49408}
COGVIDEOX_SCHEDULER = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                       "beta_end": 0.012, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
                       "clip_sample": False, "set_alpha_to_one": True, "snr_shift_scale": 1.0}  # 2B: 3.0
COGVIDEOX_VAE = {"block_out_channels": [128, 256, 256, 512], "scaling_factor": 0.7}
WAN_SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SHIFTING = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
            "max_image_seq_len": 4096, "shift_terminal": 0.1}
WAN22_VAE = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
             "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4,
             "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}

# name: (pipeline, options of its own, {part: (library, class, configuration)})
CONFIGS = {
    "cogvideox-5b": ("CogVideoXPipeline", {}, {
        "text_encoder": ("transformers", "T5EncoderModel", T5_XXL),
        "transformer": ("diffusers", "CogVideoXTransformer3DModel", {
            "num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}),
        "vae": ("diffusers", "AutoencoderKLCogVideoX", COGVIDEOX_VAE),
        "scheduler": ("diffusers", "CogVideoXDDIMScheduler", COGVIDEOX_SCHEDULER)}),
    "cogvideox15-5b": ("CogVideoXPipeline", {}, {
        "text_encoder": ("transformers", "T5EncoderModel", T5_XXL),
        "transformer": ("diffusers", "CogVideoXTransformer3DModel", {
            "num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True, "patch_size_t": 2,
            "patch_bias": False, "sample_frames": 81, "sample_height": 96, "sample_width": 170}),
        "vae": ("diffusers", "AutoencoderKLCogVideoX", {**COGVIDEOX_VAE, "invert_scale_latents": True}),
        "scheduler": ("diffusers", "CogVideoXDDIMScheduler", COGVIDEOX_SCHEDULER)}),
    "wan21-1.3b": ("WanPipeline", {}, {
        "text_encoder": ("transformers", "UMT5EncoderModel", UMT5_XXL),
        "transformer": ("diffusers", "WanTransformer3DModel", {
            "num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}),
        "vae": ("diffusers", "AutoencoderKLWan", {}),
        "scheduler": ("diffusers", "UniPCMultistepScheduler", WAN_SCHEDULER)}),
    "wan22-5b": ("WanPipeline", {"boundary_ratio": None, "expand_timesteps": True}, {
        "text_encoder": ("transformers", "UMT5EncoderModel", UMT5_XXL),
        "transformer": ("diffusers", "WanTransformer3DModel", {
            "num_layers": 30, "num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336,
            "in_channels": 48, "out_channels": 48}),
        "transformer_2": (None, None, None),
        "vae": ("diffusers", "AutoencoderKLWan", WAN22_VAE),
        "scheduler": ("diffusers", "UniPCMultistepScheduler", {**WAN_SCHEDULER, "flow_shift": 5.0})}),
    "ltx-video": ("LTXPipeline", {}, {
        "text_encoder": ("transformers", "T5EncoderModel", T5_XXL),
        "transformer": ("diffusers", "LTXVideoTransformer3DModel", {
            "num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 64, "caption_channels": 4096}),
        "vae": ("diffusers", "AutoencoderKLLTXVideo", {}),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", SHIFTING)}),
    "hunyuan-video": ("HunyuanVideoPipeline", {}, {
        "text_encoder": ("transformers", "LlamaModel", LLAMA_8B),
        "text_encoder_2": ("transformers", "CLIPTextModel", CLIP_L),
        "transformer": ("diffusers", "HunyuanVideoTransformer3DModel", {
            "num_layers": 20, "num_single_layers": 40, "num_attention_heads": 24, "attention_head_dim": 128,
            "guidance_embeds": True}),
        "vae": ("diffusers", "AutoencoderKLHunyuanVideo", {}),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
        "tokenizer_2": ("transformers", "CLIPTokenizer", None)}),
    "mochi-1": ("MochiPipeline", {"force_zeros_for_empty_prompt": True}, {
        "text_encoder": ("transformers", "T5EncoderModel", T5_XXL),
        "transformer": ("diffusers", "MochiTransformer3DModel", {
            "num_layers": 48, "num_attention_heads": 24, "attention_head_dim": 128, "pooled_projection_dim": 1536}),
        "vae": ("diffusers", "AutoencoderKLMochi", {}),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True})}),
}


def write_configs(name: str, folder: Path) -> Path:
    """The folder of a teacher that holds configurations only."""
    pipeline, options, parts = CONFIGS[name]
    index = {"_class_name": pipeline, "_diffusers_version": "0.35.0", **options,
             "tokenizer": ["transformers", "T5TokenizerFast"]}
    for part, (library, kind, config) in parts.items():
        index[part] = [library, kind]
        if config is not None:
            (folder / part).mkdir(parents=True)
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            (folder / part / file).write_text(json.dumps({"_class_name": kind, **config}))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
