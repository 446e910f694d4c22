"""Trains the embedded world's teacher: first its VAE on crops, then its text-to-video diffusion transformer on latents.

transformers' Trainer runs both; a rerun continues from the last checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from enhancer.video.clip import Sampling, read_clip
from enhancer.world.make import WorldSettings, make_world
from enhancer.world.render import render_masks
from enhancer.world.truth import WorldTruth, load_truth
from vdm_priors import small
from vdm_priors.errors import UserError


@dataclass
class TeacherTraining:
    """Settings of the teacher's training."""

    world: WorldSettings = field(default_factory=lambda: WorldSettings(seed=11, train_clips=10000, test_clips=300))
    vae_steps: int = field(default=900, metadata={"help": "steps of the VAE", "min": 1})
    vae_batch: int = field(default=8, metadata={"help": "crops of 32 x 32 a step", "min": 1})
    vae_rate: float = field(default=2e-3, metadata={"help": "peak learning rate of the VAE"})
    steps: int = field(default=2600, metadata={"help": "steps of the diffusion transformer", "min": 1})
    batch_size: int = field(default=32, metadata={"help": "clips a step", "min": 1})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "peak learning rate of transformer and text encoder"})
    things_weight: float = field(default=10.0, metadata={
        "help": "extra loss weight of latent cells that things cover: they are a twelfth of the picture, and what texts speak of",
        "min": 0})
    drop_text: float = field(default=0.1, metadata={"help": "share of empty prompts, for guidance", "min": 0, "max": 1})
    tokenizer: str = field(default="", metadata={"help": "folder of a T5 tokenizer; empty: the shipped teacher's"})
    seed: int = field(default=0, metadata={"help": "seed of weights, noise and data order"})
    bf16: bool = field(default=True, metadata={"help": "bfloat16 autocast: faster on CPUs that have it"})
    save_every: int = field(default=200, metadata={"help": "steps between checkpoints"})

    def check(self) -> list[str]:
        """What cannot be trained on, one sentence a fault."""
        faults, size = [], small.SmallTeacherSize()
        for name, value in (("height", self.world.height), ("width", self.world.width)):
            if value != size.side:
                faults.append(f"training.world.{name} is {value}: the small teacher is made for {size.side}")
        if self.world.frames < size.frames:
            faults.append(f"training.world.frames is {self.world.frames}: the small teacher needs {size.frames} at least")
        if self.tokenizer and not Path(self.tokenizer).is_dir():
            faults.append(f"training.tokenizer: there is no folder {self.tokenizer}")
        return faults


