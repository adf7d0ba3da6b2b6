"""Steps that the certificate is sure of beforehand, in which no iteration is launched: Rule 1 holds
whatever comes. Under Triton's interpreter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tests import tolerances
from tests.kernels.interpreter import few_iterations, needs_interpreter, quick_interpreter
from weyl_megatron import AdamW2
from weyl_megatron.device_step import DeviceStep
from weyl_megatron.kernels.choice import VARIABLE
from weyl_megatron.spectral.certificate import SLACK
from weyl_megatron.spectral.horizon import Steps

pytestmark = needs_interpreter

BETAS, TAU = (0.9, 0.95), 0.02


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, "triton")
    with quick_interpreter(), tolerances.every_iteration(), few_iterations():
        yield


class Run:
    """Two matrices that are far from a clip."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(self.noise(shape) * 0.1) for shape in ((8, 10), (6, 9))]
        named = [(f"w{number}", param) for number, param in enumerate(self.params)]
        self.optimizer = AdamW2(named, lr=1e-5, betas=BETAS, tau=TAU, weight_decay=0.1)

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def step(self, grads: list[Tensor] | None = None, lr: float = 1e-5) -> None:
        for number, param in enumerate(self.params):
            param.grad = self.noise(param.shape) if grads is None else grads[number].clone()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    @property
    def device_step(self) -> DeviceStep:
        (group,) = self.optimizer._matrix_groups
        assert isinstance(group._step, DeviceStep)
        return group._step

    @property
    def was_sure(self) -> bool:
        """Whether the last step launched no iteration."""
        return self.device_step._is_all_sure

    def until_sure(self) -> None:
        for _ in range(8):
            self.step()
        assert self.was_sure and self.optimizer.stats()["w0"].certified

    def largest_sure_rate(self) -> float:
        """Return a rate a little below which the next step is sure."""
        step = self.device_step
        horizon, (told, *later) = copy.copy(step._horizon), step._told
        horizon._counted = horizon._counted.clone()  # which it counts in place
        horizon.read(told.bounds[0], told.bounds[1], told.step)
        for each in later:
            horizon.follow(each.step)
        last: Steps = step._step
        norm = horizon._next_squares(last).sqrt() * (1 + SLACK)
        return float((TAU * horizon._lower / norm).min()) * (1 - 1e-6)

    def worst(self) -> list[Tensor]:
        """Return the gradients that make the next U largest, but for ε."""
        (b1, b2), grads = BETAS, []
        for param in self.params:
            state = self.optimizer.state[param]
            m = state["exp_avg"].double()
            m = torch.where(m == 0, 1e-30, m)
            grad = b2 * state["exp_avg_sq"].double() * (1 - b1) / ((1 - b2) * b1 * m)
            grads.append(grad.clamp(-1e12, 1e12).float())
        return grads


def test_the_worst_gradients_at_the_largest_sure_rates_keep_rule_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the weights are those of plain torch, which measures where it is in doubt."""
    run, twin = Run(), Run()

    def both(grads: list[Tensor] | None, lr: float) -> None:
        run.step(grads, lr)
        with monkeypatch.context() as context:
            context.setenv(VARIABLE, "torch")
            twin.step(grads, lr)

    for _ in range(8):
        both(None, 1e-5)
    assert run.was_sure
    sure = 0
    for _ in range(6):
        before = [exact(param) for param in run.params]
        both(run.worst(), run.largest_sure_rate())
        sure += run.was_sure
        for sigma, param, other in zip(before, run.params, twin.params, strict=True):
            assert exact(param) <= (1 + TAU) * sigma * (1 + 1e-6)  # it is stored in float32
            # Adam's division by √V, of gradients that are 1e12 in places.
            assert torch.allclose(
                param, other, rtol=0, atol=2e-6 * float(other.detach().abs().max())
            )
        rates = [entry.lr for entry in twin.optimizer.stats().values()]
        assert rates == [entry.lr for entry in run.optimizer.stats().values()]
    assert sure >= 3, "hardly any step was sure"


def exact(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach().double(), 2))


def test_a_rate_that_is_too_large_to_be_sure_is_clipped() -> None:
    run = Run()
    run.until_sure()
    before = [exact(param) for param in run.params]
    run.step(run.worst(), 0.1)
    assert not run.was_sure
    for sigma, param, entry in zip(before, run.params, run.optimizer.stats().values(), strict=True):
        assert entry.clipped and not entry.certified
        assert exact(param) <= (1 + TAU) * sigma * (1 + 1e-6)


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda p: p.mul_(0.5),
    "copied": lambda p: p.copy_(p * 0.5),
    "other memory": lambda p: setattr(p, "data", p.data * 0.5),
}


@pytest.mark.parametrize("how", CHANGES)
def test_weights_that_others_wrote_are_measured_in_the_next_step(how: str) -> None:
    run = Run()
    run.until_sure()
    with torch.no_grad():
        CHANGES[how](run.params[0])
    sigma = exact(run.params[0])
    run.step()
    entry = run.optimizer.stats()["w0"]
    assert not run.was_sure and not entry.certified
    assert entry.sigma_weight <= sigma * (1 + 1e-5)


def test_weights_that_were_written_behind_torch_s_back_are_noticed_late() -> None:
    """``p.data.mul_`` counts for no write. The device compares the weights in every step, and the
    host hears of it two steps later: so long the clip is that of the weights before.
    """
    run = Run()
    run.until_sure()
    run.params[0].data.mul_(0.01)
    certified, growths = [], []
    for _ in range(4):
        before = exact(run.params[0])
        run.step(lr=1e-4)
        certified.append(run.optimizer.stats()["w0"].certified)
        growths.append(exact(run.params[0]) / before - 1)
    print(f"\nwritten through .data; certified: {certified}; σ₁ grew by {growths}")
    assert certified == [True, True, False, False]
    assert max(growths[2:]) <= TAU * (1 + 1e-4)
