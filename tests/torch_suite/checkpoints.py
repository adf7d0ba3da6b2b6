"""Checks of what a state dict holds, and of what goes on from one."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tests.torch_suite.cells import (
    Build,
    Kwargs,
    Values,
    adamw_info,
    all_settings,
    assert_same,
    check,
    fused_settings,
    held,
)
from tests.torch_suite.nets import Affine, Images


def _given(net: nn.Module, named: bool) -> list[Any]:
    return list(net.named_parameters()) if named else list(net.parameters())


def _step(net: nn.Module, optimizer: Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net().backward()
        optimizer.step()


def _written(optimizer: Optimizer) -> dict[str, Any]:
    """Return a copy of the state dict, whose groups have their keys in order, and no names.

    Of two optimizers of equal state one may have been given names; a group's keys have no order.
    """
    state = copy.deepcopy(optimizer.state_dict())
    for number, group in enumerate(state["param_groups"]):
        group.pop("param_names", None)
        state["param_groups"][number] = dict(sorted(group.items()))
    return state


@check(fused_settings, saved_named=(False, True), loaded_named=(False, True))
def a_loaded_twin_goes_on_alike(
    build: Build,
    kwargs: Kwargs,
    saved_named: bool,
    loaded_named: bool,
) -> Values:
    net = Affine(2, 3)
    optimizer = build(_given(net, saved_named), **kwargs)
    _step(net, optimizer, 10)
    twin = copy.deepcopy(net)
    loaded = build(_given(twin, loaded_named), **kwargs)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(10):
        _step(net, optimizer)
        _step(twin, loaded)
        assert_same(held(loaded)[:2], held(optimizer)[:2])
    assert_same(_written(loaded), _written(optimizer))
    # A group that appears twice is written twice alike (pytorch #36831).
    loaded.param_groups.extend(loaded.param_groups)
    assert_same(_written(loaded)["param_groups"][-1], _written(optimizer)["param_groups"][-1])
    return held(optimizer)


@check(fused_settings)
def states_of_older_releases_load(build: Build, kwargs: Kwargs) -> Values:
    net = Images()
    optimizer = build(net.parameters(), **kwargs)
    _step(net, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for flag in adamw_info().not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(state)
    _step(net, optimizer)
    return held(optimizer)


@check(fused_settings, saved_named=(False, True), loaded_named=(False, True))
def names_survive_a_load(
    build: Build,
    kwargs: Kwargs,
    saved_named: bool,
    loaded_named: bool,
) -> Values:
    net = Images()
    optimizer = build(_given(net, saved_named), **kwargs)
    _step(net, optimizer, 3)
    loaded = build(_given(net, loaded_named), **kwargs)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _step(net, loaded)
    if saved_named or loaded_named:
        names = loaded.state_dict()["param_groups"][0]["param_names"]
        assert names == ["0.weight", "0.bias", "1.weight", "1.bias"], f"param_names are {names}"
    return held(loaded)


@check(fused_settings, named=(False, True))
def files_hold_the_state(build: Build, kwargs: Kwargs, named: bool) -> Values:
    net = Affine(2, 3)
    optimizer = build(_given(net, named), **kwargs)
    _step(net, optimizer, 3)
    state, file = optimizer.state_dict(), io.BytesIO()
    torch.save(state, file)
    for weights_only in (False, True):
        file.seek(0)
        assert_same(torch.load(file, weights_only=weights_only), state)
    return held(optimizer)


@check(fused_settings)
def a_count_may_be_a_number(build: Build, kwargs: Kwargs) -> Values:
    params = [nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
    for param in params:
        param.grad = torch.rand_like(param)
    optimizer = build(params, **kwargs)
    for _ in range(3):
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for of_param in state["state"].values():
        of_param["step"] = of_param["step"].item()
    optimizer.load_state_dict(state)
    optimizer.step()
    return held(optimizer)


def _fresh(build: Build, kwargs: Kwargs) -> Optimizer:
    return build([torch.rand(2, 3, requires_grad=True)], **kwargs)


def _mark(optimizer: Optimizer) -> None:
    optimizer.state["mark"] = 1


def _move_mark(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Note in a state dict whether :func:`_mark` was called before."""
    state["was marked"] = state["state"].pop("mark", None) is not None
    return state


@check(all_settings)
def a_hook_before_state_dict_sees_to_it(build: Build, kwargs: Kwargs) -> None:
    optimizer = _fresh(build, kwargs)
    optimizer.register_state_dict_pre_hook(_mark)
    assert optimizer.state_dict()["state"]["mark"] == 1


@check(all_settings)
def a_hook_after_state_dict_writes_into_it(build: Build, kwargs: Kwargs) -> None:
    optimizer = _fresh(build, kwargs)
    optimizer.register_state_dict_post_hook(_move_mark)
    assert optimizer.state_dict()["was marked"] is False


@check(all_settings)
def hooks_before_and_after_state_dict_meet(build: Build, kwargs: Kwargs) -> None:
    optimizer = _fresh(build, kwargs)
    optimizer.register_state_dict_pre_hook(_mark)
    optimizer.register_state_dict_post_hook(_move_mark)
    state = optimizer.state_dict()
    assert "mark" not in state["state"] and state["was marked"] is True


def _write_rate(optimizer: Optimizer, state: dict[str, Any]) -> None:
    state["param_groups"][0]["lr"] = 0.002


def _return_rate(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return another state dict than was given, which is then the one to load."""
    state = copy.deepcopy(state)
    state["param_groups"][0]["lr"] = 0.003
    return state


def _note_rate(optimizer: Optimizer) -> None:
    optimizer.state["rate after load"] = optimizer.param_groups[0]["lr"]


@check(all_settings)
def hooks_before_a_load_have_an_order(build: Build, kwargs: Kwargs) -> None:
    optimizer = _fresh(build, kwargs)
    state = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(_write_rate)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(_return_rate, prepend=True)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.002, "the hook in front had the last word"


@check(all_settings)
def a_hook_after_a_load_is_called(build: Build, kwargs: Kwargs) -> None:
    optimizer = _fresh(build, kwargs)
    optimizer.register_load_state_dict_post_hook(_note_rate)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["rate after load"] == kwargs.get("lr", 1e-3)


@check(all_settings)
def a_hook_after_a_load_sees_what_one_before_returned(build: Build, kwargs: Kwargs) -> None:
    optimizer = _fresh(build, kwargs)
    optimizer.register_load_state_dict_pre_hook(_return_rate)
    optimizer.register_load_state_dict_post_hook(_note_rate)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["rate after load"] == 0.003
