"""Checks of the optimizer as an object: what it refuses, prints, copies, and whom it calls."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from torch.optim import optimizer as torch_optimizer

from tests.torch_suite.cells import (
    Build,
    Kwargs,
    Values,
    all_settings,
    check,
    errors,
    fused_settings,
    held,
    raised,
    settings,
)


@check(errors)
def what_cannot_be_is_refused_in_torchs_words(build: Build, wanted: Any) -> None:
    given = wanted.optimizer_error_input
    got = raised(lambda: build(given.params, **given.kwargs))
    words = [str(each) for each in got if isinstance(each, wanted.error_type)]
    assert any(re.search(wanted.error_regex, each) for each in words), (
        f"wanted {wanted.error_type.__name__} '{wanted.error_regex}', got {got}"
    )


@check(all_settings)
def without_gradients_a_step_is_none(build: Build, kwargs: Kwargs) -> None:
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [param.clone() for param in params]
    build(params, **kwargs).step(lambda: torch.ones(1))
    assert all(map(torch.equal, params, before))


@check(all_settings)
def it_can_be_printed(build: Build, kwargs: Kwargs) -> None:
    assert "lr: " in repr(build([nn.Parameter(torch.randn(2, 3)) for _ in range(2)], **kwargs))


@check(fused_settings)
def copies_have_all_public_attributes(build: Build, kwargs: Kwargs) -> Values:
    params = [nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
    for param in params:
        param.grad = torch.rand_like(param)
    optimizer = build(params, **kwargs)
    for _ in range(3):
        optimizer.step()
    copied = vars(copy.deepcopy(optimizer)).keys()
    only_one = {name for name in vars(optimizer).keys() ^ copied if not name.startswith("_")}
    assert not only_one, f"only one has {only_one}"
    return held(optimizer)


@check(settings)
def every_parameter_gets_state(build: Build, kwargs: Kwargs) -> Values:
    net = nn.Linear(5, 5)
    optimizer = build(net.parameters(), **kwargs)
    net(torch.rand(2, 5)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2 and all(optimizer.state.values())
    return held(optimizer)


@check(all_settings, when=("pre", "post"))
def a_hook_is_called_until_it_is_removed(build: Build, kwargs: Kwargs, when: str) -> None:
    optimizer, calls = build([torch.ones(2)], **kwargs), []
    register = getattr(optimizer, f"register_step_{when}_hook")
    hook = register(lambda optimizer, *_: calls.append(optimizer))
    optimizer.step()
    optimizer.step()
    assert calls == [optimizer, optimizer]
    hook.remove()
    optimizer.step()
    assert len(calls) == 2


@check(all_settings)
def hooks_of_all_optimizers_enclose_its_own(build: Build, kwargs: Kwargs) -> None:
    params, calls = [torch.ones(2)], []
    optimizers, hooks = [build(params, **kwargs), SGD(params)], []
    before_all = torch_optimizer.register_optimizer_step_pre_hook
    after_all = torch_optimizer.register_optimizer_step_post_hook
    try:
        hooks.append(before_all(lambda *_: calls.append("all, before")))
        hooks.append(after_all(lambda *_: calls.append("all, after")))
        for optimizer in optimizers:
            hooks.append(optimizer.register_step_pre_hook(lambda *_: calls.append("own, before")))
            hooks.append(optimizer.register_step_post_hook(lambda *_: calls.append("own, after")))
        for optimizer in (*optimizers, optimizers[0]):
            optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == ["all, before", "own, before", "own, after", "all, after"] * 3, calls
    for optimizer in optimizers:
        optimizer.step()
    assert len(calls) == 12, "hooks that were removed were called"