class Crops(torch.utils.data.Dataset):
    """Random 32 x 32 crops of clips for the VAE, which is convolutional: cheaper steps, the same filters."""

    def __init__(self, frames_knhwc: np.ndarray, seed: int, side: int = 32):
        self.frames, self.side, self.seed = frames_knhwc, side, seed

    def __len__(self) -> int:
        return len(self.frames) * 4

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng([self.seed, index])
        clip = self.frames[index % len(self.frames)]
        top, left = rng.integers(0, clip.shape[1] - self.side + 1, 2)
        crop = clip[:, top : top + self.side, left : left + self.side]
        return {"pixels": torch.from_numpy(crop.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1.0}


class Latents(torch.utils.data.Dataset):
    """Latents with a text of the clip: its caption (every second time), its question, or question and answer.

    weights [K, F, h, w]: of each latent cell in the loss.
    """

    def __init__(self, latents: torch.Tensor, weights: torch.Tensor, rows: list[dict], tokenizer, length: int, drop: float,
                 seed: int):
        self.latents, self.weights, self.rows, self.tokenizer = latents, weights, rows, tokenizer
        self.length, self.drop, self.seed = length, drop, seed

    def __len__(self) -> int:
        return len(self.rows) * 4

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index % len(self.rows)]
        question, answer = row["conversations"][0]["value"].removeprefix("<video>\n"), row["conversations"][1]["value"]
        rng = np.random.default_rng([self.seed, index])
        text = (row["caption"], question, row["caption"], f"{question} {answer}")[index // len(self.rows)]
        if rng.random() < self.drop:
            text = ""
        ids = self.tokenizer(text, padding="max_length", max_length=self.length, truncation=True)["input_ids"]
        n = index % len(self.rows)
        return {"latents": self.latents[n], "weights": self.weights[n], "input_ids": torch.tensor(ids)}


class _Report(TrainerCallback):
    def __init__(self, progress, label):
        self.progress, self.label = progress, label

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.progress and logs and "loss" in logs:
            self.progress(state.global_step, state.max_steps, f"{self.label} loss {logs['loss']:.4f}")


def _fit(module, data, folder: Path, settings: TeacherTraining, steps: int, batch: int, rate: float, progress, label: str):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=max(steps // 20, 1), weight_decay=0.01, bf16=settings.bf16, use_cpu=True,
        seed=settings.seed, logging_steps=25, report_to=[], save_steps=settings.save_every, save_total_limit=1,
        disable_tqdm=True, remove_unused_columns=False, max_grad_norm=1.0, dataloader_pin_memory=False)
    trainer = Trainer(model=module, args=arguments, train_dataset=data, callbacks=[_Report(progress, label)])
    trainer.remove_callback(PrinterCallback)  # progress says the same, readably
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    return trainer.state.log_history


@torch.no_grad()
def encode_all(vae, frames_knhwc: np.ndarray, batch: int = 32) -> torch.Tensor:
    """Posterior modes of all clips, [K, F, C, h, w] float32, unscaled."""
    parts = []
    with torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(frames_knhwc), batch):
            pixels = torch.from_numpy(frames_knhwc[start : start + batch]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
            parts.append(vae.encode(pixels).latent_dist.mode().float())
    return torch.cat(parts).permute(0, 2, 1, 3, 4).contiguous()


def cover(truth: WorldTruth, rows: list[dict], times: list[float], cells: int) -> torch.Tensor:
    """Share of each latent cell that things cover in frames at `times` (seconds), [K, F, cells, cells].

    A causal VAE's first latent stands for one frame, the others for four.
    """
    shares = []
    for row in rows:
        scene = truth.scene(row["video"])
        things = np.stack([render_masks(scene, round(t * scene.fps)).any(axis=0) for t in times]).astype(np.float32)
        side = scene.height // cells
        parts = things.reshape(len(times), cells, side, cells, side).mean(axis=(2, 4))
        shares.append(np.concatenate([parts[:1], parts[1:].reshape(-1, 4, cells, cells).mean(axis=1)]))
    return torch.from_numpy(np.stack(shares))


def train_teacher(folder: Path, settings: TeacherTraining, progress=None) -> Path:
    """World, VAE, latents, diffusion transformer, pipeline folder/model; continues after an interruption."""
    faults = settings.check()
    if faults:
        raise UserError("; ".join(faults) + ".")
    world, size = folder / "world", small.SmallTeacherSize()
    make_world(world, settings.world, progress, workers=2)
    rows = json.loads((world / "train.json").read_text(encoding="utf-8"))
    read = [read_clip(world / row["video"], Sampling(frames=size.frames)) for row in rows]
    clips, times = np.stack([clip.frames for clip in read]), [float(t) for t in read[0].times]  # all clips are of one length
    del read
    tokenizer_folder = settings.tokenizer or str(Path(__file__).parents[1] / "models" / "world-teacher" / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(settings.seed)
    history = {}

    vae, vae_file = small.build_vae(size), folder / "vae.safetensors"
    if vae_file.is_file():
        vae.load_state_dict(load_file(vae_file))
    else:
        history["vae"] = _fit(small.VaeLoss(vae), Crops(clips, settings.seed), folder / "vae", settings, settings.vae_steps,
                              settings.vae_batch, settings.vae_rate, progress, "VAE")
        save_file(vae.state_dict(), vae_file)
    vae.eval().requires_grad_(False)

    latents_file = folder / "latents.safetensors"
    if not latents_file.is_file():
        save_file({"latents": encode_all(vae, clips).half()}, latents_file)
    latents = load_file(latents_file)["latents"].float()
    scale = 1.0 / float(latents.std())
    vae.register_to_config(scaling_factor=scale)

    torch.manual_seed(settings.seed)
    model = small.DenoisingLoss(small.build_transformer(size), small.build_text_encoder(size, len(tokenizer)))
    weights = 1.0 + settings.things_weight * cover(load_truth(world), rows, times, latents.shape[-1])
    data = Latents(latents * scale, weights, rows, tokenizer, size.text_tokens, settings.drop_text, settings.seed)
    history["transformer"] = _fit(model, data, folder / "transformer", settings, settings.steps, settings.batch_size,
                                  settings.learning_rate, progress, "transformer")
    small.save_pipeline(folder / "model", tokenizer_folder, vae, model.transformer, model.text_encoder)
    (folder / "training.json").write_text(json.dumps({"settings": asdict(settings), "history": history}, indent=1),
                                          encoding="utf-8")
    return folder / "model"
