"""Which matrices are stepped together, and what is kept of them from step to step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from weyl_megatron import AdamW2
from weyl_megatron.matrix_groups import is_adamw
from weyl_megatron.saved import KEY
from weyl_megatron.settings import Settings, check_settings


def trained(steps: int = 2, **options: Any) -> tuple[AdamW2, list[nn.Parameter]]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(4, 3))]
    optimizer = AdamW2(zip(("a", "b"), params, strict=True), lr=0.1, **options)
    step(optimizer, params, steps)
    return optimizer, params


def step(optimizer: AdamW2, params: list[nn.Parameter], steps: int = 1) -> None:
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param) if param.requires_grad else None
        optimizer.step()


def test_a_group_takes_the_place_of_those_that_had_some_of_its_tensors() -> None:
    """Others are frozen, and thawed again: at no time is a matrix in two groups."""
    optimizer, params = trained()
    params[1].requires_grad_(False)
    step(optimizer, params)
    assert optimizer.stats().keys() == {"a"}
    params[1].requires_grad_(True)
    step(optimizer, params)
    assert [group.names for group in optimizer._matrix_groups] == [["a", "b"]]


def test_groups_that_share_nothing_stay_beside_each_other() -> None:
    """As under engines that step one parameter group at a time."""
    optimizer, params = trained()
    groups = optimizer.param_groups[0]
    for param in params:
        optimizer.param_groups = [{**groups, "params": [param]}]
        step(optimizer, [param])
    assert [group.names for group in optimizer._matrix_groups] == [["a"], ["b"]]


def test_a_copy_goes_on_with_the_vectors_of_the_original() -> None:
    optimizer, params = trained()
    copied = copy.deepcopy(optimizer)
    for each in (optimizer, copied):
        torch.manual_seed(1)
        step(each, each.param_groups[0]["params"])
    copies = copied.param_groups[0]["params"]
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    assert optimizer.stats() == copied.stats()


def test_what_is_forgotten_is_not_saved() -> None:
    optimizer, _ = trained()
    assert KEY in optimizer.state_dict()["param_groups"][0]
    optimizer.forget()
    assert KEY not in optimizer.state_dict()["param_groups"][0]


def settings(**given: Any) -> Settings:
    rest = {"power_iters": 2, "floor_std": 0.0, "clip_vectors": False, "io": None, "others": {}}
    return check_settings(**{"tau": float("inf"), "overrides": [], **rest, **given})


def test_only_infinite_tau_everywhere_is_adamw() -> None:
    infinite, finite = {"tau": float("inf")}, {"tau": 0.01}
    assert is_adamw(settings(), [infinite, infinite])
    assert not is_adamw(settings(), [infinite, finite])
    assert not is_adamw(settings(overrides=[{"match": "*", "tau": 0.1}]), [infinite])
