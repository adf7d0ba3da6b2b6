from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.processes import torchrun
from weyl_megatron import AdamW2
from weyl_megatron.reference import BlockPower, exact_sigma
from weyl_megatron.spectral import Block, MatrixSpec, PowerIteration, tiles_of_range
from weyl_megatron.spectral.blocks import start_block
from weyl_megatron.spectral.collectives import _collective_device
from weyl_megatron.spectral.power import COLD_ITERS, TorchProducts
from weyl_megatron.spectral.ritz import gain, largest_ratio


def whole(matrices: list[torch.Tensor], **options: object) -> PowerIteration:
    """A power iteration over whole matrices, each in a buffer of its own."""
    specs = [MatrixSpec(f"w{number}", *matrix.shape) for number, matrix in enumerate(matrices)]
    tiles = [
        tile
        for number, m in enumerate(matrices)
        for tile in tiles_of_range(
            [Block(number, 0, 0, *m.shape, 0, 0)], m.shape[1], 0, m.numel(), 0, number
        )
    ]
    return PowerIteration(specs, tiles, **options)  # type: ignore[arg-type]


def flat(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    return [matrix.flatten() for matrix in matrices]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_sigma_is_never_above_and_soon_at_the_exact_one(
    shapes: list[tuple[int, int]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    exact = torch.stack([torch.linalg.matrix_norm(matrix, 2) for matrix in matrices])
    power = whole(matrices)
    first = power.sigmas([flat(matrices)])[0]
    for _ in range(40):
        later = power.sigmas([flat(matrices)])[0]
    # A handful of float32 roundings of a product of a dozen terms.
    assert (first <= exact * (1 + 1e-5)).all()
    assert torch.allclose(later, exact, rtol=1e-4)


def test_it_is_the_reference_s_iteration() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(30, 20, dtype=torch.float64)
    power, reference = whole([matrix], dtype=torch.float64, least=1), BlockPower("w0")
    for _ in range(3):
        matrix += 0.1 * torch.randn(30, 20, dtype=torch.float64)
        assert power.sigmas([flat([matrix])]).item() == pytest.approx(reference(matrix), rel=1e-12)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(5, 4),
        torch.full((5, 4), 1e-30),
        torch.full((5, 4), 1e30),
        torch.outer(torch.arange(5.0), torch.ones(4)),
        torch.eye(6),
        torch.ones(1, 7),
        torch.ones(7, 1),
    ],
    ids=["zero", "1e-30", "1e30", "rank-1", "equal-singular-values", "one-row", "one-column"],
)
def test_degenerate_matrices(matrix: torch.Tensor) -> None:
    sigma = whole([matrix]).sigmas([flat([matrix])]).item()
    assert sigma == pytest.approx(float(torch.linalg.matrix_norm(matrix.double(), 2)), rel=1e-5)


def test_a_spike_far_above_the_tracked_direction_is_found_in_one_call() -> None:
    """What a single warm vector misses: the top direction changes at once."""
    torch.manual_seed(0)
    matrix = torch.randn(64, 48)
    power = whole([matrix])
    power.sigmas([flat([matrix])])
    matrix[7] += 60.0
    exact = torch.linalg.matrix_norm(matrix, 2)
    assert power.sigmas([flat([matrix])]).item() == pytest.approx(float(exact), rel=1e-3)


def test_what_is_not_finite_is_not_a_number_and_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(6, 5), torch.randn(6, 5), torch.randn(6, 5)]
    matrices[1][2, 3] = float("inf")
    sigmas = whole(matrices).sigmas([flat(matrices)])[0]
    assert sigmas.isnan().tolist() == [False, True, False]
    exact = float(torch.linalg.matrix_norm(matrices[0], 2))
    assert sigmas[0].item() == pytest.approx(exact, rel=1e-3)


def test_operands_keep_vectors_of_their_own() -> None:
    torch.manual_seed(0)
    weight, update = torch.randn(9, 5), torch.randn(9, 5) * 3
    both = whole([weight], widths=(4, 4)).sigmas([flat([weight]), flat([update])])[:, 0]
    alone = [whole([matrix]).sigmas([flat([matrix])]).item() for matrix in (weight, update)]
    assert both.tolist() == pytest.approx(alone, rel=1e-6)


def test_start_vectors_belong_to_the_name() -> None:
    assert torch.equal(start_block("h.0.w", 9, 4), start_block("h.0.w", 9, 4))
    assert not torch.equal(start_block("h.0.w", 9, 4), start_block("h.1.w", 9, 4))


def test_cpu_tensors_of_an_nccl_group_travel_through_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _collective_device("nccl", torch.device("cpu")) == torch.device("cuda", 3)
    assert _collective_device("nccl", torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert _collective_device("gloo", torch.device("cpu")) == torch.device("cpu")


def test_nothing_keeps_process_groups_alive_but_what_is_in_use() -> None:
    """A cycle would keep them until the interpreter ends, when gloo's threads can no longer be
    joined.
    """
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 5))
    weight.grad = torch.randn(6, 5)
    gc.collect()
    gc.disable()
    try:
        for kernel in ("cpu", "torch"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("WEYL_MEGATRON_KERNEL", kernel)
                optimizer = AdamW2([("w", weight)])
                optimizer.step()
            matrix_group = next(iter(optimizer._matrix_groups))
            gone = weakref.ref(matrix_group._power.blocks)
            del matrix_group
            optimizer._matrix_groups.clear()
            assert gone() is None, kernel
    finally:
        gc.enable()


def test_spread_over_ranks_in_any_layout_it_is_one_process_s_sigma() -> None:
    """Three ranks: ranges that cut rows, bands over two groups, an empty rank (see
    power_worker.py).
    """
    assert "all layouts agree" in torchrun(Path(__file__).with_name("power_worker.py"), 3)


def test_an_iteration_that_would_gain_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    steady, moving = torch.randn(40, 30), torch.randn(40, 30)
    power = whole([steady, moving], iters=2, least=1)
    iterations = [0, 0]
    orthonormalize = TorchProducts.orthonormalize

    def counting(self, operand, batch, mask, more, sigma, gain):  # type: ignore[no-untyped-def]
        iterations[:] = [count + int(made) for count, made in zip(iterations, mask, strict=True)]
        orthonormalize(self, operand, batch, mask, more, sigma, gain)

    monkeypatch.setattr(TorchProducts, "orthonormalize", counting)
    power.sigmas([flat([steady, moving])])
    assert iterations == [COLD_ITERS, COLD_ITERS], "nothing is known of new vectors"
    for _ in range(10):
        moving = torch.randn(40, 30)
        sigmas = power.sigmas([flat([steady, moving])])[0]
    assert iterations == [COLD_ITERS + 10, COLD_ITERS + 20]
    assert sigmas[0].item() == pytest.approx(exact_sigma(steady), rel=1e-3)


def test_a_gain_is_what_the_second_half_of_an_iteration_adds() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 9, dtype=torch.float64)
    block = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64)).Q
    y = matrix @ block
    z = matrix.T @ y
    sigma = largest_ratio(y.T @ y, z.T @ z, 1e-16)
    gained = 1 - exact_sigma(matrix @ block) / sigma.item()
    one, long = torch.tensor([1.0, 1e20], dtype=torch.float64)  # of the block's vectors
    assert gain(y.T @ y, one, sigma).item() == pytest.approx(gained, rel=1e-12)
    assert gain(y.T @ y, long, sigma) == float("inf"), "a block of another length tells nothing"
    assert gain(y.T @ y, one, sigma * torch.nan) == float("inf")
