"""An AdamW² on the CPU, seen as Megatron's distributed optimizer sees it: pieces of weights with
``decoupled_grad``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from weyl_megatron import AdamW2
from weyl_megatron.engines.megatron.offload import CpuOffload
from weyl_megatron.watch.optimizers import _wrapped

SHAPES = ((6, 5), (7,))


def pieces(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def made(held: list[Tensor]) -> CpuOffload:
    return CpuOffload(AdamW2([{"params": held[:1]}, {"params": held[1:]}], lr=1e-2))


def give_gradients(held: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(piece.shape, generator=generator) for piece in held]
    for piece, grad in zip(held, grads, strict=True):
        piece.decoupled_grad = grad.to(piece.dtype)  # type: ignore[attr-defined]
    return grads


def test_masters_are_stepped_in_float32_and_weights_are_their_rounding() -> None:
    held = pieces()
    offloaded = made(held)
    masters = [torch.nn.Parameter(piece.float()) for piece in held]
    alone = AdamW2([{"params": masters[:1]}, {"params": masters[1:]}], lr=1e-2)
    for seed in range(3):
        for master, grad in zip(masters, give_gradients(held, seed), strict=True):
            master.grad = grad.bfloat16().float()
        alone.step()
        offloaded.step()
    for piece, master in zip(held, masters, strict=True):
        assert torch.equal(offloaded.master(piece), master)
        assert torch.equal(piece, master.bfloat16())
    assert len(offloaded.stats()) == 1


def test_a_scheduler_writes_to_the_groups_that_megatron_has() -> None:
    held = pieces()
    offloaded = made(held)
    for group in offloaded.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    give_gradients(held, 0)
    offloaded.step()
    assert all(map(torch.equal, held, pieces()))


def test_a_piece_without_a_gradient_stays() -> None:
    held = pieces()
    offloaded = made(held)
    give_gradients(held, 0)
    held[1].decoupled_grad = None  # type: ignore[attr-defined]
    offloaded.step()
    assert torch.equal(held[1], pieces()[1]) and not torch.equal(held[0], pieces()[0])
    offloaded.zero_grad()
    assert held[0].decoupled_grad is None  # type: ignore[attr-defined]


def test_states_are_empty_until_they_are_allocated_and_have_the_master() -> None:
    held = pieces()
    offloaded = made(held)
    assert len(offloaded.state) == 0
    offloaded.initialize_state(held[0])
    assert set(offloaded.state) == set(held)
    assert set(offloaded.state[held[0]]) == {"step", "exp_avg", "exp_avg_sq", "master_param"}
    offloaded.set_scaled_state(held[0], "master_param", torch.ones(6, 5))
    offloaded.set_scaled_state(held[0], "padding", torch.ones(1))  # of a bucket
    assert torch.equal(offloaded.get_unscaled_state(held[0], "master_param"), torch.ones(6, 5))


def test_a_state_dict_is_loaded_by_another_bit_for_bit() -> None:
    held, others = pieces(), pieces()
    first, second = made(held), made(others)
    for seed in range(3):
        give_gradients(held, seed)
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for piece, other in zip(held, others, strict=True):
        other.copy_(piece)
        assert torch.equal(first.master(piece), second.master(other))
    for seed in (3, 4):
        give_gradients(held, seed)
        give_gradients(others, seed)
        first.step()
        second.step()
    assert all(map(torch.equal, held, others))


def test_masters_follow_weights_that_were_loaded() -> None:
    held = pieces()
    offloaded = made(held)
    held[0].fill_(3)
    offloaded.refresh()
    assert torch.equal(offloaded.master(held[0]), torch.full((6, 5), 3.0))


def test_watch_finds_the_optimizer_inside() -> None:
    offloaded = made(pieces())
    ((_, inner),) = _wrapped(offloaded)
    assert isinstance(inner, AdamW2)
