"""transformers' Trainer with an alignment loss, parameter groups and a history of every step.

Both losses are normalised over the whole step (all accumulated batches, all processes): the
answer loss by its tokens, the alignment by its samples. So 1 × 8 and 8 × 1 accumulation give
the same gradients, whatever a model family says about loss arguments.

Legend: B samples of a batch, S sequence positions, V vocabulary.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from enhancer.collate import NOTES, BatchNotes
from enhancer.data.samples import Problem
from enhancer.training import MARKER, PARTS, Progress, TrainSettings, warmup_steps
from vdm_priors.errors import UserError
from vlm_hooks.alignment import align_batch
from vlm_hooks.capture import capture

IGNORED = -100  # label of positions that are not learnt
ALIGNER_FILE = "aligner.safetensors"
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
ENOUGH_WORDS = 50  # below this, a share of unmatched words says little


def training_arguments(settings: TrainSettings, folder: Path, seed: int, device: torch.device) -> TrainingArguments:
    """The Trainer's arguments for our settings; nothing is reported but through our own history."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        weight_decay=settings.weight_decay,
        warmup_steps=warmup_steps(settings),
        lr_scheduler_type=SCHEDULES[settings.schedule],
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        save_total_limit=2,  # the newest may still be incomplete
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
    )
    if arguments.n_gpu > 1:
        # DataParallel cannot carry the capture; several GPUs take torchrun or accelerate launch
        arguments._n_gpu = 1
    return arguments


