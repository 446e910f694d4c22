"""An adapter's folder: adapter.json, adapter.safetensors, and the processor with its placeholder tokens.

The host is not in it, unless it was trained with the adapter: then it lies in `host`, as a stock checkpoint. What host
an adapter was made for is told by its class, its sizes and a fingerprint of its weights; another one is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vdm_priors.errors import ModelError, UserError
from vlm_hooks.adapters import find_adapter
from vlm_hooks.student import Student

if TYPE_CHECKING:
    from vlm_hooks.adapters.model import AdapterModel

SETTINGS, WEIGHTS, HOST = "adapter.json", "adapter.safetensors", "host"
VERSION = 1
SAMPLED = 64  # values of each weight that enter the fingerprint


@dataclass
class HostRecord:
    """The host that an adapter is made for: its name, a fingerprint of its weights as it came, and a digest of them to
    the last bit. kept: it is one that was trained with an adapter before."""

    name: str
    fingerprint: str
    exact: str
    kept: bool = False

    @classmethod
    def of(cls, student: Student) -> HostRecord:
        return cls(student.folder, fingerprint(student.model), fingerprint(student.model, exact=True))

    def is_trained(self, model: nn.Module) -> bool:
        """Whether the model is no longer the stock one."""
        return self.kept or fingerprint(model, exact=True) != self.exact


def save(model: AdapterModel, folder: Path) -> Path:
    """Writes the folder; adapter.json comes last, so that a folder with it is whole. Raises ModelError."""
    made_for = model.made_for
    trained = made_for.is_trained(model.host)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().contiguous().cpu() for name, tensor in model.adapter.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        model.base.processor.save_pretrained(folder)
        if trained:
            model.host.save_pretrained(folder / HOST)
            model.base.processor.save_pretrained(folder / HOST)
        shape = model.adapter.host
        described = {
            "version": VERSION,
            "adapter": model.adapter.NAME,
            "config": model.adapter.config.to_dict(),
            "host": {
                "name": made_for.name,
                "class": shape.name,
                "hidden": shape.hidden,
                "vision": shape.vision,
                "fingerprint": made_for.fingerprint,
                "trained": fingerprint(model.host) if trained else None,
            },
            "tokens": model.token_ids,
        }
        partial = folder / f".{SETTINGS}"
        partial.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / SETTINGS)
    except OSError as error:
        raise ModelError(
            f"The adapter cannot be written to {folder} ({error.strerror}): free some space, or choose another folder."
        ) from error
    return folder


def load(host: str | Path | Student | None, folder: Path, **loading: Any) -> AdapterModel:
    """See AdapterModel.from_pretrained."""
    from vlm_hooks.adapters.model import AdapterModel, host_shape
    from vlm_hooks.families import load_student

    described = _described(folder)
    made_for = described["host"]
    kept = folder / HOST
    if host is None and made_for["trained"] is None:
        raise ModelError(
            f"The adapter {folder} has no host with it: give the one that it was made for, {made_for['name']!r}."
        )
    host = kept if host is None else host
    student = host if isinstance(host, Student) else load_student(host, **loading)
    shape = host_shape(student)
    found = {"class": shape.name, "hidden": shape.hidden, "vision": shape.vision}
    wrong = [f"{name} {made_for[name]}, here {value}" for name, value in found.items() if made_for[name] != value]
    if wrong:
        raise _other_host(folder, made_for["name"], student.folder, "; ".join(wrong))
    kind = find_adapter(described["adapter"])
    try:
        config = kind.Config.from_dict(described["config"])
    except UserError as error:
        raise ModelError(f"The adapter {folder} has other settings than this version's {kind.NAME}: {error}") from error
    model = AdapterModel(student, kind(config, shape))
    given = model.made_for.fingerprint
    is_kept = not isinstance(host, Student) and Path(host) == kept
    if given == made_for["fingerprint"] and made_for["trained"] is not None and not is_kept:
        # the stock host was given: the trained one is what the adapter knows
        return load(kept, folder, **loading)
    if given not in (made_for["fingerprint"], made_for["trained"]):
        raise _other_host(folder, made_for["name"], student.folder, "the weights are others")
    model.made_for = HostRecord(
        made_for["name"], made_for["fingerprint"], model.made_for.exact, made_for["trained"] is not None
    )
    if model.token_ids != described["tokens"]:
        raise ModelError(
            f"The adapter {folder} has its placeholders at {described['tokens']}, the tokenizer of "
            f"{student.folder!r} at {model.token_ids}: it is not the tokenizer of {made_for['name']!r}."
        )
    _load_weights(model.adapter, folder)
    return model


def needed_host(folder: Path) -> str | None:
    """Name of the host that an adapter's folder takes; None where its own lies in it. Raises ModelError."""
    made_for = _described(folder)["host"]
    return None if made_for["trained"] is not None else made_for["name"]


def fingerprint(model: nn.Module, exact: bool = False) -> str:
    """32 hex digits of a model's names, shapes and a sample of its weights, alike in float32 and half types; exact: of
    the sample as it is, so that the smallest step of a training is seen."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        flat = tensor.detach().flatten()
        chosen = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED]
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update((chosen if exact else chosen.bfloat16()).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _described(folder: Path) -> dict[str, Any]:
    try:
        described = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        described["adapter"], described["config"], described["host"]["fingerprint"], described["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} is no adapter's folder: its {SETTINGS} is missing or damaged ({error}). Give a folder "
            "that AdapterModel.save_pretrained wrote."
        ) from error
    if described.get("version") != VERSION:
        raise ModelError(f"The adapter {folder} is of format {described.get('version')}, this version reads {VERSION}.")
    return described


def _load_weights(adapter: nn.Module, folder: Path) -> None:
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"The weights {folder / WEIGHTS} cannot be read ({error}): copy the folder again.") from error
    own = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{name}: {there.get(name, 'missing')} in the file, {own.get(name, 'none')} by its settings"
        for name in sorted({*own, *there})
        if own.get(name) != there.get(name)
    ]
    if wrong:
        raise ModelError(
            f"The adapter {folder} has weights of another recipe than its settings: {'; '.join(wrong[:5])}"
            f"{f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''}."
        )
    adapter.load_state_dict(weights)


def _other_host(folder: Path, made_for: str, given: str, why: str) -> ModelError:
    return ModelError(
        f"The adapter {folder} was made for the host {made_for!r} and cannot be put on {given!r}: {why}. "
        f"Give {made_for!r}, or train the adapter anew on {given!r}."
    )
