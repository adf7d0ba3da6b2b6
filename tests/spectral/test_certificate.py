"""The certificate against an adversary who knows it, judged by exact singular values in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weyl_megatron import AdamW2
from weyl_megatron.spectral.certificate import Certificate

EPS = 1e4  # with this ε and no averaging U is G / ε: the adversary chooses the update itself
FLOOR_STD = 1e-3


def sigma(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


def update(kind: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """An update of Frobenius norm 1 that is meant to make the bound on σ₁(W) wrong."""
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    if kind == "against the top":  # takes all that ‖U‖_F allows from σ₁(W)
        move = torch.outer(left[:, 0], right[0])
    elif kind == "against all":
        move = left @ right
    elif kind == "one row":
        move = torch.zeros_like(weight)
        move[0] = right[0]
    else:
        move = torch.randn(weight.shape, generator=generator)
    return move / move.norm()


KINDS = ("against the top", "against all", "one row", "random")


class Run:
    """One matrix under AdamW2 whose updates are chosen freely; every certified step is checked.

    ``decay`` is what a step at the scheduled rate takes from W by weight decay, ``scale`` is W's
    size.
    """

    def __init__(
        self, shape: tuple[int, int], seed: int, tau: float, decay: float, scale: float = 1.0
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(shape, generator=self.generator) * scale)
        # So that the updates are small beside 1, which U = G / (|G| + ε) cannot exceed.
        rate = 100 * scale
        self.optimizer = AdamW2(
            [("w", self.weight)],
            lr=rate,
            betas=(0.0, 0.0),
            eps=EPS,
            weight_decay=decay / rate,
            tau=tau,
            floor_std=FLOOR_STD,
        )
        self.tau = tau
        self.certified = 0

    def step(self, kind: str, share: float) -> None:
        """Step by an update whose α ‖U‖_F is ``share`` of what the certificate now allows; judge
        what it did.
        """
        matrix_groups = list(self.optimizer._matrix_groups)
        lower = (
            float(matrix_groups[0].certificate.lower)
            if matrix_groups
            else sigma(self.weight.detach())
        )
        rate = self.optimizer.param_groups[0]["lr"]
        size = share * self.tau * max(lower, 1e-12) / rate
        move = update(kind, self.weight.detach(), self.generator) * size
        self.weight.grad = move * EPS / (1 - move.abs())  # U = G / (|G| + ε)
        before = self.weight.detach().clone()
        self.optimizer.step()
        entry = self.optimizer.stats()["w"]
        state = self.optimizer.state[self.weight]
        exact = sigma(state["exp_avg"].double() / (state["exp_avg_sq"].double().sqrt() + EPS))
        if entry.certified:
            self.certified += 1
            floor = FLOOR_STD * (before.shape[0] ** 0.5 + before.shape[1] ** 0.5)
            allowed = self.tau * max(sigma(before), floor)
            assert rate * exact <= allowed, (
                "a step was skipped that exact arithmetic would have clipped"
            )
            assert entry.sigma_weight <= sigma(before)
            assert entry.sigma_update >= exact * (1 - 1e-6)  # float32 sums
            assert not entry.clipped and entry.lr == rate
        bound = float(next(iter(self.optimizer._matrix_groups)).certificate.lower)
        assert bound <= sigma(self.weight.detach()), "the bound is above σ₁(W)"


shares = st.sampled_from([0.02, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0, 1.001, 3.0])
steps = st.lists(st.tuples(st.sampled_from(KINDS), shares), min_size=4, max_size=25)


@pytest.mark.parametrize("kernel", ["torch", "cpu"])
def test_no_adversary_gets_a_step_skipped_that_exact_arithmetic_would_clip(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEYL_MEGATRON_KERNEL", kernel)
    certified = [0, 0]

    @settings(max_examples=150)
    @given(
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        st.integers(0, 99),
        st.sampled_from([0.01, 0.1, 0.5]),
        st.sampled_from([0.0, 0.001, 0.3, 0.9]),
        st.sampled_from([1e-6, 1.0, 1e4]),
        steps,
    )
    def attack(
        shape: tuple[int, int],
        seed: int,
        tau: float,
        decay: float,
        scale: float,
        moves: list[tuple[str, float]],
    ) -> None:
        run = Run(shape, seed, tau, decay, scale)
        run.step("random", 0.5)
        for kind, share in moves:
            run.step(kind, share)
        certified[0] += run.certified
        certified[1] += len(moves)

    attack()
    print(f"{certified[0]} of {certified[1]} steps of the adversary were certified")
    assert certified[0] > 0.2 * certified[1], (
        "hardly a step was certified: the attack shows nothing"
    )


def test_the_attack_breaks_a_bound_that_forgets_what_was_applied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved = Certificate.moved

    def forgetful(self: Certificate, rates: Tensor, *others: Tensor) -> None:
        moved(self, torch.zeros_like(rates), *others)

    monkeypatch.setattr(Certificate, "moved", forgetful)
    run = Run((6, 5), seed=0, tau=0.5, decay=0.0)
    run.step("random", 0.5)

    def attack() -> None:
        for share in [0.5, 0.52, 0.54, 0.56, 0.58] * 4:
            run.step("against the top", share)

    with pytest.raises(AssertionError, match="the bound is above"):
        attack()


@pytest.mark.parametrize("kernel", ["torch", "cpu"])
@pytest.mark.parametrize("factor", [0.1, 0.999, 1.1])
def test_weights_that_others_change_are_not_trusted(
    kernel: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even through ``.data``, which leaves no trace but the values: DeepSpeed loads checkpoints
    that way.
    """
    monkeypatch.setenv("WEYL_MEGATRON_KERNEL", kernel)
    run = Run((7, 5), seed=1, tau=0.1, decay=0.0)
    for _ in range(3):
        run.step("random", 0.3)
    assert run.optimizer.stats()["w"].certified
    run.weight.data.mul_(factor)
    run.weight.grad = torch.ones(7, 5)
    run.optimizer.step()
    entry = run.optimizer.stats()["w"]
    assert not entry.certified


