"""The small algebra of many matrices at once: every case beside the others, as by itself; the calls
counted; the same on the path of devices, on which the host looks at nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import inf, isnan, nan
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weyl_megatron.spectral import MatrixSpec, PowerIteration, blocks, power, ritz
from weyl_megatron.spectral.blocks import Blocks
from weyl_megatron.spectral.power import TorchProducts
from weyl_megatron.spectral.tiles import Block, tiles_of_range

#: (rows, cols): odd and narrow ones beside wide ones, some alike.
SHAPES = [(40, 50), (1, 50), (50, 1), (2, 3), (40, 50), (3, 50), (17, 50), (40, 9), (5, 2), (1, 1)]

#: Matrices that a float32 iteration has to take a second look at, or cannot take.
SCALES = [1.0, 1e-30, 1e30, 0.0, inf, nan]


class Case:
    """Whole matrices, whose products are made in one pass, and the results of an iteration."""

    def __init__(
        self,
        matrices: Sequence[Tensor],
        names: Sequence[int] | None = None,
        width: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.matrices, count = matrices, len(matrices)
        names = range(count) if names is None else names
        specs = [MatrixSpec(f"w{n}", *m.shape) for n, m in zip(names, matrices, strict=True)]
        batches = [range(count)]
        self.blocks = Blocks(specs, [], (width,), batches, False, torch.device("cpu"), dtype)
        self.blocks.load(0)
        self.operand = self.blocks.operands[0]
        self.products = TorchProducts(self.blocks, [])
        self.mask = torch.ones(count, dtype=torch.uint8)
        self.sigma, self.gain = torch.full((2, count), -1.0, dtype=torch.float64)

    def multiply(self) -> None:
        self.blocks.clear(0)
        for k, matrix in enumerate(self.matrices):
            z, gram = self.operand.image(k)
            y = matrix @ self.x(k).T  # a copy: MKL rounds by how an address is aligned
            z.copy_(y.T @ matrix)
            gram.copy_(y.T @ y)

    def iterate(self, count: int = 1) -> None:
        for number in range(count):
            self.multiply()
            more = self.mask * (number < count - 1)
            self.products.orthonormalize(0, 0, self.mask, more, self.sigma, self.gain)

    def x(self, number: int) -> Tensor:
        return self.operand.block(number).clone()


def random(shapes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def equal(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.nan_to_num(7), second.nan_to_num(7))


@pytest.mark.parametrize("width", [4, 8, 16])
def test_blocks_of_any_width_and_matrices_of_any_shape_come_to_the_exact_sigma(
    path: str, width: int
) -> None:
    matrices = random(SHAPES, torch.float64)
    case = Case(matrices, width=width, dtype=torch.float64)
    case.iterate(200)
    for k, matrix in enumerate(matrices):
        exact = float(torch.linalg.matrix_norm(matrix, 2))
        # Rounding: eps of float64 is 2e-16, sums have 50 terms.
        assert case.sigma[k].item() == pytest.approx(exact, rel=1e-12)
        assert case.sigma[k].item() <= exact * (1 + 1e-13)
        x = case.x(k)
        assert torch.allclose(x @ x.T, torch.eye(len(x)).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [4, 16])
def test_on_a_cpu_a_matrix_gets_the_bits_that_it_gets_alone(
    width: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies on ranks that hold other matrices beside it stay equal."""
    monkeypatch.setattr(blocks, "_FEW", 1 << 20)  # many would be kept in half the digits
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrices = random([(20, 3072), (20, 3072), (33, 3072), (20, 7), (1, 3072), (20, 3072)])
        matrices[2] *= 1e-30
        matrices[5] *= inf
        many = Case(matrices, width=width)
        many.iterate(3)
        for k, matrix in enumerate(matrices):
            alone = Case([matrix], [k], width)
            alone.iterate(3)
            assert equal(alone.sigma, many.sigma[k : k + 1])
            assert equal(alone.gain, many.gain[k : k + 1])
            assert equal(alone.x(0), many.x(k))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("odd", SCALES, ids=str)
