"""The optimizer in one file is the reference's: scaled, projected, balanced."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.speedrun.adamw2 import COLD, WARM, AdamW2, balanced
from weyl_megatron.reference import AdamW2Reference, BlockPower
from weyl_megatron.rule import balanced_floor

SHAPES = {"a": (24, 16), "b": (24, 16), "c": (9, 31), "bias": (24,)}
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Power(BlockPower):
    """Block power iteration from given vectors, that makes every iteration."""

    def __init__(self, start: Tensor) -> None:
        super().__init__("", WARM, start.shape[1], WARM)
        self.start = start

    def __call__(self, matrix: Tensor) -> float:
        if self.block is None:
            self.block = self.start
            self.iters = self.least = COLD
        sigma = super().__call__(matrix)
        self.iters = self.least = WARM
        return sigma


def starts(widths: tuple[int, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the start vectors of every matrix, in the order in which the file draws them: of W
    and then of U, a shape at a time.
    """
    drawn: dict[str, list[Tensor]] = {}
    seed = 0
    for names in (("a", "b"), ("c",)):
        for width in widths:
            for name in names:
                size = SHAPES[name][1], min(width, *SHAPES[name])
                noise = torch.randn(
                    size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
                )
                drawn.setdefault(name, []).append(torch.linalg.qr(noise).Q)
                seed += 1
    return {name: (of_w, of_u) for name, (of_w, of_u) in drawn.items()}


def params() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1)
        for name, shape in SHAPES.items()
    }


def train(optimizer: Any, named: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for param in named.values():
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        optimizer.step()


@pytest.mark.parametrize("tau", [0.02, 1e4, float("inf")])
@pytest.mark.parametrize(("clip", "vectors"), [("scale", 4), ("project", 6), ("project", 31)])
def test_it_steps_as_the_reference_does(tau: float, clip: str, vectors: int) -> None:
    named, expected = params(), params()
    train(AdamW2(named.values(), tau=tau, clip=clip, vectors=vectors, **OPTIONS), named)
    drawn = starts((4, vectors if clip == "project" else 4))
    reference = AdamW2Reference(
        expected.items(), tau=tau, clip=clip, vectors=vectors, sigma=lambda *_: Power, **OPTIONS
    )
    if tau != float("inf"):
        reference.sigma = {name: tuple(map(Power, pair)) for name, pair in drawn.items()}
        if clip == "project":
            reference.blocks = {name: Power(of_u) for name, (_, of_u) in drawn.items()}
    else:
        reference.sigma = {name: (lambda _: 1.0, lambda _: 0.0) for name in drawn}
        reference.blocks = {}
    train(reference, expected)
    for name, param in named.items():
        assert torch.allclose(param, expected[name], rtol=0, atol=1e-6), name


def test_infinity_is_adamw() -> None:
    named, expected = params(), params()
    train(AdamW2(named.values(), tau=float("inf"), **OPTIONS), named)
    train(torch.optim.AdamW(expected.values(), **OPTIONS), expected)
    for name, param in named.items():
        assert torch.allclose(param, expected[name], rtol=0, atol=1e-12)


def test_balanced_is_the_package_s() -> None:
    named = params()
    groups = balanced([named["a"], named["b"]], [named["c"]], [named["bias"]])
    assert [group.get("tau") for group in groups] == [0.072, 0.1, None]
    optimizer = AdamW2(groups, clip="project", **OPTIONS)
    assert [group["clip"] for group in optimizer.param_groups] == ["project", "scale", "project"]
    train(optimizer, named)
    assert all(torch.isfinite(param).all() for param in named.values())
    from examples.speedrun.adamw2 import _floor

    assert _floor("xavier", 24, 16) == pytest.approx(balanced_floor(24, 16))


def test_weights_in_bfloat16_and_zeros_move() -> None:
    weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.bfloat16))
    for clip in ("scale", "project"):
        optimizer = AdamW2([weight], lr=1e-2, clip=clip)
        weight.grad = torch.ones_like(weight)
        before = weight.detach().clone()
        optimizer.step()
        assert weight.isfinite().all() and not torch.equal(weight, before)


def test_nothing_is_imported_but_torch_and_python() -> None:
    tree = ast.parse(Path("examples/speedrun/adamw2.py").read_text())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "collections.abc", "typing", "torch"}
