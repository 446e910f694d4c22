"""The keys of `training`: how a student is fine-tuned and aligned. Where the paper has a value it is the default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from enhancer.recipe import option

PARTS = ("vision", "merger", "llm")
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNCHANGING = ("save_every", "log_every", "resume", "workers", "report_to")  # keys that change nothing in the weights
# what transformers' Trainer can report to, and the package of each
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet_ml": "comet_ml",
            "trackio": "trackio", "swanlab": "swanlab", "clearml": "clearml"}
AUTO, NEVER = "auto", "never"  # of `resume`, beside a path


@dataclass
class AlignmentSettings:
    """How the student's attention is aligned to the prior."""

    weight: float = option(1.0, "λ: weight of the alignment loss; 0 trains on the answers alone and captures nothing",
                           min=0, max=1e6)
    schedule: str = option("constant", "course of λ: constant is the paper's; linear falls to 0 at the end, so that "
                                       "the prior shows where to look and then lets go", choices=("constant", "linear"))
    loss: str = option("l2", "distance of a word's row from its prior; l2 is the paper's unsquared norm (Eq. 15), mse "
                             "its square (Eq. 20)", choices=("l2", "mse", "kl", "js", "cosine"))
    aligner: str = option("pointwise", "network between student row and prior, discarded after training: per cell, per "
                                       "whole row, over neighbouring cells, or none",
                          choices=("pointwise", "row", "conv3d", "identity"))
    normalize: str = option("row", "row divides both sides by their mass over the video; none keeps raw attention "
                                   "(gradients shrink with the number of cells)", choices=("row", "none"))
    regrid: str = option("overlap", "student cells to prior cells: overlap keeps mass, trilinear interpolates at cell "
                                    "centres", choices=("overlap", "trilinear"))
    compare_on: str = option("prior", "grid of the comparison: prior is the paper's; on the student's, sources of "
                                      "different resolution count alike", choices=("prior", "student"))
    layers: list[int] | None = option(None, "decoder layers whose attention is averaged; negative numbers count from "
                                            "the last; null is all")
    sharpen: float = option(1.0, "exponent of the prior's cells on the grid of the comparison: 1 leaves them (the "
                                 "paper), 2 to 4 gather a diffuse prior at its peaks", min=0.01, max=100)
    answer_row: bool = option(False, "also align the row that gives the answer's first token, to what the prior's "
                                     "words say together; the paper aligns the words' own rows only")
    missing_prior: str = option("ar_only", "a sample without a prior trains on its answer alone, is left out (skip), "
                                           "or stops the run (fail)", choices=("ar_only", "skip", "fail"))
    max_unmatched: float = option(0.5, "largest share of the priors' words that may have no token in the student's "
                                       "prompt before the run stops", min=0, max=1)
    gradient_norms: str = option("last", "every log_every steps, the norm of each loss's gradient (λ not in it) on the "
                                         "parameters that both reach, in history.jsonl: last looks at the attention of "
                                         "the last captured layer; all at the whole model, for a backward pass more a "
                                         "loss; null in it where weights are sharded (FSDP2, ZeRO)",
                                 choices=("last", "all", "none"))

    def __post_init__(self) -> None:
        if self.normalize != "row" and self.loss in ("kl", "js"):
            raise ValueError(f"loss {self.loss} compares distributions: set normalize to row")
        if self.normalize != "row" and self.sharpen != 1:
            raise ValueError("sharpen loses the scale of a prior: set normalize to row, or leave sharpen at 1")

    def weight_at(self, progress: float) -> float:
        """λ when `progress` (0 to 1) of the steps are done."""
        return self.weight * (1 - progress) if self.schedule == "linear" else self.weight


@dataclass
class LoraSettings:
    """Low-rank adapters: in their parts they alone are trained; other parts go by their learning rates as ever."""

    rank: int = option(16, "rank of the adapters: their size grows with it", min=1, max=4096)
    alpha: float = option(32.0, "the adapters' output is scaled by alpha / rank", min=0)
    dropout: float = option(0.0, "share of the adapters' inputs dropped in training", min=0, max=0.99)
    targets: list[str] = option(LORA_TARGETS, "how the names of the linear layers end that get an adapter, e.g. q_proj")
    parts: list[str] = option(["llm"], "parts of the model whose layers get adapters and whose own weights stay as "
                                       "they are", choices=PARTS)


