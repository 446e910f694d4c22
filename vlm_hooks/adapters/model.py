"""AdapterModel: a stock host with an adapter's tokens in its sequence.

    model = AdapterModel.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct", "my-adapter")
    inputs = model.student.encode(clips, [model.student.prompt("What moves?").text]).inputs
    output = model(**inputs, labels=labels);  ids = model.generate(**inputs, max_new_tokens=20)

The host stays the transformers model that it is. Frames' tokens enter by its own `mm_encoder_outputs`; motion tokens by
a forward hook on its embedding layer, which is there during the call only and replaces the placeholders' embeddings out
of place. Nothing of the host's code is changed, and without an adapter's tokens it computes what it always did.

Legend: B samples, S sequence positions, D the host's hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vdm_priors.errors import ModelError
from vlm_hooks.adapters.base import Adapter, AdapterConfig, AdapterOutput, HostShape
from vlm_hooks.adapters.checkpoint import HostRecord, load, save
from vlm_hooks.student import Student

COUNTS = "frame_counts"  # the batch's entry with the frames of each clip, as the tower sees them: [B]


class AdapterModel(nn.Module):
    """A host Student's model and an adapter. `student` (AdaptedStudent) makes its batches."""

    def __init__(self, host: Student, adapter: Adapter) -> None:
        """Puts the adapter on the host: placeholders into its tokenizer, rows into its embeddings where they lack."""
        from vlm_hooks.adapters.student import AdaptedStudent

        super().__init__()
        self.base = host
        self.host = host.model
        self.adapter = adapter.to(host.model.device, host.model.dtype)
        self.token_ids = add_tokens(host, adapter.special_tokens)
        self.made_for = HostRecord.of(host)  # as it came, before anything trains it
        host.prepare_groups(adapter.group)
        self.register_state_dict_post_hook(_untied)
        self.student = AdaptedStudent(self, host.processor, host.folder, host, adapter)

    @classmethod
    def create(
        cls, host: str | Path | Student, adapter: type[Adapter], config: AdapterConfig | None = None, **loading: Any
    ) -> AdapterModel:
        """A new, untrained adapter on a host: a folder, a hub name, or a loaded Student (loading: `load_student`'s)."""
        from vlm_hooks.families import load_student

        student = host if isinstance(host, Student) else load_student(host, **loading)
        return cls(student, adapter(config or adapter.Config(), host_shape(student)))

    @classmethod
    def from_pretrained(cls, host: str | Path | Student | None, adapter: str | Path, **loading: Any) -> AdapterModel:
        """The adapter of a folder on the host that it was made for; see vlm_hooks/adapters/checkpoint.py.

        host: a folder, a hub name, a loaded Student, or None for the one kept in the folder. Raises ModelError, with
        both names, for another host, and for weights of other shapes than the folder's own settings give.
        """
        return load(host, Path(adapter), **loading)

    def save_pretrained(self, folder: str | Path) -> Path:
        """The adapter alone, and the host beside it if it was trained too; see vlm_hooks/adapters/checkpoint.py."""
        return save(self, Path(folder))

    # ---- what wrappers and trainers ask of a model ----------------------------------------------

    @property
    def config(self) -> Any:
        return self.host.config

    @property
    def device(self) -> torch.device:
        return self.host.device

    @property
    def dtype(self) -> torch.dtype:
        return self.host.dtype

    def get_base_model(self) -> PreTrainedModel:
        """The stock model, as PEFT's wrappers name it: what `capture` reads the attention of."""
        return self.host

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        self.host.gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        self.host.gradient_checkpointing_disable()

    # ---- forward --------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """The host's output for a batch that `student.encode` made, or for what continues one (past_key_values and
        ids alone). All else in `inputs` goes to the host."""
        own, further = self._split(inputs)
        if not own:
            return self.host(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                labels=labels,
                **further,
            )
        tokens = self.visual_tokens(**own)
        with self._injected(tokens.motion):
            output = self.host(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                labels=labels,
                mm_encoder_outputs=self.base.encoder_outputs(tokens.frames),
                **further,
            )
        if position_ids is not None and position_ids.ndim == 3:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            self.base.keep_positions(position_ids, mask)
        return output

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """The host's `generate` (with its arguments) after a batch padded on the left, or of equal lengths."""
        own, further = self._split(inputs)
        further.pop("labels", None)
        if position_ids is not None and position_ids.ndim == 3:
            # generation wants the tokens' own numbers, by which masks are made, above the three axes
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            numbers = (mask.cumsum(-1) - 1).clamp(min=0)
            position_ids = torch.cat([numbers[None], position_ids])
        with torch.no_grad():
            tokens = self.visual_tokens(**own)
            with self._injected(tokens.motion):
                return self.host.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    mm_encoder_outputs=self.base.encoder_outputs(tokens.frames),
                    **further,
                )

    def visual_tokens(self, **own: Tensor) -> AdapterOutput:
        """What the adapter makes of a batch's frames and motion."""
        return self.adapter(self.frame_tokens(own), **{name: own[name] for name in self.adapter.INPUTS})

    def frame_tokens(self, own: dict[str, Tensor]) -> list:
        """What the host's vision tower makes of a batch's frames, before the adapter."""
        counts, places = own[COUNTS].tolist(), self.adapter.group_places
        with self.base.added_to_patches(own, counts, places) if places is not None else nullcontext():
            return self.base.frame_tokens(own, counts, self.adapter.group)

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the adapter and the tower take, and the rest. ModelError where a collator dropped a part."""
        names = (*self.base.PIXELS, *self.adapter.INPUTS, COUNTS)
        own = {name: inputs[name] for name in names if name in inputs}
        missing = [name for name in names if name not in own]
        if own and missing:
            raise ModelError(
                f"The batch has {', '.join(own)}, but no {', '.join(missing)}: pass all that `student.encode` returns."
            )
        return own, {name: value for name, value in inputs.items() if name not in own}

    @contextmanager
    def _injected(self, motion: Sequence[Tensor] | None) -> Iterator[None]:
        """While it is open, the embeddings of motion placeholders are the motion tokens [B] of [n, D]."""
        if motion is None:
            yield
            return
        place = torch.tensor([self.token_ids[token] for token in self.adapter.special_tokens], device=self.device)

        def replace(_module: nn.Module, args: tuple, embedded_bsd: Tensor) -> Tensor | None:
            at_bs = torch.isin(args[0], place)
            if not at_bs.any():
                return None  # a step of generation
            times = len(args[0]) // len(motion)  # beams
            tokens = torch.cat([clip for clip in motion for _ in range(times)])
            if len(tokens) != int(at_bs.sum()):
                raise ModelError(
                    f"The sequences have {int(at_bs.sum())} places for motion tokens, and the adapter gave "
                    f"{len(tokens)}: encode and forward need the same clips."
                )
            return embedded_bsd.masked_scatter(at_bs[..., None], tokens.to(embedded_bsd))

        handle = self.host.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def _untied(_module: nn.Module, state: dict[str, Tensor], _prefix: str, _metadata: Any) -> None:
    """Leaves the second name of tied weights out, which safetensors does not take."""
    seen: set[int] = set()
    for name in list(state):
        place = state[name].data_ptr()
        if place and place in seen:
            del state[name]
        seen.add(place)


def host_shape(student: Student) -> HostShape:
    """What of a host an adapter's weights depend on."""
    hidden = student.model.config.get_text_config().hidden_size
    return HostShape(hidden, type(student.model).__name__, student.vision_width, student.frames_per_token())


def add_tokens(student: Student, tokens: Sequence[str]) -> dict[str, int]:
    """Ids of placeholder tokens, which are put into the tokenizer where it has none, and rows for them into the
    embeddings: once, and as copies of the video placeholder's, so that they mean no more than that to the model."""
    tokenizer = student.tokenizer
    new = [token for token in tokens if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
    if new:
        tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    rows = student.embedding_rows()
    needed = max(ids.values(), default=-1) + 1
    if needed > rows:
        student.model.resize_token_embeddings(needed, mean_resizing=False)
        copied = tokenizer.convert_tokens_to_ids(student.frame_token)
        with torch.no_grad():
            for layer in (student.model.get_input_embeddings(), student.model.get_output_embeddings()):
                layer.weight[rows:] = layer.weight[copied]
    return ids