def test_nothing_leaks_from_a_matrix_that_fails_to_those_beside_it(path: str, odd: float) -> None:
    matrices = random([(20, 30)] * 3)
    healthy = Case(matrices)
    matrices = [matrices[0], matrices[1] * odd, matrices[2]]
    case = Case(matrices)
    for each in (healthy, case):
        each.iterate(12)
    for k in (0, 2):
        # What a batched product rounds may hang on what else is in it: a few eps of float64.
        assert case.sigma[k].item() == pytest.approx(healthy.sigma[k].item(), rel=1e-14)
        assert torch.allclose(case.x(k).abs(), healthy.x(k).abs(), rtol=0, atol=1e-6)
    sigma = case.sigma[1].item()
    if odd < inf:
        exact = float(torch.linalg.matrix_norm(matrices[1].double(), 2))
        assert exact * 0.998 <= sigma <= exact * (1 + 1e-5)  # the last 0.2 % take more iterations
    else:
        assert isnan(sigma)
    assert case.x(1).isfinite().all(), "the next step could not recover"


@pytest.mark.parametrize(
    ("scale", "more", "length"),
    [
        (1.0, True, 1.0),
        (0.0, True, 1e28),
        (0.0, False, 1.0),
        (inf, True, 1e-28),
        (nan, True, 1e-28),
        (nan, False, 1.0),
        (1e-30, True, 1e28),  # σ₁² vanishes
        (1e30, True, 1e-28),  # overflows
    ],
    ids=str,
)
def test_what_fails_is_tried_once_more_at_another_length(
    path: str, scale: float, more: bool, length: float
) -> None:
    matrix = random([(20, 30)])[0] * scale
    case = Case([matrix, random([(20, 30)])[0]])
    case.multiply()
    goes_on = case.mask * more
    case.products.orthonormalize(0, 0, case.mask, goes_on, case.sigma, case.gain)
    assert case.x(0).double().norm(dim=1).tolist() == pytest.approx([length] * 4, rel=1e-5)
    assert case.gain[0].isinf() == (scale != 1.0)
    assert 0 < case.gain[1] < 1
    if length == 1.0:
        return
    case.multiply()
    case.products.orthonormalize(0, 0, case.mask, goes_on, case.sigma, case.gain)
    assert case.gain[0].isinf(), "a block of another length tells nothing"
    # Where products of rows of length 1 would overflow or vanish: 1 / σ₁.
    length = min(1 / case.sigma[0].item(), 1e38) if scale in (1e-30, 1e30) else 1.0
    assert case.x(0).double().norm(dim=1).tolist() == pytest.approx([length] * 4, rel=1e-5)


def test_rows_with_nothing_new_in_them_are_the_old_ones(path: str) -> None:
    """Of rank 1 and 2, with a row of Z that is zero; beside rows that are all new, and others that
    are so by a little.
    """
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 5, 4, 30, generator=generator, dtype=torch.float64)
    z[1, 1:] = z[1, :1] * (1 + torch.arange(1, 4)[:, None])
    z[2, 2:] = z[2, :1] - 3 * z[2, 1:2] + 1e-8 * z[2, 2:]
    z[3, 0] = 0
    z[4, 1:] = z[4, :1] + 1e-4 * z[4, 1:]
    old = torch.linalg.qr(noise.mT).Q.mT.contiguous()
    ones, more = torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    new = ritz.next_block(z, old, ones, more)
    rows = [
        z[0],
        torch.cat([z[1, :1], old[1, 1:]]),
        torch.cat([z[2, :2], old[2, 2:]]),
        torch.cat([old[3, :1], z[3, 1:]]),
        z[4],
    ]
    expected = torch.linalg.qr(torch.stack(rows).mT).Q
    # Two projections leave eps of float64 of the rows before; a direction that is a 1e-4th of its
    # vector is known to 1e4 eps.
    identity = torch.eye(4, dtype=torch.float64).expand(5, 4, 4)
    assert torch.allclose(new @ new.mT, identity, rtol=0, atol=1e-14)
    assert torch.allclose((new @ expected).abs(), identity, rtol=0, atol=1e-11)  # but for its sign


def test_no_row_is_longer_than_float32_takes(path: str) -> None:
    z = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, more = torch.tensor([1.0, 1e-60], dtype=torch.float64), torch.ones(2, dtype=torch.bool)
    lengths = ritz.next_block(z, z.flip(1), sigma, more).norm(dim=2)
    assert lengths.flatten().tolist() == pytest.approx([1.0] * 4 + [1e38] * 4, rel=1e-12)