class AlignedTrainer(Trainer):
    """Trains `student.model` and the aligner; `history`, `problems`, `remarks` are the outcome."""

    def __init__(
        self,
        *,
        student: Any,
        settings: TrainSettings,
        aligner: nn.Module | None,
        args: TrainingArguments,
        dataset: Any,
        collator: Any,
        history_path: Path,
        identity: str,
        progress: Progress | None,
    ) -> None:
        self.student = student
        self.settings = settings
        self.aligner = aligner
        self.identity = identity
        self.progress = progress
        self.history_path = history_path
        self.history: list[dict] = []
        self._problems: dict[tuple, Problem] = {}
        self._remarks: dict[tuple, Problem] = {}
        self._notes: BatchNotes | None = None
        self._samples_in_step = 1
        self._step: dict[str, float] = {}
        self._words = {"matched": 0, "total": 0}
        super().__init__(
            model=student.model,
            args=args,
            train_dataset=dataset,
            data_collator=collator,
            # a loss function of one's own is what tells the Trainer not to rescale the loss
            compute_loss_func=self._loss,
            callbacks=[_Steps(self)],
        )
        self.remove_callback(PrinterCallback)

    @property
    def problems(self) -> list[Problem]:
        """Samples that were left out."""
        return list(self._problems.values())

    @property
    def remarks(self) -> list[Problem]:
        """What is to know about samples that were used."""
        return list(self._remarks.values())

    def run(self, checkpoint: Path | None) -> int:
        """Train to the end, from the checkpoint if there is one; the step it began at."""
        required = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        start = self._restore(checkpoint) if checkpoint else 0
        self._rewrite_history(start)
        self._freeze()
        if self.settings.gradient_checkpointing:
            # the reentrant kind would give the alignment loss a zero gradient
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            if start >= self.settings.steps:
                # already finished: the Trainer would add a step
                self._load_from_checkpoint(str(checkpoint))
            else:
                # around the whole loop, since gradient checkpointing repeats forwards in the backward
                with capture(self.model) if self.aligner is not None else nullcontext():
                    self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(required[name])
                parameter.grad = None
            if self.settings.gradient_checkpointing:
                self.model.gradient_checkpointing_disable()
            # the student is handed back as it came: without the autocast that the Trainer puts around its forward
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model.eval()
        self._check_words(least=1)
        return start

    # -- parameters -------------------------------------------------------------------

    def _rates(self) -> dict[str, float]:
        return {part: getattr(self.settings, f"learning_rate_{part}") for part in PARTS}

    def _freeze(self) -> None:
        rates = self._rates()
        if not any(rates.values()):
            raise UserError("All learning rates are 0, so nothing would be trained: set training.learning_rate_llm, _merger or _vision.")
        for part, named in self.student.parts().items():
            for _, parameter in named:
                parameter.requires_grad_(rates[part] > 0)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one learning rate a part, and no decay of norms and biases (their one dimension tells them)."""
        if self.optimizer is None:
            rates = self._rates()
            named = [(part, parameter) for part, members in self.student.parts().items() for _, parameter in members]
            if self.aligner is not None:
                rates["aligner"] = rates["llm"] or max(rates.values())
                named += [("aligner", parameter) for parameter in self.aligner.parameters()]
            groups = []
            for part, rate in rates.items():
                for matrices, decay in ((True, self.args.weight_decay), (False, 0.0)):
                    members = [p for owner, p in named if owner == part and p.requires_grad and (p.ndim > 1) == matrices]
                    if members:
                        groups.append({"params": members, "lr": rate, "weight_decay": decay})
            optimizer, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(groups, **arguments)
        return self.optimizer

    # -- the loss ---------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the Trainer's; also counts the samples of the step, by which the alignment is normalised."""
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(float(sum(len(batch[NOTES].ids) for batch in batches)), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, "sum")
        self._samples_in_step = max(float(count), 1.0)
        return batches, num_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The Trainer's, with the batch's notes kept from the model and its rows captured."""
        inputs = dict(inputs)
        self._notes = inputs.pop(NOTES)
        if self._notes.request is not None:
            inputs["motion_capture"] = self._notes.request
        return super().compute_loss(model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """L_AR + λ · alignment, this batch's share of the step's."""
        notes, settings = self._notes, self.settings
        weight = settings.alignment.weight_at(self.state.global_step / settings.steps)
        answer = answer_loss(outputs.logits, labels) / num_items_in_batch
        self._remember(notes)
        loss = answer
        self._add(ar_loss=answer)
        if notes.request is not None:
            alignment = self._alignment(notes) * (len(notes.ids) / self._samples_in_step)
            self._add(alignment_loss=alignment)
            loss = answer + weight * alignment
        self._add(loss=loss)
        if not torch.isfinite(loss):
            raise UserError(
                f"The loss became {float(loss.detach())} at step {self.state.global_step + 1}, in the batch of the samples {', '.join(notes.ids)}. "
                "Lower the learning rates or training.max_grad_norm, or leave out a damaged sample; checkpoints before this step are intact."
            )
        return loss

    def _alignment(self, notes: BatchNotes) -> Tensor:
        """The batch's alignment loss: a mean over its B samples."""
        chosen = self.settings.alignment
        with torch.autocast(self.args.device.type, enabled=False):  # regridding needs full precision
            result = align_batch(notes.request, notes.matches, notes.grids, notes.priors, self.aligner, chosen.loss, chosen.normalize,
                                 chosen.regrid, chosen.compare_on)
        attention = notes.request.mean()
        if result.words_matched and not attention.requires_grad:
            raise UserError(
                "The alignment loss has no gradient: everything that shapes the student's attention is frozen. "
                "Set training.learning_rate_llm above 0, or training.alignment.weight to 0."
            )
        self._add(words_matched=result.words_matched, words_total=result.words_total, video_mass=result.video_mass * result.words_matched)
        for match in notes.matches:
            if match is not None:
                self._words["matched"] += len(match.pairs)
                self._words["total"] += match.total
        self._check_words(least=ENOUGH_WORDS)
        return result.loss

    def _check_words(self, least: int) -> None:
        matched, total = self._words["matched"], self._words["total"]
        if total >= least and 1 - matched / total > self.settings.alignment.max_unmatched:
            raise UserError(
                f"{total - matched} of {total} words of the priors have no token in the student's prompts (training.alignment.max_unmatched is "
                f"{self.settings.alignment.max_unmatched:g}): the priors belong to other texts. For example: "
                + "; ".join(f"{r.id}: {r.reason}" for r in self.remarks[-2:])
                + ". Extract priors of these samples' questions."
            )

    # -- what is kept -----------------------------------------------------------------

    def _remember(self, notes: BatchNotes) -> None:
        self._problems.update({(p.id, p.reason): p for p in notes.problems})
        self._remarks.update({(r.id, r.reason): r for r in notes.remarks})

    def _add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            value = float(value.detach()) if isinstance(value, Tensor) else float(value)
            self._step[name] = self._step.get(name, 0.0) + value

    def _finish_step(self, learning_rate: float, seconds: float) -> None:
        sums, self._step = self._step, {}
        matched = int(sums.get("words_matched", 0))
        row = {
            "step": self.state.global_step,
            "loss": sums["loss"],
            "ar_loss": sums["ar_loss"],
            "alignment_loss": sums.get("alignment_loss"),
            "words_matched": matched,
            "words_total": int(sums.get("words_total", 0)),
            "video_mass": sums["video_mass"] / matched if matched else None,
            "learning_rate": learning_rate,
            "seconds": round(seconds, 4),
        }
        self.history.append(row)
        if self.is_world_process_zero():
            with open(self.history_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        done, total = self.state.global_step, self.state.max_steps
        if self.progress and (done % self.settings.log_every == 0 or done == total):
            aligned = "" if row["alignment_loss"] is None else f", alignment {row['alignment_loss']:.3f}"
            self.progress(done, total, f"answer loss {row['ar_loss']:.3f}{aligned}")

    def _rewrite_history(self, steps: int) -> None:
        """Keep the rows of the steps before the checkpoint; those after it come again."""
        lines = self.history_path.read_text(encoding="utf-8").splitlines() if steps else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut
        self.history = [row for row in rows if row["step"] <= steps]
        self.history_path.write_text("".join(json.dumps(row) + "\n" for row in self.history), encoding="utf-8")

    def _complete(self, checkpoint: Path) -> None:
        """Add what the Trainer does not save; the marker comes last."""
        if self.aligner is not None and any(True for _ in self.aligner.parameters()):
            save_file(self.aligner.state_dict(), checkpoint / ALIGNER_FILE)
        kept = {"identity": self.identity, "step": self.state.global_step, "words": self._words}
        for name in ("problems", "remarks"):
            kept[name] = [[p.id, p.reason] for p in getattr(self, name)]
        (checkpoint / MARKER).write_text(json.dumps(kept), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Weights of a checkpoint, read as models are. The Trainer's own reading compares names with
        the file's, which differ for Qwen2.5-VL (transformers 5.23), and then loads nothing."""
        if model is not None or not isinstance(self.model, PreTrainedModel) or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _restore(self, checkpoint: Path) -> int:
        kept = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        self._words = kept["words"]
        self._problems = {tuple(entry): Problem(*entry) for entry in kept["problems"]}
        self._remarks = {tuple(entry): Problem(*entry) for entry in kept["remarks"]}
        if (checkpoint / ALIGNER_FILE).is_file():
            self.aligner.load_state_dict(load_file(checkpoint / ALIGNER_FILE))
        return kept["step"]


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy (nats) of the answers' tokens; logits [B, S, V], labels [B, S] unshifted."""
    target = labels[:, 1:]
    learnt = target != IGNORED
    # only the learnt positions in float32: all of them are large with a real vocabulary
    return nn.functional.cross_entropy(logits[:, :-1][learnt].float(), target[learnt], reduction="sum")


class _Steps(TrainerCallback):
    """What happens between the Trainer's steps: the aligner's gradients, history, checkpoints."""

    def __init__(self, trainer: AlignedTrainer) -> None:
        self.trainer = trainer
        self.learning_rate = 0.0
        self.began = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        self.learning_rate = self.trainer.optimizer.param_groups[0]["lr"]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # the aligner is no part of the model: the Trainer neither averages nor clips its gradients
        parameters = [] if self.trainer.aligner is None else list(self.trainer.aligner.parameters())
        if args.world_size > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad = self.trainer.accelerator.reduce(parameter.grad, "mean")
        if parameters and args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.aligner is not None:
            self.trainer.aligner.zero_grad()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        self.trainer._finish_step(self.learning_rate, now - self.began)
        self.began = now

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer._complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
