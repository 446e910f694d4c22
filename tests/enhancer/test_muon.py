"""MuonAdamW: the two optimizers it joins, step by step; its state survives; what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from enhancer.muon import MuonAdamW, is_hidden_matrix
from enhancer.train_settings import TrainSettings
from vdm_priors.errors import UserError

RATE, DECAY = 3e-2, 0.1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(7, 12), "inner": nn.Linear(12, 20), "outer": nn.Linear(20, 7)})


def groups(model: nn.Module) -> list[dict]:
    of: dict[bool, list] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        of[is_hidden_matrix(name, parameter)].append(parameter)
    return [{"params": chosen, "muon": muon} for muon, chosen in of.items()]


def fill_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_counts_as_a_matrix_between_layers():
    names = {name for name, parameter in network().named_parameters() if is_hidden_matrix(name, parameter)}
    assert names == {"inner.weight", "outer.weight"}
    assert not is_hidden_matrix("lm_head.weight", nn.Parameter(torch.zeros(2, 2)))
    assert not is_hidden_matrix("proj.weight", nn.Parameter(torch.zeros(2, 2, 1, 8, 8)))


def test_it_steps_as_muon_and_adamw_apart():
    joined, apart = network(), network()
    optimizer = MuonAdamW(groups(joined), lr=RATE, weight_decay=DECAY)
    matrices, rest = (group["params"] for group in groups(apart))
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=RATE, weight_decay=DECAY)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step)) for one in (optimizer, muon, adamw)]
    for step in range(4):
        fill_gradients(joined, step), fill_gradients(apart, step)
        for one in (optimizer, muon, adamw, *schedules):
            one.step()
    assert equal(joined, apart) and not equal(joined, network())


def test_a_checkpoint_goes_on_as_if_uninterrupted():
    straight, broken = network(), network()
    first = MuonAdamW(groups(straight), lr=RATE, weight_decay=DECAY)
    for step in range(3):
        fill_gradients(straight, step)
        first.step()
        if step == 1:
            broken.load_state_dict(straight.state_dict())
            kept = copy.deepcopy(first.state_dict())
    second = MuonAdamW(groups(broken), lr=1.0)  # whose rate and decay the state replaces
    second.load_state_dict(kept)
    fill_gradients(broken, 2)
    second.step()
    assert equal(straight, broken)


def test_one_kind_alone_is_enough():
    model = network()
    only = MuonAdamW(groups(model)[:1], lr=RATE)
    fill_gradients(model, 0)
    only.step()
    assert not torch.equal(model["inner"].weight, network()["inner"].weight)
    assert torch.equal(model["embed"].weight, network()["embed"].weight)


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="muon, which needs whole matrices"):
        TrainSettings(optimizer="muon", fsdp="launch/fsdp2.json")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match="install torch 2.9"):
        MuonAdamW(groups(network()))
