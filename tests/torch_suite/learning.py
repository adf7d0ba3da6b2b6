"""Checks of what a step does, and that flags, tensors and layouts change nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tests.torch_suite.cells import (
    Build,
    Kwargs,
    Values,
    adamw_info,
    assert_same,
    check,
    fused_settings,
    held,
    once,
    raised,
    schedulers,
    settings,
    undecayed_settings,
)
from tests.torch_suite.nets import Affine, Layers


def _step(net: nn.Module, optimizer: Optimizer, scheduled: Sequence[Any] = ()) -> None:
    optimizer.zero_grad()
    loss = net()
    loss.backward()
    optimizer.step()
    for scheduler in scheduled:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss.detach())
        else:
            scheduler.step()


def _assert_moves(
    net: nn.Module,
    optimizer: Optimizer,
    maximize: bool = False,
    scheduled: Sequence[Any] = (),
) -> None:
    """Make 20 steps, after which the loss has to be lower, or higher where ``maximize``."""
    before = net().item()
    for _ in range(20):
        _step(net, optimizer, scheduled)
    after = net().item()
    moved = after > before if maximize else after < before
    assert moved, f"the loss went from {before} to {after}"


@check(settings, strided=(False, True), scheduled=(False, True))
def steps_go_the_right_way(build: Build, kwargs: Kwargs, strided: bool, scheduled: bool) -> Values:
    net = Affine(strided=strided)
    optimizer = build(net.parameters(), **kwargs, foreach=False)
    chosen = adamw_info().scheduler_inputs[0] if scheduled else ()
    running = [scheduler(optimizer) for scheduler in chosen]
    _assert_moves(net, optimizer, kwargs.get("maximize", False), running)
    return held(optimizer)


@check(schedulers)
def schedulers_drive_groups_of_two_rates(build: Build, chosen: Sequence[Any]) -> Values:
    net = Affine()
    optimizer = build([{"params": [net.weight]}, {"params": [net.bias], "lr": 0.01}])
    _assert_moves(net, optimizer, scheduled=[scheduler(optimizer) for scheduler in chosen])
    return held(optimizer)


@check(fused_settings, dimensions=(0, 1, 2))
def lr_may_be_a_tensor(build: Build, kwargs: Kwargs, dimensions: int) -> Values:
    nets = [Affine(), Affine()]
    nets[1].load_state_dict(nets[0].state_dict())
    number, tensor = ({**kwargs, "lr": lr} for lr in (1e-3, torch.full([1] * dimensions, 1e-3)))
    optimizers = [build(nets[0].parameters(), **number), build(nets[1].parameters(), **tensor)]
    for _ in range(5):
        for net, optimizer in zip(nets, optimizers, strict=True):
            _step(net, optimizer)
        assert_same(held(optimizers[1]), held(optimizers[0]))
    return held(optimizers[1])


@check(fused_settings)
def groups_have_their_own_weight_decay(build: Build, kwargs: Kwargs) -> Values:
    net = Affine()
    of_bias = {**kwargs, "params": [net.bias], "weight_decay": 0.0}
    optimizer = build([{**kwargs, "params": [net.weight]}, of_bias])
    _assert_moves(net, optimizer, kwargs.get("maximize", False))
    return held(optimizer)


@check(fused_settings)
def groups_have_their_own_rate(build: Build, kwargs: Kwargs) -> Values:
    net, still = Affine(), nn.Parameter(torch.randn(2))
    before = still.detach().clone()
    of_net = {"lr": 1e-3, **kwargs, "params": list(net.parameters())}
    optimizer = build([of_net, {"params": [still]}], lr=1e-28)
    optimizer.register_step_pre_hook(lambda *_: setattr(still, "grad", torch.rand_like(still)))
    _assert_moves(net, optimizer, kwargs.get("maximize", False))
    assert_same(still.detach(), before)
    return held(optimizer)


def _assert_flag_changes_nothing(
    build: Build, kwargs: Kwargs, flag: str, dtype: torch.dtype, **tolerance: float
) -> list[Optimizer]:
    """Step equal nets with and without ``flag``; return the optimizers, without it first.

    Of seven steps one is without gradients, and for two a layer is frozen. After each the net with
    the flag is set to the other's values, so that ``tolerance`` is that of one step.
    """
    nets = [Layers().to(dtype), Layers().to(dtype)]
    nets[1].load_state_dict(nets[0].state_dict())
    loop = build(nets[0].parameters(), **kwargs, **{flag: False})
    flagged = build(nets[1].parameters(), **kwargs, **{flag: True})
    for step in range(7):
        for net, optimizer in zip(nets, (loop, flagged), strict=True):
            optimizer.zero_grad()
            net.second.requires_grad_(step not in (3, 4))
            if step != 2:
                net().backward()
            optimizer.step()
        assert_same(held(flagged), held(loop), **tolerance)
        nets[1].load_state_dict(nets[0].state_dict())
        for param, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            for key, value in loop.state[param].items():
                flagged.state[other][key].copy_(value)
    return [loop, flagged]


@check(settings, dtype=(torch.float64,))
def foreach_is_the_loop(build: Build, kwargs: Kwargs, dtype: torch.dtype) -> Values:
    return held(_assert_flag_changes_nothing(build, kwargs, "foreach", dtype)[0])


@check(settings, dtype=(torch.float32, torch.float64, torch.bfloat16, torch.float16))
def fused_is_the_loop(build: Build, kwargs: Kwargs, dtype: torch.dtype) -> Values:
    # torch's own bound for the halves: its fused kernel converts more often than its loop.
    half = {"rtol": 5e-3, "atol": 5e-3} if dtype in (torch.bfloat16, torch.float16) else {}
    return held(_assert_flag_changes_nothing(build, kwargs, "fused", dtype, **half)[0])


@check(settings, default=(torch.float64, torch.float16))
def counts_are_exact_under_other_defaults(
    build: Build,
    kwargs: Kwargs,
    default: torch.dtype,
) -> Values:
    torch.set_default_dtype(default)
    optimizers = _assert_flag_changes_nothing(build, kwargs, "foreach", torch.float64)
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    dtypes = {state["step"].dtype for state in states}
    expected = torch.float64 if default == torch.float64 else torch.float32
    assert dtypes == {expected}, f"step counts are {dtypes}"
    return held(optimizers[0])


@check(once)
def a_step_on_meta_is_refused_where_there_are_gradients(build: Build, kwargs: Kwargs) -> None:
    with torch.device("meta"):
        net = Layers()
    optimizer = build(net.parameters(), fused=True)
    for param in net.parameters():
        param.grad = torch.rand_like(param)
    words = "`fused=True` requires all the params to be floating point Tensors"
    got = raised(optimizer.step)
    assert any(isinstance(each, RuntimeError) and words in str(each) for each in got), got
    optimizer.zero_grad()
    net.to_empty(device="cpu")  # has new parameters; the optimizer's stay on meta, without gradient
    optimizer.step()


@check(undecayed_settings)
def zero_gradients_change_nothing(build: Build, kwargs: Kwargs) -> Values:
    param = torch.randn(5, 1, requires_grad=True)
    before = param.detach().clone()
    stepped = param.clone() if kwargs.get("differentiable") else param
    # At this rate the default weight decay is below the tolerance.
    optimizer = build([stepped], **{**kwargs, "lr": 1e-5})
    stepped.grad = torch.zeros_like(stepped)
    optimizer.step(lambda: torch.ones(1))
    assert_same(stepped.detach(), before)
    return held(optimizer)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@check(settings)
def complex_weights_are_pairs_of_real_ones(build: Build, kwargs: Kwargs) -> Values:
    dtypes = {(10, 5): torch.complex64, (10,): torch.complex64, (5, 10): torch.float32}
    mixed = [torch.randn(shape, dtype=dtype) for shape, dtype in dtypes.items()]
    real = [_as_real(each).clone().requires_grad_() for each in mixed]
    optimizers = [build([each.requires_grad_() for each in mixed], **kwargs), build(real, **kwargs)]
    for _ in range(3):
        for ours, theirs in zip(mixed, real, strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = _as_real(ours.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
        assert_same([_as_real(each.detach()) for each in mixed], [each.detach() for each in real])
    return held(optimizers[0])


def _rosenbrock(pair: Tensor) -> Tensor:
    return ((1 - pair[0]) ** 2 + 100 * (pair[1] - pair[0] ** 2) ** 2).abs()


@check(settings)
def complex_weights_have_two_parts(build: Build, kwargs: Kwargs) -> Values:
    whole = torch.randn(2, dtype=torch.complex64, requires_grad=True)
    parts = [part.detach().clone().requires_grad_() for part in (whole.real, whole.imag)]
    optimizers = [build([whole], **kwargs), build(parts, **kwargs)]
    for _ in range(3):
        for part, value in zip(parts, (whole.real, whole.imag), strict=True):
            part.data.copy_(value.detach())
        for optimizer in optimizers:
            optimizer.zero_grad()
        _rosenbrock(whole).backward()
        _rosenbrock(torch.complex(*parts)).backward()
        assert whole.grad is not None
        assert_same([part.grad for part in parts], [whole.grad.real, whole.grad.imag])
        for optimizer in optimizers:
            optimizer.step()
        now = whole.detach()
        assert_same([part.detach() for part in parts], [now.real, now.imag])
    return held(optimizers[0])
