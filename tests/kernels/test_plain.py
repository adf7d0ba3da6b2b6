"""The plain kernel as a device sees it: how often a step waits for it, and that nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import net as nets
from tests import tolerances
from weyl_megatron import AdamW2
from weyl_megatron.kernels import Hyper, Stepped
from weyl_megatron.kernels.choice import VARIABLE
from weyl_megatron.kernels.plain import PlainKernel
from weyl_megatron.spectral import power, ritz
from weyl_megatron.spectral.blocks import Blocks, MatrixSpec, table
from weyl_megatron.spectral.tiles import Tile


class Bound:
    """A kernel with whole matrices of which the last one's rows are cut, and a tensor of none."""

    def __init__(self, count: int) -> None:
        shape, generator = (6, 8), torch.Generator().manual_seed(0)
        specs = [MatrixSpec(f"w{number}", *shape) for number in range(count)]
        tiles = [Tile(k, 0, 0, 6, 8, 0, 8, buffer=k) for k in range(count - 1)]
        tiles += [Tile(count - 1, 0, col, 6, 4, col, 8, buffer=count - 1) for col in (0, 4)]
        self.blocks = Blocks(
            specs, tiles, (4, 4), [range(count)], False, torch.device("cpu"), torch.float32
        )
        self.kernel = PlainKernel(self.blocks)
        rest = Tile(-1, 0, 0, 6, 8, 0, 8, buffer=count)
        rows = [self.blocks.operands[1].row(tile) for tile in tiles]
        rows.append([count, 0, 6, 8, 8, -1, *[0] * 7])
        self.everything = table(rows, torch.device("cpu"), [*tiles, rest])
        self.of_batch = table(rows[:-1], torch.device("cpu"), tiles)
        self.weights = [torch.randn(48, generator=generator) for _ in range(count + 1)]
        moments = torch.rand(3, count + 1, 48, generator=generator)
        hyper = Hyper(0.01, 0.9, 0.95, 1e-8, 0.1, 3.0)
        self.kernel.bind(
            self.weights, [Stepped(*each, hyper) for each in zip(*moments, strict=True)]
        )
        self.mask = torch.ones(count, dtype=torch.uint8)
        self.rates = torch.full((count,), 0.001, dtype=torch.float64)
        self.sums = torch.zeros(count, 3, dtype=torch.float64)
        self.sigma, self.gain = torch.zeros(2, count, dtype=torch.float64)
        self.blocks.load(0)

    def passes(self) -> dict[str, Callable[[], None]]:
        """What a step is made of, by name."""
        kernel, mask, sums, cut = self.kernel, self.mask, self.sums, self.blocks.operands[0].cut[0]
        return {
            "step": lambda: kernel.step(self.everything, mask, sums),
            "undo": lambda: kernel.undo(self.everything, mask),
            "moments": lambda: kernel.moments(self.of_batch, mask, sums),
            "multiply": lambda: kernel.multiply(0, self.of_batch, mask),
            "multiply_back": lambda: kernel.multiply_back(0, cut, mask),
            "orthonormalize": lambda: kernel.orthonormalize(
                0, 0, mask, mask, self.sigma, self.gain
            ),
            "move": lambda: kernel.move(self.of_batch, mask, self.rates, sums),
        }


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reads of tensors since it was last cleared; all of them are taken for a device's."""
    made: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        read = getattr(Tensor, name)

        def count(self: Tensor, *args: Any) -> Any:
            made.append(name)
            return read(self, *args)

        return count

    for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__float__"):
        monkeypatch.setattr(Tensor, name, counting(name))
    see_nothing(monkeypatch)
    return made


def see_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ritz, power):
        monkeypatch.setattr(module, "is_seen", lambda tensor: False)


@pytest.mark.parametrize("count", [2, 9])
def test_a_pass_waits_for_a_device_at_most_once(count: int, reads: list[str]) -> None:
    waits = {}
    for name, make in Bound(count).passes().items():
        reads.clear()
        make()
        waits[name] = len(reads)
    assert waits.pop("orthonormalize") == 0
    assert set(waits.values()) == {1}


def test_each_tile_moves_at_its_matrix_s_rate_and_only_those_in_the_mask() -> None:
    bound = Bound(3)
    before = [weight.clone() for weight in bound.weights]
    bound.mask[1] = 0
    bound.rates[:] = torch.tensor([0.0, 1.0, 0.01])
    bound.kernel.move(bound.of_batch, bound.mask, bound.rates, bound.sums)
    assert [torch.equal(w, b) for w, b in zip(bound.weights, before, strict=True)] == [
        True,  # at rate 0
        True,
        False,
        True,  # of no matrix
    ]
    squares = [float(bound.weights[k].double().square().sum()) for k in (0, 2)]
    # The norms are of float32, and squared.
    assert bound.sums[[0, 2], 2].tolist() == pytest.approx(squares, rel=1e-6)
    assert not bound.sums[1].any()


@pytest.mark.parametrize("clip", ["scale", "project"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_where_the_host_sees_nothing_training_is_the_same(
    dtype: torch.dtype, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "torch")

    def train() -> tuple[nn.Module, AdamW2]:
        net = nets.make_net(mixed=True).to(dtype)
        optimizer = AdamW2(net.named_parameters(), **nets.OPTIONS, clip=clip)
        generator = torch.Generator().manual_seed(1)
        for _ in range(8):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
        return net, optimizer

    with tolerances.every_iteration():
        net, seen = train()
        see_nothing(monkeypatch)
        twin, blind = train()
    # Of σ₁, float32 sums of other vectors of the same span; of a bfloat16 weight, one rounding.
    rounding = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-7}[dtype]
    for (name, weight), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        scale = float(weight.detach().abs().max())
        assert torch.allclose(weight, other, rtol=0, atol=rounding * scale), name
    clipped = [{n: e.clipped for n, e in each.stats().items()} for each in (seen, blind)]
    assert clipped[0] == clipped[1] and any(clipped[0].values())
