"""How much memory a training takes on each device, counted from the student's configuration: no weights are read.

Parameters are exact (the model is built without memory). What a layer keeps for the backward pass is counted from the
operations of a pre-norm transformer block as transformers writes it (RMSNorm in float32, gated MLP, fused attention);
tests/enhancer/test_training_memory.py holds it against what autograd really saves.

Legend: h width, kv width of keys (and of values), i width of the MLP, e bytes of a number in the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from enhancer.launch import launch_file
from enhancer.train_settings import TrainSettings
from vdm_priors.errors import RecipeError

PATCHES = 4  # patches that the merger joins to a visual token, in every family
MOMENTS = 2  # of AdamW
LOGIT_COPIES = 3  # logits, the gradient of the learnt ones put among zeros, and that padded by the last position
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device.

    activations: kept from the forward to the backward; passing: what the backward of one layer holds besides, and what
    it computes again with gradient checkpointing; gathered: what sharding brings together for a while, or DDP's buckets.
    """

    parameters: int  # number, of the whole model
    trained: int  # number that is trained
    weights: float
    gradients: float
    optimizer: float
    activations: float
    passing: float
    logits: float
    gathered: float

    @property
    def total(self) -> float:
        """At the peak of a step: gradients appear as activations go."""
        coming = max(self.activations + self.logits, self.gradients)
        return self.weights + self.optimizer + self.gathered + self.passing + coming


def training_memory(
    student: Any, settings: TrainSettings, dtype: str, tokens: int, visual: int, processes: int = 1
) -> TrainingMemory:
    """Estimate for batches of settings.batch_size samples of `tokens` tokens, `visual` of them visual.

    student: of `skeleton_student`, changed if there is a LoRA; dtype: of the weights; processes: of the launch.
    """
    trained = _trained(student, settings)
    parameters = sum(parameter.numel() for parameter in student.model.parameters())
    number = sum(trained.values())
    size = SIZES[dtype]
    # accelerate and DeepSpeed keep float32 master weights of what is trained in bfloat16
    kept = 4 if settings.sharded and settings.bf16 else size
    weights, gradients, optimizer = size * (parameters - number) + kept * number, kept * number, MOMENTS * kept * number
    config = student.model.config
    gathered = 0.0
    if settings.sharded:
        whole = _keeps_whole_weights(settings)
        gathered = 0.0 if whole else 2 * size * parameters / max(config.get_text_config().num_hidden_layers, 1)
        weights = weights if whole else weights / processes
        gradients, optimizer = gradients / processes, optimizer / processes
    else:
        gathered += gradients if processes > 1 else 0  # DDP's buckets
        gathered += 2 * number if settings.bf16 and size == 4 else 0  # autocast keeps its copies through a forward
    e = 2 if settings.bf16 else size
    text, vision = config.get_text_config(), config.vision_config
    activations = passing = 0.0
    for part, layers, count in (("llm", text, tokens), ("vision", vision, PATCHES * visual)):
        if part == "vision" and not trained["vision"]:
            continue
        adapters_alone = settings.lora is not None and part in settings.lora.parts
        kept, besides = _layers(layers, e, size, settings.gradient_checkpointing, adapters_alone)
        activations += settings.batch_size * count * kept
        passing = max(passing, settings.batch_size * count * besides)
    logits = LOGIT_COPIES * settings.batch_size * tokens * text.vocab_size * e
    return TrainingMemory(parameters, number, weights, gradients, optimizer, activations, passing, logits, gathered)


def _keeps_whole_weights(settings: TrainSettings) -> bool:
    """Whether each device has all weights though there is sharding: ZeRO shards them from its stage 3 on."""
    if not settings.deepspeed:
        return False
    try:
        chosen = launch_file(settings.deepspeed, "training.deepspeed")
    except RecipeError:  # which preflight lists among the faults
        return False
    return chosen.get("zero_optimization", {}).get("stage", 0) < 3


def skeleton_student(name: str) -> Any:
    """The student with a model that has shapes and no weights. ModelError as `light_student`."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from enhancer.preflight_models import light_student

    student, _ = light_student(name)
    with torch.device("meta"):
        student.model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name))
    return student


def _trained(student: Any, settings: TrainSettings) -> dict[str, int]:
    """How many parameters of each part are trained."""
    lora = settings.lora
    if lora is not None:
        from vlm_hooks.lora import add_lora, is_adapter

        add_lora(student, lora.rank, lora.alpha, lora.dropout, lora.targets, lora.parts)
    counts = {}
    for part, members in student.parts().items():
        adapters_alone = lora is not None and part in lora.parts
        chosen = [p for name, p in members if not adapters_alone or is_adapter(name)]
        counts[part] = sum(p.numel() for p in chosen) if getattr(settings, f"learning_rate_{part}") > 0 else 0
    return counts


def _layers(config: Any, e: int, weight_size: int, checkpointing: bool, adapters_alone: bool) -> tuple[float, float]:
    """Bytes a token that the layers of a text or vision config keep for the backward, and that a layer's takes more."""
    h, i = config.hidden_size, config.intermediate_size
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    kv = h * (getattr(config, "num_key_value_heads", None) or heads) // heads
    depth = getattr(config, "num_hidden_layers", None) or config.depth
    # a norm keeps its input in float32, the normalised and its output; the residual stream follows the weights
    norm = {(4, 4): 12, (2, 4): 10, (2, 2): 8}[(e, weight_size)]
    if adapters_alone:  # a frozen norm needs no normalised input
        norm -= weight_size
    # queries and output, keys and values; gate, its activation, up, their product
    layer = 2 * norm * h + e * (2 * h + 2 * kv) + 4 * e * i
    besides = e * (2 * h + 2 * i)  # gradients of the residual stream and between the MLP's layers
    return (depth * weight_size * h, layer + besides) if checkpointing else (depth * layer, besides)
