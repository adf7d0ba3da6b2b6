from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.processes import run_ranks
from weyl_megatron import AdamW2
from weyl_megatron.watch.sharpness import adam_preconditioner, adam_threshold, sharpness

EXACT = {"iterations": 400, "tol": 1e-12}


class Attention(nn.Module):
    """One causal attention of two heads and a head, small enough for a whole Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def mlp() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(9, 4).double(), torch.randn(9, 2).double()
    return net, lambda model: F.mse_loss(model(x), y)


def attention() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(1)
    net = Attention().double()
    x, y = torch.randn(3, 5, 4).double(), torch.randint(3, (15,))
    return net, lambda model: F.cross_entropy(model(x).flatten(0, 1), y)


def whole_hessian(net: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    names, values = zip(
        *[(name, p.detach().clone()) for name, p in net.named_parameters()], strict=True
    )
    sizes = [value.numel() for value in values]

    def of_vector(flat: Tensor) -> Tensor:
        parts = [part.view_as(value) for part, value in zip(flat.split(sizes), values, strict=True)]
        return loss(
            lambda x: torch.func.functional_call(net, dict(zip(names, parts, strict=True)), (x,))
        )  # type: ignore[arg-type]

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(
            of_vector, torch.cat([value.flatten() for value in values])
        )


@pytest.mark.parametrize("make", [mlp, attention])
def test_it_is_the_hessian_s_top_eigenvalue(
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]],
) -> None:
    net, loss = make()
    hessian = whole_hessian(net, loss)
    parameters = list(net.parameters())
    before = [p.detach().clone() for p in parameters]
    found = sharpness(lambda: loss(net), parameters, **EXACT)
    assert found == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-6)
    assert all(p.grad is None for p in parameters)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    # The default's 20 products are within its tolerance.
    assert sharpness(lambda: loss(net), parameters) == pytest.approx(found, rel=2e-3)

    diagonal = [torch.rand_like(p) + 0.1 for p in parameters]
    root = torch.cat([d.flatten() for d in diagonal]).rsqrt()
    expected = float(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1])
    found = sharpness(lambda: loss(net), parameters, preconditioner=diagonal, **EXACT)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "spectrum", [[3.0, 2.0, -7.0, 0.0], [-4.0, -1.0, -2.0, -2.0], [1.0, 1.0, 1.0, 1.0]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_quadratic_s_spectrum_is_known(spectrum: list[float], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    matrix = (basis * torch.tensor(spectrum, dtype=torch.float64) @ basis.T).to(dtype)
    x, unused = (
        torch.randn(4, dtype=dtype).requires_grad_(),
        torch.ones(2, dtype=dtype).requires_grad_(),
    )
    found = sharpness(lambda: x @ matrix @ x / 2, [x, unused], iterations=10, tol=0.0)
    expected = max(*spectrum, 0.0)  # of `unused`, on which nothing depends
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert sharpness(lambda: x @ matrix @ x / 2, [x], tol=0.0) == pytest.approx(
        max(spectrum), rel=1e-5
    )


def test_a_linear_loss_is_flat_and_an_infinite_one_is_nan() -> None:
    x = torch.ones(3).requires_grad_()
    assert sharpness(lambda: x.sum(), [x]) == 0.0
    bad = torch.zeros(3).requires_grad_()
    assert sharpness(lambda: bad.sqrt().sum(), [bad]) != sharpness(lambda: bad.sqrt().sum(), [bad])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW2])
def test_the_preconditioner_is_cohen_s(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = kind([weight], lr=1e-2, betas=(0.8, 0.9), eps=1e-3)  # type: ignore[call-arg]
    second = torch.zeros(3, 4)
    for _ in range(3):
        weight.grad = torch.randn(3, 4)
        second = 0.9 * second + 0.1 * weight.grad.square()
        optimizer.step()
    (found,) = adam_preconditioner(optimizer, [weight])
    torch.testing.assert_close(found, (1 - 0.8**3) * ((second / (1 - 0.9**3)).sqrt() + 1e-3))


@pytest.mark.parametrize(("share", "converges"), [(0.97, True), (1.03, False)])
def test_adam_diverges_above_its_threshold_and_converges_below(
    share: float, converges: bool
) -> None:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    matrix = basis * torch.tensor([9.0, 5.0, 2.0, 1.0, 0.8, 0.5], dtype=torch.float64) @ basis.T
    x = nn.Parameter(torch.randn(6, dtype=torch.float64))
    beta1 = 0.9
    optimizer = torch.optim.Adam([x], lr=1.0, betas=(beta1, 1 - 1e-12))
    # A second moment that stands still, as the threshold supposes: after so many steps no gradient
    # moves it.
    second = torch.rand(6, dtype=torch.float64) + 0.1
    optimizer.state[x] = {
        "step": torch.tensor(1e14),
        "exp_avg": torch.zeros_like(x),
        "exp_avg_sq": second,
    }
    preconditioner = adam_preconditioner(optimizer, [x])
    top = sharpness(lambda: x @ matrix @ x / 2, [x], preconditioner=preconditioner, **EXACT)
    for group in optimizer.param_groups:
        group["lr"] = share * adam_threshold(1.0, beta1) / top
    start = size = float(x.detach().norm())
    for _ in range(1500):
        x.grad = matrix @ x.detach()
        optimizer.step()
        size = float(x.detach().norm())
        if size > 1e3 * start:  # far beyond it V moves after all
            break
    assert size < 1e-3 * start if converges else size > 1e3 * start


def test_two_ranks_see_the_joined_batch() -> None:
    output = run_ranks("torch", Path(__file__).parent / "sharpness_worker.py", 2)
    assert "two ranks see the joined batch" in output


def test_bad_inputs_are_told_in_a_sentence() -> None:
    x = torch.ones(3).requires_grad_()

    def loss() -> Tensor:
        return (x * x).sum()

    cut = torch.empty(0).requires_grad_()
    cut.ds_id = 3  # type: ignore[attr-defined]
    cases: list[tuple[str, Callable[[], object]]] = [
        (
            "parameter 1 is partitioned, it takes whole parameters",
            lambda: sharpness(loss, [x, cut]),
        ),
        ("parameters got none", lambda: sharpness(loss, [])),
        ("requires_grad=False", lambda: sharpness(loss, [torch.ones(3)])),
        ("iterations got 0", lambda: sharpness(loss, [x], iterations=0)),
        ("tol got -1", lambda: sharpness(loss, [x], tol=-1)),
        (r"loss returned the shape \(3,\)", lambda: sharpness(lambda: x * x, [x])),
        (
            r"preconditioner got the shapes \[\(2,\)\]",
            lambda: sharpness(loss, [x], preconditioner=[torch.ones(2)]),
        ),
        ("preconditioner got 0.0", lambda: sharpness(loss, [x], preconditioner=[torch.zeros(3)])),
        ("has no second moment in AdamW", lambda: adam_preconditioner(torch.optim.AdamW([x]), [x])),
        ("lr and beta1 got 0.0 and 0.9", lambda: adam_threshold(0.0, 0.9)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
