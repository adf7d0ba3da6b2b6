from __future__ import annotations

from math import inf
from pathlib import Path

import pytest
import torch

from weyl_megatron import AdamW2
from weyl_megatron.demo.data import load_corpus, sequences, training_offsets
from weyl_megatron.demo.model import GPT, GPTConfig
from weyl_megatron.reference import exact_sigma
from weyl_megatron.rule import (
    ADAPTER_TAU,
    BALANCED_FLOOR,
    HIDDEN_BUDGET,
    IO_TAU,
    balanced_floor,
    clipped_rates,
    random_sigma,
    xavier_std,
)

STEPS, TAU = 150, 0.01


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_rate_is_the_scheduled_one_or_what_the_rule_allows() -> None:
    rates = clipped_rates(
        vector(0.1, 0.1), vector(0.01, 0.01), vector(0, 0), vector(100, 1), vector(2, 2)
    )
    assert rates.tolist() == pytest.approx([0.1, 0.005])


def test_nothing_bounds_an_update_of_zero_not_even_of_a_matrix_of_zero() -> None:
    assert clipped_rates(
        vector(0.1, 0.1), vector(0.01, inf), vector(0, 0), vector(0, 1), vector(0, 3)
    ).tolist() == [
        0.1,
        0.1,
    ]


def test_the_floor_stands_in_for_a_small_sigma() -> None:
    assert clipped_rates(
        vector(1), vector(0.01), vector(4), vector(0), vector(2)
    ).item() == pytest.approx(0.02)


def test_the_constants_of_balanced_are_the_page_s() -> None:
    page = (Path(__file__).parents[1] / "docs" / "tau.md").read_text(encoding="utf-8")
    assert (HIDDEN_BUDGET, IO_TAU, ADAPTER_TAU, BALANCED_FLOOR) == (0.144, 0.1, 0.01, 1.0)
    assert f"τ = {HIDDEN_BUDGET} / (number of hidden matrices)" in page
    assert f"positions and head have τ = {IO_TAU}" in page
    assert f"has a τ of at least {ADAPTER_TAU}" in page
    assert f"{HIDDEN_BUDGET} /" in str(AdamW2.__doc__) and f"get {IO_TAU}," in str(AdamW2.__doc__)
    assert f"at least {BALANCED_FLOOR} times that of a Xavier matrix" in page
    xavier = (2 / 24) ** 0.5 * (16**0.5 + 8**0.5)
    assert balanced_floor(16, 8) == pytest.approx(BALANCED_FLOOR * xavier)


def test_random_sigma_is_about_that_of_a_random_matrix() -> None:
    torch.manual_seed(0)
    sigma = exact_sigma(torch.randn(256, 64) * xavier_std(256, 64))
    assert random_sigma(256, 64, xavier_std(256, 64)) == pytest.approx(sigma, rel=0.05)


def test_rule_1_holds_by_exact_svd_after_every_step_of_a_training_run() -> None:
    """A GPT on the standard library's sources, without warmup, at a rate where the clip works all
    the time.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    optimizer = AdamW2(
        model.named_parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, tau=TAU
    )
    corpus = load_corpus()
    offsets = training_offsets(corpus, STEPS, 8, 64, seed=0)
    exact = {name: exact_sigma(p.detach()) for name, p in matrices.items()}
    errors: list[float] = []
    clipped = certified = 0
    for step in range(STEPS):
        optimizer.zero_grad()
        model(*sequences(corpus.train, offsets[step], 64)).backward()
        optimizer.step()
        for name, entry in optimizer.stats().items():
            state = optimizer.state[matrices[name]]
            count = float(state["step"])
            v_hat = state["exp_avg_sq"] / (1 - 0.95**count)
            update = (state["exp_avg"] / (1 - 0.9**count)) / (v_hat.sqrt() + 1e-8)
            sigma_update = exact_sigma(update)
            if (
                entry.certified
            ):  # bounds, from the right sides, and a clip that exact arithmetic would not have made
                certified += 1
                assert entry.sigma_weight <= exact[name] and entry.sigma_update >= sigma_update * (
                    1 - 1e-6
                )
                assert not entry.clipped and entry.lr * sigma_update <= TAU * exact[name]
            else:
                errors.append(1 - entry.sigma_update / sigma_update)
                errors.append(1 - entry.sigma_weight / exact[name])
            clipped += entry.clipped
            after = exact_sigma(matrices[name].detach())
            # An estimate of σ₁(U) that is short by e lets a clipped matrix move by τ / (1 − e); the
            # 1e-5 is float32's.
            allowed = 1 + TAU * max(1.0, sigma_update / entry.sigma_update)
            assert after <= allowed * exact[name] * (1 + 1e-5), (step, name)
            exact[name] = after
    error = torch.tensor(errors).abs()
    median, p95 = error.median().item(), error.quantile(0.95).item()
    print(
        f"σ₁ estimates over {STEPS} steps, {len(matrices)} matrices: median error {median:.4%}, "
        f"95th percentile {p95:.3%}, largest {error.max().item():.1%}; "
        f"{clipped / (STEPS * len(matrices)):.0%} of matrix-steps clipped, "
        f"{certified / (STEPS * len(matrices)):.0%} settled by the certificate"
    )
    assert median < 0.002 and p95 < 0.03
    assert clipped > 0.2 * STEPS * len(matrices)
