from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weyl_megatron.watch.attention import (
    LOW_RANK,
    SPARSE,
    UNIFORM,
    Mode,
    attention_logits,
    attention_map,
    classify,
    classify_numbers,
    effective_rank,
    entropy,
    entropy_bound,
    entropy_minimiser,
    logit_bound,
    map_rank,
    relative_entropy,
    sample_rows,
    stable_rank,
    visible,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def torchs(q: Tensor, k: Tensor, scale: float, causal: bool, bias: Tensor | None) -> Tensor:
    """The weights of torch's attention: what it makes of values that are the identity."""
    keys = k.shape[-2]
    identity = torch.eye(keys, dtype=q.dtype).expand(*q.shape[:-2], keys, keys)
    return F.scaled_dot_product_attention(q, k, identity, bias, is_causal=causal, scale=scale)


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    seen = noise(queries, keys, seed=5) > 0
    seen[:, 0] = True
    none_seen = seen.clone()
    none_seen[-1] = False
    return {
        "none": None,
        "boolean": seen,
        "a query that sees nothing": none_seen,
        "padding": noise(2, 1, 1, keys, seed=6) > -1,
        "bias": 2 * noise(3, queries, keys, seed=7),
        "bias of -inf": torch.zeros(queries, keys).masked_fill(~seen, -math.inf),
        "one row": noise(1, keys, seed=8),
    }


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 12), (12, 5), (1, 1)])
@pytest.mark.parametrize("mask", list(masks(2, 2)))
def test_maps_are_those_of_torch(queries: int, keys: int, mask: str) -> None:
    q, k, bias = noise(2, 3, queries, 4), noise(2, 3, keys, 4, seed=1), masks(queries, keys)[mask]
    rows = sample_rows(queries, 4)
    ours = attention_map(q, k, scale=0.3, rows=rows, causal=False, bias=bias)
    torch.testing.assert_close(ours, torchs(q, k, 0.3, False, bias)[..., rows, :])


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 12), (12, 5), (1, 7), (7, 1)])
def test_causal_maps_are_those_of_torch(queries: int, keys: int) -> None:
    q, k, rows = noise(2, 3, queries, 4), noise(2, 3, keys, 4, seed=1), sample_rows(queries, 4)
    ours = attention_map(q, k, scale=0.5, rows=rows, causal=True)
    torch.testing.assert_close(ours, torchs(q, k, 0.5, True, None)[..., rows, :])
    assert ours.gt(0).sum(-1).eq(visible(rows, keys, True)).all()


def test_causal_with_a_mask_is_both() -> None:
    q, k, bias = noise(8, 4), noise(8, 4, seed=1), noise(8, 8, seed=2)
    both = bias.masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), -math.inf)
    ours = attention_map(q, k, scale=0.5, rows=torch.arange(8), causal=True, bias=bias)
    torch.testing.assert_close(ours, torchs(q, k, 0.5, False, both))


def test_a_query_that_sees_nothing_has_a_row_of_zeros() -> None:
    q, k, bias = noise(6, 4), noise(6, 4, seed=1), masks(6, 6)["a query that sees nothing"]
    ours = attention_map(q, k, scale=0.5, rows=torch.arange(6), causal=False, bias=bias)
    torch.testing.assert_close(ours, torchs(q, k, 0.5, False, bias))
    assert ours[-1].eq(0).all() and entropy(ours)[-1] == 0


def test_half_precision_is_computed_in_float32() -> None:
    q, k, rows = noise(6, 4).bfloat16(), noise(6, 4, seed=1).bfloat16(), torch.arange(6)
    ours = attention_map(q, k, scale=0.5, rows=rows, causal=True)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(
        ours, attention_map(q.float(), k.float(), scale=0.5, rows=rows, causal=True)
    )


def test_sampled_rows_are_spread_and_the_last_is_among_them() -> None:
    assert sample_rows(8, 4).tolist() == [1, 3, 5, 7]
    assert sample_rows(10, 3).tolist() == [2, 5, 9]
    assert sample_rows(3, 64).tolist() == [0, 1, 2]
    for length in range(1, 40):
        rows = sample_rows(length, 7)
        assert len(set(rows.tolist())) == min(7, length) and rows[-1] == length - 1
    with pytest.raises(ValueError, match=r"got 0 of 8 positions, it takes"):
        sample_rows(8, 0)


def test_visible_keys_count_from_the_first() -> None:
    rows = torch.tensor([0, 3, 9])
    assert visible(rows, 6, True).tolist() == [1, 4, 6]
    assert visible(rows, 6, False).tolist() == [6, 6, 6]


