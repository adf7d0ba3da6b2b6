from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weyl_megatron.watch import spectra


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 99))
def test_sigma_is_that_of_svd(rows: int, cols: int, seed: int) -> None:
    matrix = torch.randn(
        rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    # 64 steps on at most 90 dimensions leave next to nothing of a part in a thousand between two
    # singular values.
    assert spectra.sigma_of_rows(matrix, "w") == pytest.approx(exact, rel=1e-6)
    assert spectra.sigma_of_columns(matrix, "w") == pytest.approx(exact, rel=1e-6)


def test_sigma_of_a_large_random_matrix_in_float32() -> None:
    matrix = torch.randn(1500, 700, generator=torch.Generator().manual_seed(0))
    exact = float(torch.linalg.matrix_norm(matrix.double(), 2))
    assert spectra.sigma_of_rows(matrix, "w") == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    ("matrix", "exact"),
    [
        (torch.zeros(5, 7), 0.0),
        (torch.full((5, 4), 1e-12), 1e-12 * 20**0.5),
        (torch.full((5, 4), 1e12), 1e12 * 20**0.5),
        (torch.eye(6), 1.0),
        (torch.ones(1, 9), 3.0),
        (torch.ones(9, 1), 3.0),
    ],
    ids=["zero", "small", "large", "equal", "one-row", "one-column"],
)
def test_sigma_of_odd_matrices(matrix: torch.Tensor, exact: float) -> None:
    assert spectra.sigma_of_rows(matrix, "w") == pytest.approx(exact, rel=1e-5)
    assert spectra.sigma_of_columns(matrix, "w") == pytest.approx(exact, rel=1e-5)


def test_sigma_of_a_matrix_that_is_not_finite_is_not_a_number() -> None:
    matrix = torch.ones(4, 4)
    matrix[1, 2] = float("inf")
    assert spectra.sigma_of_rows(matrix, "w") != spectra.sigma_of_rows(matrix, "w")


def test_sigma_of_a_product_is_that_of_the_whole_product() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(30, 50, dtype=torch.float64), torch.randn(50, 20, dtype=torch.float64)
    exact = float(torch.linalg.matrix_norm(left @ right, 2))
    assert spectra.sigma_of_product(left, right, "w") == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1), (1, 1)])
def test_a_head_s_spectrum_is_that_of_its_whole_product(heads: int, key_heads: int) -> None:
    torch.manual_seed(1)
    query, key = torch.randn(heads * 8, 40), torch.randn(key_heads * 8, 40)
    found = spectra.head_spectra(query, key, heads, key_heads)
    for head in range(heads):
        q = query[8 * head : 8 * head + 8].double()
        shared = head // (heads // key_heads)
        k = key[8 * shared : 8 * shared + 8].double()
        exact = torch.linalg.svdvals(q.T @ k)
        assert torch.allclose(found[head], exact[:8], rtol=1e-10)
        energy = float(exact[:3].square().sum() / exact.square().sum())
        assert float(spectra.energy_concentration(found, 3)[head]) == pytest.approx(
            energy, rel=1e-12
        )


def test_energy_is_concentrated_where_one_direction_has_it() -> None:
    torch.manual_seed(2)
    query, key = 1e-3 * torch.randn(16, 40), 1e-3 * torch.randn(16, 40)
    query[3], key[3] = torch.randn(40), torch.randn(40)
    assert float(spectra.energy_concentration(spectra.head_spectra(query, key, 1, 1), 1)) > 0.999
    assert float(spectra.energy_concentration(torch.zeros(1, 4), 2)) == 0.0
