"""transformers' Trainer with an alignment loss, parameter groups and a history of every step.

Both losses are normalised over the whole step (all accumulated batches, all processes): the answer loss by its tokens,
the alignment by its samples. So 1 × 8 and 8 × 1 accumulation give the same gradients, whatever a model family says.

Legend: B samples of a batch, S sequence positions, V vocabulary.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback

from enhancer.aligner_steps import AlignerSteps
from enhancer.between_steps import BetweenSteps
from enhancer.checkpoints import MARKER, readable_state
from enhancer.collate import NOTES, BatchNotes
from enhancer.losses import answer_loss
from enhancer.muon import MuonAdamW, is_hidden_matrix
from enhancer.sample_notes import SampleNotes
from enhancer.step_log import StepLog
from enhancer.tracking import close_tracker, tracker_callbacks
from enhancer.train_settings import TrainSettings
from enhancer.trainer_arguments import training_arguments
from vdm_priors.errors import UserError
from vlm_hooks.alignment import align_batch
from vlm_hooks.capture import capture, check_token_types
from vlm_hooks.lora import TRAINED_FILE, is_adapter, load_trained, save_trained

Progress = Callable[[int, int, str], None]


class AlignedTrainer(Trainer):
    """Trains `student.model` and the aligner; `step_log.rows` and `samples` (SampleNotes) are the outcome."""

    def __init__(
        self, *, student: Any, settings: TrainSettings, aligner: nn.Module | None, folder: Path, seed: int,
        dataset: Any, collator: Any, history_path: Path, identity: dict, progress: Progress | None,
    ) -> None:
        self.student, self.settings, self.aligner = student, settings, aligner
        self.identity, self.progress = identity, progress
        self.samples = SampleNotes(settings.alignment.max_unmatched)
        self._notes: BatchNotes | None = None
        self._samples_in_step = 1.0
        self.resumed_from: Path | None = None
        super().__init__(
            model=student.model,
            args=training_arguments(settings, folder, seed, student.model.device),
            train_dataset=dataset,
            data_collator=collator,
            # a loss function of one's own is what tells the Trainer not to rescale the loss
            compute_loss_func=self._loss,
            callbacks=[BetweenSteps(self)],
        )
        self.remove_callback(PrinterCallback)
        for callback in tracker_callbacks(settings.report_to, history_path.parent, self.is_world_process_zero()):
            self.add_callback(callback)
        self.step_log = StepLog(history_path, self.accelerator)
        if settings.fsdp and not self.is_fsdp_enabled:
            raise UserError(
                "training.fsdp shards weights over GPUs, and these processes have none: accelerate gives processes on "
                "CPUs whole copies (DDP). Set training.fsdp to null, or start where there are GPUs."
            )

    def run(self, checkpoint: Path | None) -> tuple[int, dict[str, Tensor] | None]:
        """Train to the end, from the checkpoint if there is one.

        The step it began at; and, where the weights are sharded, all of them, which process 0 alone is sure to get.
        """
        required = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        self._freeze()
        self.resumed_from = checkpoint
        start = self._restore(checkpoint) if checkpoint else 0
        self.step_log.rewind(start)
        whole = None
        if self.settings.gradient_checkpointing:
            # the reentrant kind would give the alignment loss a zero gradient
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            if start >= self.settings.steps:
                # already finished: the Trainer would add a step
                unset_hf_deepspeed_config()
                self._load_whole(checkpoint)
            else:
                # around the whole loop, since gradient checkpointing repeats forwards in the backward
                with capture(self.model) if self.aligner is not None else nullcontext():
                    self._train_from(checkpoint)
                if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                    # None from ZeRO-3 for the processes beside the first
                    whole = self.accelerator.get_state_dict(self.model_wrapped) or {}
        finally:
            close_tracker(self.settings.report_to)
            unset_hf_deepspeed_config()  # else ZeRO-3 would shard every model that is loaded from now on
            for name, parameter in self.model.named_parameters():
                if name in required:  # an adapter's are gone with it
                    parameter.requires_grad_(required[name])
                parameter.grad = None
            if self.settings.gradient_checkpointing:
                self.model.gradient_checkpointing_disable()
            # the student is handed back as it came: without the autocast that the Trainer puts around its forward
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model.eval()
        self.samples.join()
        self.samples.check_words()
        return start, whole

    def _train_from(self, checkpoint: Path | None) -> None:
        with readable_state(checkpoint):
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    # -- parameters -------------------------------------------------------------------

    def _rates(self) -> dict[str, float]:
        return {part: self.settings.rate(part) for part in self.student.parts()}

    def _freeze(self) -> None:
        rates, lora = self._rates(), self.settings.lora
        if not any(rates.values()):
            raise UserError("All learning rates are 0, so nothing would be trained: set training.learning_rate_llm, "
                            "_merger or _vision.")
        for part, named in self.student.parts().items():
            adapters_alone = lora is not None and part in lora.parts
            for name, parameter in named:
                parameter.requires_grad_(rates[part] > 0 and (is_adapter(name) or not adapters_alone))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One learning rate a part, and no decay of norms and biases (their one dimension tells them)."""
        if self.optimizer is None:
            muon = self.settings.optimizer == "muon"
            groups: dict[tuple, dict] = {}
            for part, members in self.student.parts().items():
                for name, parameter in members:
                    if parameter.requires_grad:
                        key = part, parameter.ndim > 1, muon and is_hidden_matrix(name, parameter)
                        decay = self.args.weight_decay if parameter.ndim > 1 else 0.0
                        group = groups.setdefault(key, {"params": [], "lr": self._rates()[part], "weight_decay": decay})
                        group["params"].append(parameter)
            if muon:
                self.optimizer = MuonAdamW([{**group, "muon": key[-1]} for key, group in groups.items()])
            else:
                optimizer, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = optimizer(list(groups.values()), **arguments)
        return self.optimizer

    def create_aligner_steps(self) -> AlignerSteps:
        """The aligner's optimizer, at the language model's learning rate."""
        rates = self._rates()
        optimizer, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        rate = rates["llm"] or max(rates.values())
        return AlignerSteps(self.aligner, rate, self.args, optimizer, arguments, self.accelerator)

    # -- the loss ---------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the Trainer's; also counts the step's samples, which normalise the alignment, and the wait for them."""
        began = time.monotonic()
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_log.add(data_seconds=time.monotonic() - began)
        count = torch.tensor(float(sum(len(batch[NOTES].ids) for batch in batches)), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, "sum")
        self._samples_in_step = max(float(count), 1.0)
        return batches, num_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The Trainer's, with the batch's notes kept from the model and its rows captured."""
        inputs = dict(inputs)
        self._notes = inputs.pop(NOTES)
        check_token_types(self.student.model, inputs)
        if self._notes.request is not None:
            inputs["motion_capture"] = self._notes.request
        return super().compute_loss(model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """L_AR + λ · alignment, this batch's share of the step's."""
        notes, settings = self._notes, self.settings
        weight = settings.alignment.weight_at(self.state.global_step / settings.steps)
        answer = answer_loss(outputs.logits, labels) / num_items_in_batch
        self.samples.add(notes)
        loss, losses = answer, {"ar": answer}
        self.step_log.add(ar_loss=answer)
        if notes.request is not None:
            alignment = self._alignment(notes) * (len(notes.ids) / self._samples_in_step)
            self.step_log.add(alignment_loss=alignment, aligned=1)
            loss, losses = answer + weight * alignment, {"ar": answer, "alignment": alignment}
        self.step_log.add(loss=loss)
        if not torch.isfinite(loss):
            raise UserError(
                f"The loss became {float(loss.detach())} at step {self.state.global_step + 1}, in the batch of the "
                f"samples {', '.join(notes.ids)}. Lower the learning rates or training.max_grad_norm, or leave out a "
                "damaged sample; checkpoints before this step are intact."
            )
        self._log_gradients(losses)
        return loss

    def _alignment(self, notes: BatchNotes) -> Tensor:
        """The batch's alignment loss: a mean over its B samples."""
        chosen = self.settings.alignment
        with torch.autocast(self.args.device.type, enabled=False):  # regridding needs full precision
            result = align_batch(notes.request, notes.matches, notes.grids, notes.priors, self.aligner, chosen.loss,
                                 chosen.normalize, chosen.regrid, chosen.compare_on, chosen.sharpen, notes.samples)
        attention = notes.request.mean()
        if result.words_matched and not attention.requires_grad:
            raise UserError("The alignment loss has no gradient: everything that shapes the student's attention is "
                            "frozen. Set training.learning_rate_llm above 0, or training.alignment.weight to 0.")
        self.step_log.add(words_matched=result.words_matched, words_total=result.words_total,
                          video_mass=result.video_mass * result.words_matched)
        return result.loss

    def _log_gradients(self, losses: dict[str, Tensor]) -> None:
        """Every log_every steps, each loss's gradient on the parameters that both reach (alignment.gradient_norms)."""
        where = self.settings.alignment.gradient_norms
        wanted = where != "none" and (self.state.global_step + 1) % self.settings.log_every == 0
        if not wanted or len(losses) < 2 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        request = self._notes.request
        looked_at = self.student.model if where == "all" else request.modules[request.captured_layers[-1]]
        parameters = [p for p in looked_at.parameters() if p.requires_grad]
        if parameters and losses["alignment"].requires_grad:
            self.step_log.add_gradients(parameters, **losses)

    # -- what is kept -----------------------------------------------------------------

    def finish_step(self, learning_rate: float, seconds: float) -> None:
        """The step's row of the history, and the progress that process 0 shows."""
        row = self.step_log.finish(self.state.global_step, learning_rate, seconds)
        done, total = self.state.global_step, self.state.max_steps
        if self.settings.report_to != "none" and done % self.settings.log_every == 0:
            self.log({name: value for name, value in row.items() if value is not None and name != "step"})
        if self.progress and self.is_world_process_zero() and (done % self.settings.log_every == 0 or done == total):
            aligned = "" if row["alignment_loss"] is None else f", alignment {row['alignment_loss']:.3f}"
            self.progress(done, total, f"answer loss {row['ar_loss']:.3f}{aligned}")

    def complete(self, checkpoint: Path) -> None:
        """Add what the Trainer does not save; the marker comes last, when every process has written its part."""
        self.samples.join()
        if self.is_world_process_zero():
            self.aligner_steps.save(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            kept = {"identity": self.identity, "step": self.state.global_step, **self.samples.to_dict()}
            partial = checkpoint / f".{MARKER}"
            partial.write_text(json.dumps(kept), encoding="utf-8")
            os.replace(partial, checkpoint / MARKER)

    def _save(self, output_dir=None, state_dict=None):
        """A checkpoint's weights; with adapters, low-rank or a codec's, only what is trained."""
        if self.settings.lora is None and isinstance(self.student.model, PreTrainedModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            save_trained(self.student.model, Path(output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Weights of a checkpoint, read as models are. The Trainer's own reading compares names with
        the file's, which differ for Qwen2.5-VL (transformers 5.23), and then loads nothing."""
        if model is not None or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_whole(Path(resume_from_checkpoint))

    def _load_whole(self, checkpoint: Path) -> None:
        if (checkpoint / TRAINED_FILE).is_file():
            load_trained(self.model, checkpoint)
            return
        assert isinstance(self.model, PreTrainedModel)
        saved = type(self.model).from_pretrained(checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _restore(self, checkpoint: Path) -> int:
        kept = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        self.samples.restore(kept)
        return kept["step"]
