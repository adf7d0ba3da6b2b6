"""M in compiled code is rule.py's, and matrices that one rank has are projected as spread ones."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tolerances
from tests.kernels.test_project import Run
from weyl_megatron.kernels import Clipping
from weyl_megatron.kernels.choice import VARIABLE
from weyl_megatron.kernels.cpu import CpuKernel
from weyl_megatron.rule import Projected, project
from weyl_megatron.spectral.blocks import Blocks, MatrixSpec
from weyl_megatron.spectral.seen import Seen

LR, BOUND = 0.1, 0.02


class Clipper:
    """Matrices of which it is given what the vectors saw, and what compiled code makes of it."""

    def __init__(self, shapes: list[tuple[int, int]], widths: list[int]) -> None:
        count = len(shapes)
        specs = [MatrixSpec(f"w{k}", *shape) for k, shape in enumerate(shapes)]
        everything = range(count)
        self.blocks = Blocks(
            specs, [], (4, widths), [everything], False, torch.device("cpu"), torch.float32
        )
        self.kernel, self.seen = CpuKernel(self.blocks), Seen(self.blocks, 1, everything)
        self.widths = self.seen.operand.widths
        whole = [w == min(shape) for w, shape in zip(self.widths, shapes, strict=True)]
        numbers = [torch.zeros(count, dtype=torch.float64) for _ in range(4)]
        flags = torch.ones(count, dtype=torch.bool), torch.tensor(whole)
        self.clipping = Clipping(
            self.seen,
            [],
            *flags,
            *numbers,
            clipped=torch.zeros(count, dtype=torch.int64),
            is_active=torch.zeros(count, dtype=torch.bool),
        )

    def give(self, number: int, update: Tensor, right: Tensor) -> None:
        """Show the vectors ``right`` (cols, b) an update."""
        y = update @ right
        z, gram = self.seen.operand.image(number)
        z.copy_(y.T @ update)
        square = y.T @ y  # whose halves may round differently
        gram.copy_((square + square.T) / 2)

    def check(self, norms: list[float], bound: float = BOUND, atol: float = 1e-9) -> Projected:
        """Clip all, and compare with rule.py; return what that says."""
        count = len(self.widths)
        lr, bounds = (torch.full((count,), each, dtype=torch.float64) for each in (LR, bound))
        norm = torch.tensor(norms, dtype=torch.float64)
        images = [self.seen.operand.image(k) for k in range(count)]
        of_z = [z.double() for z, _ in images]
        given = [
            ((gram.double()[None], (z @ z.T)[None]), k)
            for k, (z, (_, gram)) in enumerate(zip(of_z, images, strict=True))
        ]
        eps = torch.finfo(torch.float32).eps
        is_whole = self.clipping.is_whole
        clips = [
            project(grams, lr[[k]], bounds[[k]], norm[[k]], is_whole[[k]], eps)
            for grams, k in given
        ]
        sums = torch.stack([norm.square(), norm, norm], dim=1)
        mask = torch.ones(count, dtype=torch.uint8)
        self.kernel.clip(0, mask, lr, bounds, sums, self.clipping)
        for k, (clip, z) in enumerate(zip(clips, of_z, strict=True)):
            pairs = (
                (self.clipping.rate[k], clip.rate[0]),
                (self.clipping.share[k], clip.share[0]),
                (self.clipping.unseen[k], clip.rate[0] / LR),
                (self.clipping.decay[k], lr[k]),
            )
            for value, expected in pairs:
                assert torch.allclose(value, expected, rtol=1e-7, atol=0, equal_nan=True), k
            assert int(self.clipping.clipped[k]) == int(clip.clipped[0]), k
            changed, made = clip.factor[0] @ z, images[k][0].double()
            scale = float(changed.abs().max().nan_to_num(0, 0, 0))
            close = torch.isclose(made, changed, rtol=2e-7, atol=atol + 1e-6 * scale)
            assert bool((close | ~changed.isfinite()).all()), k
        return Projected(*(torch.stack(list(column)) for column in zip(*clips, strict=True)))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(cols: int, width: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(noise(cols, width, seed=1)).Q
    return basis


@pytest.mark.parametrize("width", range(1, 65))
def test_m_of_every_width_is_that_of_plain_torch(width: int) -> None:
    """Of random updates, one whose singular values fall slowly, and one that is seen whole."""
    shapes = [(90, 70), (80, 100), (width, 77)]
    clipper = Clipper(shapes, [width] * 3)
    assert clipper.clipping.is_whole.tolist() == [False, False, True]
    norms = []
    for k, (rows, cols) in enumerate(shapes):
        update = noise(rows, cols, seed=k)
        if k == 1:
            left, values, right = torch.linalg.svd(update, full_matrices=False)
            update = (left * values * 0.9 ** torch.arange(len(values))) @ right
        clipper.give(k, update, vectors(cols, width))
        norms.append(float(update.norm()))
    clip = project_of(clipper.check(norms))
    assert all(count > 0 for count in clip)


def project_of(clip: Projected) -> list[int]:
    """Return how many singular values were clipped."""
    return [int(each) for each in clip.clipped.flatten()]


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 33, 64])
def test_nothing_and_what_is_not_finite_are_bounded_as_in_plain_torch(width: int) -> None:
    shapes = [(90, 70)] * 6
    clipper = Clipper(shapes, [width] * 6)
    update, right = noise(90, 70), vectors(70, width)
    for k in range(6):
        clipper.give(k, update, right)
    images = [clipper.seen.operand.image(k) for k in range(6)]
    for part in images[0]:
        part.zero_()
    images[1][1].zero_()
    images[2][0].zero_()
    images[3][1][0, 0] = inf
    images[4][0][-1, -1] = nan
    clip = clipper.check([float(update.norm())] * 6)
    assert project_of(clip)[:5] == [0] * 5 and project_of(clip)[5] > 0
    # An update that no vector sees, and whose norm is nothing either.
    clipper = Clipper([(9, 7)], [min(width, 7)])
    clipper.check([0.0])


@pytest.mark.parametrize("width", [2, 5, 8, 16, 64])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_of_vectors_that_see_the_same_as_many_count_as_in_plain_torch(
    width: int, rank: int
) -> None:
    """Updates of few directions: rounding is not taken for others."""
    clipper = Clipper([(90, 70)], [width])
    update = noise(90, rank) @ noise(rank, 70, seed=2)
    exact = update.double()
    y = exact @ vectors(70, width).double()
    z, gram = clipper.seen.operand.image(0)
    z.copy_(y.T @ exact)
    gram.copy_(y.T @ y)
    clip = clipper.check([float(update.norm())])
    assert 1 <= project_of(clip)[0] <= min(rank, width)


def test_what_keeps_the_bound_is_left_as_it_is() -> None:
    clipper = Clipper([(90, 70)], [8])
    update = noise(90, 70)
    clipper.give(0, update, vectors(70, 8))
    clip = clipper.check([float(update.norm())], bound=1e3)
    assert project_of(clip) == [0] and float(clip.rate) == LR
    assert float(clipper.seen.operand.image(0)[0].abs().max()) < 1e-9


@pytest.mark.parametrize("size", [1, 8, 16])
def test_batches_that_are_stepped_alone_are_those_that_go_line_by_line(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a matrix that no other rank has a piece of one call makes all lines, and of others a call
    each.
    """
    monkeypatch.setenv(VARIABLE, "cpu")
    alone, lines = (Run(torch.float32, vectors=size) for _ in range(2))
    with tolerances.every_iteration():
        for number in range(5):
            by_line(lines, number > 0)
            for (_, _, entry), (_, _, other) in zip(alone.step(), lines.step(), strict=True):
                assert entry.directions == other.directions and entry.clipped == other.clipped
                assert entry.sigma_update == pytest.approx(other.sigma_update, rel=1e-5)
                for name in ("lr", "share", "unseen"):
                    value, expected = getattr(entry, name), getattr(other, name)
                    assert value == pytest.approx(expected, rel=1e-4), name
    for param, twin in zip(alone.params, lines.params, strict=True):
        assert torch.allclose(param, twin, rtol=0, atol=1e-5 * float(twin.detach().abs().max()))


def by_line(run: Run, has_stepped: bool) -> None:
    """Let a run step as if other ranks had pieces of every matrix, from its second step on."""
    groups = list(run.optimizer._matrix_groups)
    assert bool(groups) == has_stepped
    for group in groups:
        step: Any = group._step
        step._is_spread = [True] * len(step._is_spread)
