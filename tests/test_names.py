"""Which name a parameter goes by, also after others were put in the places of some."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from weyl_megatron import AdamW2


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def step(optimizer: AdamW2) -> set[str]:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.ones_like(weight)
    optimizer.step()
    return set(optimizer.stats())


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("module._orig_mod.h.0.weight", "h.0.weight"),
        ("_orig_mod.module.h.0.weight", "h.0.weight"),
        ("module.module.h.0.weight", "h.0.weight"),
        ("h.0._checkpoint_wrapped_module._orig_mod.weight", "h.0.weight"),
        ("_fsdp_wrapped_module.h.0._fsdp_wrapped_module.weight", "h.0.weight"),
        ("h.module.weight", "h.module.weight"),
    ],
)
def test_names_lose_what_wrappers_add(given: str, name: str) -> None:
    (weight,) = weights((3, 3))
    assert step(AdamW2([(given, weight)])) == {name}


@pytest.mark.parametrize("rows", [2, 5, 9])
def test_a_parameter_that_takes_the_place_of_another_inherits_name_and_state(rows: int) -> None:
    """gaussian-splatting #897: points are added and pruned, and the moments moved along."""
    points, other = weights((5, 3), (4, 4))
    torch.manual_seed(1)
    theirs, ours = points.detach().clone(), points
    grad = torch.randn(2, 9, 3)

    def run(make: Any, start: torch.Tensor) -> tuple[torch.Tensor, Any]:
        weight = nn.Parameter(start.clone())
        optimizer = make([weight])
        weight.grad = grad[0, :5].clone()
        optimizer.step()
        state = optimizer.state.pop(weight)
        index = torch.arange(rows) % 5
        new = nn.Parameter(weight.detach()[index].clone())
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key][index].clone()
        optimizer.param_groups[0]["params"][0] = new
        optimizer.state[new] = state
        new.grad = grad[1, :rows].clone()
        optimizer.step()
        return new.detach(), optimizer

    expected, _ = run(lambda params: torch.optim.AdamW(params, foreach=False), theirs)
    found, optimizer = run(lambda params: AdamW2([("points", params[0])], tau=float("inf")), ours)
    assert torch.equal(found, expected)
    assert set(optimizer.stats()) == {"points"}
    assert len(other)  # beside it nothing was named


def test_a_parameter_that_is_no_more_is_not_kept_alive() -> None:
    (weight,) = weights((5, 3))
    optimizer = AdamW2([("w", weight)])
    step(optimizer)
    gone = weakref.ref(weight)
    optimizer.state.clear()
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(4, 3))
    del weight
    assert step(optimizer) == {"w"}
    gc.collect()
    assert gone() is None


def test_parameters_may_leave_and_join_a_group_s_list() -> None:
    one, two, three = weights((5, 3), (4, 3), (6, 3))
    optimizer = AdamW2([("one", one), ("two", two)])
    assert step(optimizer) == {"one", "two"}
    params = optimizer.param_groups[0]["params"]
    params.append(three)
    assert step(optimizer) == {"one", "two", "group0.param2"}
    params.remove(one)
    assert step(optimizer) == {"two", "group0.param2"}
    assert [float(optimizer.state[each]["step"]) for each in (two, three)] == [3.0, 2.0]


def test_what_may_be_many_parameters_in_one_is_refused() -> None:
    """As an engine that AdamW2 does not know flattens a group."""
    one, two = weights((6,), (5, 3))
    optimizer = AdamW2([("one", one), ("two", two)])
    step(optimizer)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(21))]
    with pytest.raises(
        ValueError, match=r"an engine replaced parameter 'one' or one beside it by .* \(21,\)"
    ):
        step(optimizer)


def test_a_copy_takes_the_names_on() -> None:
    import copy

    net = nn.Linear(3, 3)
    optimizer = AdamW2(net.named_parameters())
    _, twin = copy.deepcopy((net, optimizer))
    assert step(twin) == step(optimizer) == {"weight"}


def test_a_lazy_modules_parameters_are_taken_before_they_have_shapes() -> None:
    """As torch.optim.AdamW takes them; the first forward makes them in their places."""
    ended = []
    for cls in (AdamW2, torch.optim.AdamW):
        torch.manual_seed(0)
        net = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(3, bias=False))
        options: dict[str, Any] = {"tau": float("inf")} if cls is AdamW2 else {}
        optimizer = cls(net.named_parameters(), lr=0.1, foreach=False, **options)
        for _ in range(2):
            net(torch.ones(2, 5)).square().mean().backward()
            optimizer.step()
        ended.append([param.detach() for param in net.parameters()])
        if isinstance(optimizer, AdamW2):
            assert list(optimizer.stats()) == ["0.weight", "1.weight"]
    assert all(map(torch.equal, *ended))
