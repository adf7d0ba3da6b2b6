"""Rule 1 by projection: the arithmetic, and the reference, against singular value decomposition."""

from __future__ import annotations

from math import inf

import pytest
import torch
from torch import Tensor, nn

from weyl_megatron.reference import AdamW2Reference, exact_sigma, projected
from weyl_megatron.rule import UNSEEN, project

SHAPES = [(12, 40), (40, 12), (9, 9), (1, 7), (7, 1), (33, 65)]


def random_update(rows: int, cols: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall slowly, as an update's do."""
    noise = torch.randn(
        rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    left, values, right = torch.linalg.svd(noise, full_matrices=False)
    return (left * values * 0.9 ** torch.arange(len(values))) @ right


def orthonormal(cols: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis: Tensor = torch.linalg.qr(
        torch.randn(cols, width, generator=generator, dtype=torch.float64)
    ).Q
    return basis


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.9, 0.2, 1e-3])
def test_a_block_of_all_directions_gives_the_nearest_update(
    shape: tuple[int, int], share: float
) -> None:
    """Whatever the vectors are: nothing of U is left that they do not see."""
    update = random_update(*shape)
    bound = share * 0.1 * exact_sigma(update)
    right = orthonormal(shape[1], shape[1]) if shape[1] <= shape[0] else None
    if right is None:  # rows are what there is few of, and vectors in the row space see them all
        right = torch.linalg.qr(update.T).Q
    nearest, nearest_share = projected(update, 0.1, bound, None)
    change, change_share = projected(update, 0.1, bound, right)
    assert torch.allclose(change, nearest, rtol=0, atol=1e-9 * bound)
    assert change_share == pytest.approx(nearest_share, rel=1e-9)
    assert exact_sigma(change) == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_block_of_the_largest_directions_clips_them_and_shrinks_the_rest(width: int) -> None:
    update = random_update(33, 65)
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    bound = 0.1 * float(values[min(width, 4)])
    change, _ = projected(update, 0.1, bound, right[:width].T)
    expected = (0.1 * values).clamp(max=bound)
    shrunk = min(0.1, bound / (UNSEEN * float(values[width - 1])))
    expected[width:] = shrunk * values[width:]
    assert torch.allclose(change, (left * expected) @ right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("width", [1, 4, 8])
def test_vectors_that_have_not_converged_split_the_update_exactly(width: int) -> None:
    """What they see is clipped, what they do not see is left: σ₁² is at most c² and the rest's."""
    update = random_update(33, 65)
    right = orthonormal(65, width)
    change, _ = projected(update, 0.1, 1e-2, right)
    basis = torch.linalg.qr(update @ right).Q
    seen, unseen = basis @ (basis.T @ change), change - basis @ (basis.T @ change)
    assert exact_sigma(seen) <= 1e-2 * (1 + 1e-9)
    rest = update - basis @ (basis.T @ update)
    rate = float((unseen * rest).sum() / rest.square().sum())
    assert torch.allclose(unseen, rate * rest, rtol=0, atol=1e-12) and 0 < rate < 0.1
    assert exact_sigma(change) ** 2 <= 1e-4 * (1 + 1e-9) + (rate * exact_sigma(rest)) ** 2


def of_one(update: Tensor, right: Tensor, lr: float, bound: float) -> tuple[Tensor, ...]:
    y = update @ right
    z = y.T @ update
    vectors = [torch.tensor([number], dtype=torch.float64) for number in (lr, bound)]
    norm = update.norm()[None]
    return tuple(project(((y.T @ y)[None], (z @ z.T)[None]), *vectors, norm, norm < 0, 1e-7))


def test_what_is_within_the_bound_is_left_as_it_is() -> None:
    update = random_update(12, 40)
    factor, rate, clipped, share = of_one(update, orthonormal(40, 4), 0.1, 1e3)
    assert not factor.abs().max() > 1e-12 and (rate.item(), clipped.item()) == (0.1, 0)
    assert share.item() == pytest.approx(1)


def test_vectors_that_see_the_same_count_once() -> None:
    """An update of rank 1: its one direction is clipped, and rounding is not taken for others."""
    update = torch.outer(torch.arange(1.0, 13), torch.arange(1.0, 41)).double()
    factor, rate, clipped, share = of_one(update, orthonormal(40, 4), 0.1, 1.0)
    y = update @ (right := orthonormal(40, 4))
    change = rate * update + y @ factor[0] @ (y.T @ update)
    assert right.shape == (40, 4) and clipped.item() == 1
    assert exact_sigma(change) == pytest.approx(1.0)
    assert share.item() == pytest.approx(1.0 / (0.1 * exact_sigma(update)))


@pytest.mark.parametrize("spoiled", [0.0, inf, float("nan")])
def test_what_no_vector_sees_is_bounded_by_its_frobenius_norm_and_harms_no_other(
    spoiled: float,
) -> None:
    update = random_update(12, 40)
    y = update @ orthonormal(40, 4)
    z = y.T @ update
    grams = torch.stack([y.T @ y, y.T @ y]), torch.stack([z @ z.T, z @ z.T])
    grams[0][0] *= spoiled
    vectors = [torch.full((2,), number, dtype=torch.float64) for number in (0.1, 1e-2)]
    norm = torch.full((2,), 5.0, dtype=torch.float64)
    clip = project(grams, *vectors, norm, norm < 0, 1e-7)
    assert clip.rate[0].item() == pytest.approx(1e-2 / 5, rel=1e-5) and not clip.factor[0].any()
    assert clip.clipped.tolist()[0] == 0 and clip.clipped.tolist()[1] > 0
    assert clip.factor[1].isfinite().all()


@pytest.mark.parametrize("vectors", [None, 4])
def test_the_reference_keeps_the_rule_and_moves_farther_than_by_scaling(
    vectors: int | None,
) -> None:
    """Ten times above the bound: σ₁ of each step's change, without decay, is the bound's."""
    moved = {}
    for clip in ("scale", "project"):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(24, 16, generator=generator, dtype=torch.float64))
        optimizer = AdamW2Reference(
            [("w", weight)],
            lr=0.3,
            weight_decay=0.0,
            tau=0.01,
            sigma=lambda *_: exact_sigma,
            clip=clip,
            vectors=vectors,
        )
        start, steps = weight.detach().clone(), []
        for _ in range(5):
            weight.grad = torch.randn(24, 16, generator=generator, dtype=torch.float64)
            before = weight.detach().clone()
            optimizer.step()
            change = exact_sigma(weight.detach() - before) / (0.01 * exact_sigma(before))
            steps.append(change)
        moved[clip] = float((weight.detach() - start).norm())
        allowed = 1 if clip == "scale" or vectors is None else 1.5
        assert all(0.999 < step < allowed + 1e-6 for step in steps), (clip, steps)
    assert moved["project"] > 1.05 * moved["scale"]
