"""What a state dict holds, and how a run goes on from it, from a copy, or from nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.test_optimizer import train
from weyl_megatron import AdamW2
from weyl_megatron.engines.torch.plain import PlainTorch
from weyl_megatron.saved import KEY


def test_checkpoints_travel_from_adamw_and_back() -> None:
    _, adamw = train(lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3), steps=3)
    net, adamw2 = train(lambda net: AdamW2(net.parameters(), lr=1e-3), steps=3)
    adamw2.load_state_dict(adamw.state_dict())
    net(torch.randn(4, 3, 5, 5)).backward()
    adamw2.step()
    assert {float(state["step"]) for state in adamw2.state.values()} == {4.0}
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in adamw2.state.values())
    theirs = torch.optim.AdamW(net.parameters())
    theirs.load_state_dict(adamw2.state_dict())
    theirs.step()


def test_of_a_checkpoint_of_adamw_what_changes_nothing_is_dropped_and_the_rest_refused() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones_like(weight)
    theirs = torch.optim.AdamW([weight], capturable=False, fused=True)
    theirs.step()
    optimizer = AdamW2([("w", weight)])
    optimizer.load_state_dict(theirs.state_dict())
    (group,) = optimizer.param_groups
    assert (group["fused"], group["foreach"], group["capturable"]) == (None, None, False)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2
    with pytest.raises(ValueError, match="AdamW2: differentiable got True, it takes False"):
        optimizer.load_state_dict(torch.optim.AdamW([weight], differentiable=True).state_dict())


def test_a_resumed_run_goes_on_as_the_uninterrupted_one() -> None:
    def run(stop: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(20, 12))
        optimizer = AdamW2([("w", weight)], lr=0.05)
        grads = torch.randn(12, 20, 12)
        for step, grad in enumerate(grads):
            if step == stop:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = AdamW2([("w", weight)], lr=0.05)
                optimizer.load_state_dict(state)
            weight.grad = grad
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(stop=6), run(stop=None))  # the power vectors are in the state dict


@pytest.mark.parametrize("is_new", [True, False], ids=["in another optimizer", "in the same one"])
def test_a_run_that_is_set_back_goes_on_as_it_went_on(is_new: bool) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(20, 12))
    optimizer = AdamW2([("w", weight)], lr=0.05)
    grads = torch.randn(9, 20, 12)

    def steps(numbers: range) -> tuple[torch.Tensor, dict[str, Any]]:
        for number in numbers:
            weight.grad = grads[number].clone()
            optimizer.step()
        return weight.detach().clone(), copy.deepcopy(optimizer.state_dict())

    start, saved = steps(range(4))
    went_on, after = steps(range(4, 9))
    weight.data.copy_(start)
    if is_new:
        optimizer = AdamW2([("w", weight)], lr=0.05)
    optimizer.load_state_dict(saved)
    found, found_after = steps(range(4, 9))
    assert torch.equal(found, went_on)
    (carried,), (found_carried,) = (state["param_groups"][0][KEY] for state in (after, found_after))
    vectors = [block for of_matrix in carried["blocks"] for block in of_matrix]
    found_vectors = [block for of_matrix in found_carried["blocks"] for block in of_matrix]
    assert all(map(torch.equal, vectors, found_vectors))
    assert not torch.equal(vectors[0], saved["param_groups"][0][KEY][0]["blocks"][0][0])


@pytest.mark.parametrize("is_copied", [False, True], ids=["", "by a copy"])
@pytest.mark.parametrize("is_saved_named", [False, True], ids=["saved without", "saved with"])
def test_names_are_no_part_of_a_resume(is_saved_named: bool, is_copied: bool) -> None:
    """torch matches state by position: a run saved with names is resumed without, and the
    reverse.
    """

    def built(weights: list[nn.Parameter], is_named: bool) -> AdamW2:
        given = [("matrix", weights[0]), ("experts", weights[1])] if is_named else weights
        return AdamW2(given, lr=0.05)

    def run(stop: int | None) -> tuple[list[torch.Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(20, 12)), nn.Parameter(torch.randn(2, 8, 12))]
        optimizer = built(weights, is_saved_named)
        for step in range(12):
            if step == stop:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = built(weights, not is_saved_named)
                optimizer.load_state_dict(state)
                if is_copied:
                    weights, optimizer = copy.deepcopy((weights, optimizer))
            for weight in weights:
                weight.grad = torch.randn(weight.shape)
            optimizer.step()
        return [weight.detach() for weight in weights], optimizer.state_dict()

    (found, found_state), (expected, expected_state) = run(stop=6), run(stop=None)
    assert all(map(torch.equal, found, expected))
    # The file goes on having the names that it had.
    saved, other = (
        state["param_groups"][0][KEY][0]["matrices"] for state in (found_state, expected_state)
    )
    assert saved == other


def test_what_was_forgotten_is_measured_afresh_and_then_carried() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(20, 12))
    optimizer = AdamW2([("w", weight)], lr=0.05)

    def vectors() -> torch.Tensor:
        weight.grad = torch.randn(20, 12)
        optimizer.step()
        block: torch.Tensor = optimizer.state_dict()["param_groups"][0][KEY][0]["blocks"][0][1]
        return block.clone()

    vectors()
    optimizer.forget()
    assert not torch.equal(vectors(), vectors())


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copied_optimizer_goes_on_by_itself(clone: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 6))
    optimizer = AdamW2([("w", weight)], lr=0.05, tau=0.02)
    weight.grad = torch.randn(8, 6)
    optimizer.step()
    other_weight, other = clone((weight, optimizer))
    for each, owner in ((weight, optimizer), (other_weight, other)):
        each.grad = torch.ones(8, 6)
        owner.step()
    assert set(other.stats()) == {"w"} and other.stats()["w"].tau == 0.02
    # The copy's vectors are new; cold iterations bring σ₁ within 1e-3, and that times τ is what the
    # weights differ by.
    assert torch.allclose(weight, other_weight, atol=1e-4)


class PlainCountingInGroups(PlainTorch):
    counts_in_groups = True


def test_the_step_may_be_counted_in_the_groups_as_fused_adam_does() -> None:
    """Megatron's checkpoints look for it there where Transformer Engine or apex is installed."""
    runs = []
    for in_group in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 5)
        optimizer = AdamW2(net.named_parameters(), lr=0.1)
        if in_group:
            optimizer.engine = PlainCountingInGroups()
            optimizer.param_groups[0]["step"] = 0
        for step in range(6):
            if step == 3:  # what a checkpoint carries, into the same kind of optimizer
                saved = optimizer.state_dict()
                assert (
                    all(
                        set(state) == {"exp_avg", "exp_avg_sq"} for state in saved["state"].values()
                    )
                    is in_group
                )
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            net(torch.full((2, 6), step + 1.0)).square().sum().backward()
            optimizer.step()
        runs.append([p.detach().clone() for p in net.parameters()])
    assert optimizer.param_groups[0]["step"] == 6
    assert all(map(torch.equal, *runs))


class Gaps(nn.Module):
    """A weight between whose columns lies what is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 10, generator=torch.manual_seed(0))[:, ::2])

    def train_on(self, optimizer: AdamW2, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            (x @ self.weight).square().mean().backward()
            optimizer.step()


def test_a_weight_with_gaps_goes_on_exactly_from_torch_s_distributed_checkpoint() -> None:
    """It is settled when it is saved: what tells that the weights are the same is read off it."""
    nets = Gaps(), Gaps()
    optimizers = [AdamW2(net.named_parameters(), lr=1e-4) for net in nets]
    nets[0].train_on(optimizers[0], range(6))
    assert optimizers[0].stats()["weight"].certified
    state = copy.deepcopy(get_optimizer_state_dict(nets[0], optimizers[0]))
    assert set(state["state"]["weight"]) > {"adamw2_vectors", "adamw2_bounds"}
    nets[1].load_state_dict(nets[0].state_dict())
    set_optimizer_state_dict(nets[1], optimizers[1], state)
    for net, optimizer in zip(nets, optimizers, strict=True):
        net.train_on(optimizer, range(6, 8))
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert optimizers[0].stats() == optimizers[1].stats()
    assert not any("adamw2" in key for key in optimizers[0].state_dict()["state"][0])