def test_both_paths_span_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Case(random(SHAPES), width=8)
    seen.iterate(3)
    monkeypatch.setattr(ritz, "is_seen", lambda tensor: False)
    monkeypatch.setattr(power, "is_seen", lambda tensor: False)
    blind = Case(random(SHAPES), width=8)
    blind.iterate(3)
    # float32 products of the same vectors, but for their signs, and eigenvalues of the sums.
    assert torch.allclose(seen.sigma, blind.sigma, rtol=1e-6)
    assert torch.equal(seen.gain.isinf(), blind.gain.isinf())
    assert torch.allclose(seen.gain, blind.gain, rtol=0, atol=1e-5)


def test_what_is_masked_is_left_alone(path: str) -> None:
    matrices = random([(20, 30), (20, 30), (9, 30), (20, 5)])
    everything, case = Case(matrices), Case(matrices)
    everything.iterate()
    case.mask[0] = case.mask[3] = 0
    before = [case.x(k) for k in range(4)]
    case.iterate()
    assert case.sigma.tolist() == [-1.0, *everything.sigma[1:3].tolist(), -1.0]
    assert case.gain.tolist() == [-1.0, *everything.gain[1:3].tolist(), -1.0]
    for k in range(4):
        expected = everything.x(k) if k in (1, 2) else before[k]
        assert torch.allclose(case.x(k), expected, rtol=0, atol=1e-6)
        assert k in (1, 2) or torch.equal(case.x(k), expected)


class Calls(TorchDispatchMode):
    """Counts what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


LINALG = "_linalg_eigh", "linalg_qr", "linalg_cholesky_ex", "_local_scalar_dense"


def counted(layers: int) -> Counter[str]:
    matrices = random([(30, 40), (40, 30), (3, 40)] * layers)
    case = Case(matrices)
    case.iterate()  # which makes the views
    case.multiply()
    with Calls() as calls:
        case.products.orthonormalize(0, 0, case.mask, case.mask, case.sigma, case.gain)
    return calls.counted


def test_calls_for_three_matrices_are_those_for_twelve(path: str) -> None:
    few, many = counted(1), counted(4)
    assert {name: few[name] for name in LINALG} == {name: many[name] for name in LINALG}
    # For blocks of 3 and of 4 vectors, three each; without a look at values a basis takes none.
    assert few["_linalg_eigh"] == 2 * (3 if path == "host" else 2)
    if path == "device":
        views = "view", "as_strided", "select", "slice", "unbind", "t", "detach", "alias"
        for calls in (few, many):
            for name in views:
                del calls[name]
        assert few == many
        assert few["linalg_qr"] == few["_local_scalar_dense"] == 0


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the host looks at a value")

    with monkeypatch.context() as patch:
        patch.setattr(ritz, "is_seen", lambda tensor: False)
        patch.setattr(power, "is_seen", lambda tensor: False)
        for name in ("item", "tolist", "cpu", "numpy", "nonzero"):
            patch.setattr(Tensor, name, refuse)
        for name in ("__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(Tensor, name, refuse)
        yield


def test_on_a_device_the_host_looks_at_nothing(request: pytest.FixtureRequest) -> None:
    case = Case([*random(SHAPES), torch.full((6, 50), nan), torch.zeros(6, 50)])
    case.iterate()
    case.multiply()
    request.getfixturevalue("blind")
    case.products.orthonormalize(0, 0, case.mask, case.mask, case.sigma, case.gain)


def test_many_matrices_in_float64_come_to_the_exact_sigma_over_tiles(path: str) -> None:
    matrices = random([*SHAPES, (64, 64), (64, 64)], torch.float64)
    specs = [MatrixSpec(f"w{number}", *m.shape) for number, m in enumerate(matrices)]
    tiles = [
        tile
        for number, m in enumerate(matrices)
        for tile in tiles_of_range(
            [Block(number, 0, 0, *m.shape, 0, 0)], m.shape[1], 0, m.numel(), 0, number
        )
    ]
    iteration = PowerIteration(specs, tiles, iters=200, dtype=torch.float64)
    sigmas = iteration.sigmas([[m.flatten() for m in matrices]])[0]
    exact = torch.stack([torch.linalg.matrix_norm(m, 2) for m in matrices])
    assert torch.allclose(sigmas, exact, rtol=1e-12, atol=0)