def test_entropy_of_known_rows() -> None:
    rows = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(entropy(rows), torch.tensor([math.log(4), 0, math.log(2)]))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=80).filter(lambda x: max(map(abs, x)) > 1e-3),
    st.floats(1e-3, 60),
)
def test_no_scores_fall_below_the_bound(direction: list[float], sigma: float) -> None:
    scores = torch.tensor(direction, dtype=torch.float64)
    scores = scores / scores.norm() * sigma
    bound = entropy_bound(torch.tensor(sigma), torch.tensor(len(direction)))
    assert entropy(scores.softmax(-1)) >= bound - 1e-6  # σ is float32


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 200), st.integers(1, 300))
def test_the_minimiser_reaches_the_bound(sigma: float, keys: int) -> None:
    scores = entropy_minimiser(sigma, keys)
    assert float(scores.norm()) == pytest.approx(sigma if keys > 1 else 0, rel=1e-9)
    bound = entropy_bound(torch.tensor(sigma, dtype=torch.float64), torch.tensor(keys))
    assert float(entropy(scores.softmax(-1))) == pytest.approx(float(bound), abs=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 2.0, 8.0])
def test_descent_does_not_get_below_the_bound(sigma: float) -> None:
    """An adversary: projected gradient descent on the entropy, from many starts."""
    scores = noise(16, 10).double()
    for _ in range(250):
        scores = (scores / scores.norm(dim=-1, keepdim=True) * sigma).requires_grad_()
        (gradient,) = torch.autograd.grad(entropy(scores.softmax(-1)).sum(), scores)
        length = gradient.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        scores = scores.detach() - 0.05 * sigma * gradient / length
    scores = scores / scores.norm(dim=-1, keepdim=True) * sigma
    least = float(entropy(scores.softmax(-1)).min())
    bound = float(entropy_bound(torch.tensor(sigma), torch.tensor(10)))
    assert bound - 1e-6 <= least <= bound + 0.02


def test_the_bound_of_attention_by_its_factors() -> None:
    """σ from W and X, as in the theorem, with a causal map: every row against the bound for the
    keys that it sees.
    """
    x, wq, wk = noise(24, 16), noise(8, 16, seed=1) / 4, noise(8, 16, seed=2) / 4
    rows, scale = torch.arange(24), 8**-0.5
    attention = attention_map(x @ wq.T, x @ wk.T, scale=scale, rows=rows, causal=True)
    sigma = scale * torch.linalg.matrix_norm(wq.T @ wk, 2) * torch.linalg.matrix_norm(x, 2) ** 2
    assert (
        entropy(attention).double() >= entropy_bound(sigma, visible(rows, 24, True)) - 1e-6
    ).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_no_logit_exceeds_its_bound(causal: bool, with_bias: bool) -> None:
    q, k = noise(2, 3, 24, 8), noise(2, 3, 24, 8, seed=1)
    bias = noise(3, 24, 24, seed=2) if with_bias else None
    options = {"scale": -0.7, "bias": bias}
    logits = attention_logits(q, k, rows=torch.arange(24), causal=causal, **options)
    bound = logit_bound(q, k, **options)
    assert bound.shape == (2, 3) and (logits.amax((-2, -1)) <= bound).all()
    parallel = logit_bound(q, q, scale=2.0)
    longest = attention_logits(q, q, scale=2.0, rows=torch.arange(24), causal=False)
    torch.testing.assert_close(longest.amax((-2, -1)), parallel)  # reached


def test_the_bound_at_its_ends() -> None:
    sigma = torch.tensor([0.0, 5.0, math.inf])
    bound = entropy_bound(sigma.unsqueeze(-1), torch.tensor([1, 2, 100]))
    torch.testing.assert_close(
        bound[0], torch.tensor([0, math.log(2), math.log(100)], dtype=torch.float64)
    )
    assert bound[1:, 0].eq(0).all() and bound[2].eq(0).all()
    assert bool(entropy_bound(torch.tensor(math.nan), torch.tensor(4)).isnan())


def test_ranks_of_known_spectra() -> None:
    spectra = torch.tensor([[1.0, 1, 1, 1], [3, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]])
    expected = torch.tensor([4, 1, 2, 0], dtype=torch.float64)
    torch.testing.assert_close(effective_rank(spectra), expected)
    torch.testing.assert_close(stable_rank(spectra), expected)
    values = torch.tensor([2.0, 1.0])  # shares 0.8 and 0.2
    assert float(effective_rank(values)) == pytest.approx(
        math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    )
    assert float(stable_rank(values)) == pytest.approx(1.25)
    for factor in (1e-30, 1e30):
        torch.testing.assert_close(effective_rank(spectra * factor), expected)
        torch.testing.assert_close(stable_rank(spectra * factor), expected)