def test_an_update_larger_than_expected_is_taken_back_and_clipped() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(9, 6))
    optimizer = AdamW2(
        [("w", weight)], lr=0.1, betas=(0.0, 0.0), eps=EPS, weight_decay=0.1, tau=0.05
    )
    direction = torch.randn(9, 6)
    for _ in range(3):
        weight.grad = direction
        optimizer.step()
    assert optimizer.stats()["w"].certified
    before = weight.detach().clone()
    weight.grad = direction * 100 * EPS
    optimizer.step()
    entry = optimizer.stats()["w"]
    state = optimizer.state[weight]
    moved = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + EPS)
    expected_rate = 0.05 * sigma(before) / sigma(moved)
    assert entry.clipped and entry.lr == pytest.approx(expected_rate, rel=1e-3)
    expected = before * (1 - entry.lr * 0.1) - entry.lr * moved
    # The step at the scheduled rate was made and taken back: two more roundings.
    assert torch.allclose(
        weight,
        expected,
        rtol=0,
        atol=4 * torch.finfo(torch.float32).eps * float(before.abs().max()),
    )


def test_a_settled_matrix_costs_no_product_and_a_stale_one_iterates_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WEYL_MEGATRON_KERNEL", "torch")
    from weyl_megatron.spectral.power import TorchProducts

    counted = {"products": 0, "iterations": 0}
    multiply, orthonormalize = TorchProducts.multiply, TorchProducts.orthonormalize

    def counting_multiply(self, operand, table, mask):  # type: ignore[no-untyped-def]
        counted["products"] += sum(bool(mask[tile.matrix]) for tile in table.tiles)
        multiply(self, operand, table, mask)

    def counting_orthonormalize(self, operand, batch, mask, more, sigma, gain):  # type: ignore[no-untyped-def]
        counted["iterations"] += int(mask.sum()) if operand == 1 else 0
        orthonormalize(self, operand, batch, mask, more, sigma, gain)

    monkeypatch.setattr(TorchProducts, "multiply", counting_multiply)
    monkeypatch.setattr(TorchProducts, "orthonormalize", counting_orthonormalize)
    run = Run((8, 6), seed=2, tau=0.1, decay=0.0)
    run.step("random", 0.2)
    assert counted["iterations"] == 12  # nothing is known
    counted.update(products=0, iterations=0)
    for _ in range(5):
        run.step("random", 0.02)
    assert counted == {"products": 0, "iterations": 0}
    run.step("random", 3.0)
    assert counted["iterations"] in (1 + 5, 2 + 5)  # the last one only if the one before it gained
    counted.update(products=0, iterations=0)
    run.step("random", 3.0)
    assert counted["iterations"] == 2
