"""A teacher of your own: extend/teachers/skyreels_v2.py, on a small random model of diffusers' real classes.

    python examples/add_teacher.py

With weights, the same is `load_teacher("FOLDER or hub name")`; nothing but the family's file knows the family.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from clips import samples
from diffusers import AutoencoderKLWan, SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

import vdm_priors.families
from enhancer.shipped import quiet_libraries, teacher_path
from enhancer.video.clip import Sampling, read_clip
from vdm_priors.errors import ModelError
from vdm_priors.extract import extract_priors
from vdm_priors.families import load_skeleton, load_teacher
from vdm_priors.harvest import HarvestRequest, harvest
from vdm_priors.settings import ExtractionSettings

quiet_libraries()
torch.manual_seed(0)


def save_small_model(folder: str) -> None:
    """A SkyReels-V2 text-to-video pipeline of a few thousand random parameters, as save_pretrained writes it."""
    tokenizer = AutoTokenizer.from_pretrained(Path(teacher_path("world")) / "tokenizer")
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                               num_heads=2))
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
        num_layers=2, rope_max_seq_len=32)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    SkyReelsV2Pipeline(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer,
                       scheduler=scheduler).save_pretrained(folder)


with tempfile.TemporaryDirectory() as folder:
    save_small_model(folder)
    try:
        load_teacher(folder)
    except ModelError as error:
        print(f"before: {str(error).split('. ')[0]}.")

    # the file belongs into vdm_priors/families/; while you try it out, add its folder to that package's path instead
    vdm_priors.families.__path__.append(str(Path(__file__).parent / "extend" / "teachers"))
    teacher = load_teacher(folder)
    counted = load_skeleton(folder)  # what `enhancer validate` asks: geometry without weights
    print(f"after:  {type(teacher).__name__}, {len(counted.attention_layers)} attention layers, "
          f"a token is {counted.cell[0]}×{counted.cell[1]} pixels")

    sample = samples()[0]
    clip = read_clip(sample.video, Sampling(frames=5))
    pixels = teacher.prepare_frames(clip.frames, (64, 64))
    latents, text = teacher.encode_video(pixels), teacher.encode_text([sample.question])[0]
    timestep = teacher.schedule(latents.shape[1:]).levels(4)[2].timestep
    plain = teacher.predict(latents, timestep, text)
    with harvest(teacher, HarvestRequest(text_tokens=4)) as harvested:
        watched = teacher.predict(latents, timestep, text)
    print(f"prediction with the harvest on: {'the same bit for bit' if torch.equal(plain, watched) else 'CHANGED'}")
    assert torch.equal(plain, watched)

    settings = ExtractionSettings(steps=2, harvest_at="inversion", words="content", reconstruction=False)
    [prior] = extract_priors(teacher, [clip], [sample.question], settings, size=(64, 64))
    print(f"prior: {', '.join(word.text for word in prior.words)} on {prior.grid.shape} cells")