@pytest.mark.parametrize("shape", [(2, 3, 8, 20), (8, 5), (6, 6)])
def test_a_maps_rank_is_that_of_its_singular_values(shape: tuple[int, ...]) -> None:
    attention = (3 * noise(*shape)).softmax(-1)
    torch.testing.assert_close(
        map_rank(attention),
        effective_rank(torch.linalg.svdvals(attention.double())),
        rtol=1e-9,
        atol=0,
    )


def test_one_map_that_is_not_finite_leaves_the_others() -> None:
    maps = torch.eye(8).repeat(3, 1, 1)
    maps[1, 2, 3] = math.nan
    rank, mode = map_rank(maps), classify(maps, torch.full((8,), 8))
    assert rank[1].isnan() and rank[0] == rank[2] == pytest.approx(8)
    assert mode.tolist() == [Mode.BENIGN, Mode.NORMAL, Mode.BENIGN]


T = 64
ROWS = torch.arange(T)


def constructed(causal: bool) -> dict[str, tuple[Tensor, Mode]]:
    hidden = torch.ones(T, T).triu(1).bool() if causal else torch.zeros(T, T, dtype=torch.bool)

    def softmax(logits: Tensor) -> Tensor:
        return logits.masked_fill(hidden, -math.inf).softmax(-1)

    identity = torch.eye(T)
    return {
        "no scores": (softmax(torch.zeros(T, T)), Mode.UNIFORM),
        "scores of deviation 0.1": (softmax(0.1 * noise(T, T)), Mode.UNIFORM),
        "scores of deviation 1": (softmax(noise(T, T)), Mode.NORMAL),
        "scores of deviation 3": (softmax(3 * noise(T, T)), Mode.NORMAL),
        "identity": (identity, Mode.BENIGN),
        "nearly the identity": (softmax(12 * identity + noise(T, T)), Mode.BENIGN),
        "the key before": (identity[(ROWS - 1).clamp(min=0)], Mode.BENIGN),
        "one key": (softmax(12 * identity[:1].expand(T, T)), Mode.MALIGNANT),
        "three keys": (identity[(ROWS % 3).minimum(ROWS)], Mode.MALIGNANT),
        "a window of four": (
            softmax(-1e9 * ((ROWS[:, None] - ROWS).abs() >= 4).float()),
            Mode.NORMAL,
        ),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", list(constructed(False)))
def test_the_modes_of_constructed_maps(name: str, causal: bool) -> None:
    attention, mode = constructed(causal)[name]
    keys = visible(ROWS, T, causal)
    assert classify(attention, keys).item() == mode
    relative = float(relative_entropy(attention, keys))
    assert classify_numbers(relative, float(map_rank(attention)), T) == mode


def test_modes_come_in_batches_and_from_some_of_the_rows() -> None:
    rows = sample_rows(T, 16)
    maps = torch.stack([attention for attention, _ in constructed(True).values()])[:, rows]
    expected = [int(mode) for _, mode in constructed(True).values()]
    assert classify(maps, visible(rows, T, True)).tolist() == expected
    assert classify(maps.unsqueeze(1), visible(rows, T, True)).shape == (len(expected), 1)


def test_thresholds_are_part_of_their_mode() -> None:
    assert classify_numbers(SPARSE, LOW_RANK * 64, 64) == Mode.MALIGNANT
    assert classify_numbers(SPARSE, LOW_RANK * 64 + 0.01, 64) == Mode.BENIGN
    assert classify_numbers(SPARSE + 0.01, 1, 64) == Mode.NORMAL
    assert classify_numbers(UNIFORM, 64, 64) == Mode.UNIFORM
    assert classify_numbers(math.nan, math.nan, 64) == Mode.NORMAL


@pytest.mark.parametrize("size", [1e4, 1e15])
def test_huge_scores_leave_numbers(size: float) -> None:
    q, k, rows = size * noise(2, 16, 8), size * noise(2, 16, 8, seed=1), torch.arange(16)
    attention = attention_map(q, k, scale=1.0, rows=rows, causal=True)
    assert (
        attention.isfinite().all()
        and entropy(attention).isfinite().all()
        and map_rank(attention).isfinite().all()
    )
    assert entropy(attention).max() < 0.1


def test_maps_of_more_rows_than_keys_are_measured_against_the_keys() -> None:
    attention = torch.eye(4).repeat(16, 1)  # rank 4, all there can be
    assert classify(attention, torch.full((64,), 4)).item() == Mode.BENIGN


def test_one_key_has_no_mode_of_its_own() -> None:
    rows = torch.arange(1)
    attention = attention_map(noise(1, 4), noise(1, 4), scale=0.5, rows=rows, causal=True)
    assert entropy(attention).item() == 0 and map_rank(attention).item() == 1
    assert classify(attention, visible(rows, 1, True)).item() == Mode.NORMAL