@dataclass
class TrainSettings:
    """How the student is fine-tuned."""

    steps: int = option(400, "optimizer steps", min=1)
    batch_size: int = option(32, "samples a forward and process; memory grows with it", min=1, max=4096)
    accumulate: int = option(1, "forwards a step: batch_size × accumulate × processes samples, with the memory of "
                                "batch_size", min=1, max=4096)
    # the paper's rates, for models of billions of parameters; the shipped student takes 100 times these
    learning_rate_llm: float = option(1e-5, "peak learning rate of the language model (and the aligner); 0 freezes it; "
                                            "1e-5 suits large models, 1e-3 the shipped one", min=0, max=1)
    learning_rate_merger: float = option(1e-5, "peak learning rate of the vision-to-language merger; 0 freezes it; "
                                               "1e-5 suits large models, 1e-3 the shipped one", min=0, max=1)
    learning_rate_vision: float = option(2e-6, "peak learning rate of the vision tower; 0 freezes it; "
                                               "2e-6 suits large models, 2e-4 the shipped one", min=0, max=1)
    optimizer: str = option("adamw", "adamw is the paper's; muon orthogonalises the steps of the layers' matrices "
                                     "(AdamW for the rest), which teaches a model from nothing faster; for whole copies only",
                            choices=("adamw", "muon"))
    weight_decay: float = option(0.1, "weight decay, not on norms and biases", min=0, max=1)
    warmup: float = option(0.03, "share of the steps in which the learning rates rise from 0", min=0, max=1)
    schedule: str = option("cosine", "course of the learning rates after the warm-up",
                           choices=("cosine", "linear", "constant"))
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 leaves them", min=0)
    bf16: bool = option(False, "bfloat16 autocast: half the activation memory, faster where the hardware has it")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward: less memory, a third slower")
    lora: LoraSettings | None = option(None, "train low-rank adapters, not a part's own weights; merged at the end")
    fsdp: str | None = option(None, "shard weights, gradients and optimizer over GPUs by FSDP2: a JSON file of "
                                    "transformers' fsdp_config, e.g. launch/fsdp2.json of the shipped recipes; null "
                                    "keeps a whole copy in each process")
    deepspeed: str | None = option(None, "shard by DeepSpeed ZeRO instead: its JSON file, e.g. launch/zero2.json or "
                                         "launch/zero3.json of the shipped recipes; needs `pip install deepspeed`; "
                                         "with bf16 the exported weights are rounded to it")
    save_every: int = option(0, "steps between checkpoints to resume from; 0 keeps none", min=0)
    log_every: int = option(10, "steps between two reports of progress (history.jsonl has every step)", min=1)
    resume: str = option(AUTO, "auto continues from the student's newest complete checkpoint; never deletes them and "
                               "starts over; else the path of a checkpoint of the same training, or of a run folder "
                               "(one that was moved, say) whose checkpoints are taken")
    report_to: str = option("none", "tracker that gets the rows of history.jsonl every log_every steps; its package "
                                    "must be installed, and tensorboard writes to the student's folder",
                            choices=("none", *TRACKERS))
    workers: int = option(0, "processes that decode and prepare batches ahead; 0: between the steps", min=0, max=64)
    alignment: AlignmentSettings = option(AlignmentSettings())

    def __post_init__(self) -> None:
        if self.fsdp and self.deepspeed:
            raise ValueError("fsdp and deepspeed both shard the model: set one of them")
        if self.optimizer == "muon" and self.sharded:
            raise ValueError("optimizer is muon, which needs whole matrices; fsdp and deepspeed cut them: set adamw")
        if self.resume in ("True", "False"):  # as YAML's true and false arrive
            raise ValueError(f"resume is {AUTO}, {NEVER} or a path, not {self.resume.lower()}")

    def rate(self, part: str) -> float:
        """Peak learning rate of a part of the student."""
        return getattr(self, f"learning_rate_{part}")

    @property
    def sharded(self) -> bool:
        """Whether a process holds only a part of the weights, or of what the optimizer keeps."""
        return bool(self.fsdp or self.deepspeed)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rates rise."""
        return math.ceil(self.warmup * self.steps)
