"""What a kernel is handed of a parameter is checked first: nothing is read or written that is not
its own.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.wrapped import Wrapped
from weyl_megatron import AdamW2

INFINITE = float("inf")

Make = Callable[..., torch.optim.Optimizer]


def adamw(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, foreach=False, **options)


def adamw2(params: Any, **options: Any) -> torch.optim.Optimizer:
    return AdamW2(params, tau=INFINITE, **options)


def trained(weight: Tensor, make: Make, *, steps: int = 5, **options: Any) -> torch.optim.Optimizer:
    """Step ``weight`` on gradients that depend on the step alone."""
    parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    optimizer = make([parameter], **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        parameter.grad = torch.randn(weight.shape, generator=generator).to(weight)
        optimizer.step()
    return optimizer


def parameter_of(optimizer: torch.optim.Optimizer) -> nn.Parameter:
    weight: nn.Parameter = optimizer.param_groups[0]["params"][0]
    return weight


@pytest.mark.parametrize(
    ("shape", "other"),
    [
        ((4,), (8,)),
        ((8,), (4,)),
        ((4000, 16), (5000, 16)),
        ((6, 4), (4, 6)),
        ((6, 4), (24,)),
        ((3, 4), (3, 4, 1)),
    ],
    ids=str,
)
def test_a_state_of_another_shape_is_refused_when_it_is_loaded(
    shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    """pytorch #40769, yolov5 #1412: torch.optim.AdamW finds it out in the next step, a kernel by
    address never.
    """
    torch.manual_seed(0)
    saved = trained(torch.randn(shape), adamw).state_dict()
    weight = nn.Parameter(torch.randn(other))
    before = weight.detach().clone()
    optimizer = AdamW2([("h.0.weight", weight)])
    extents = ", ".join(map(str, shape))
    sentence = rf"'exp_avg' of shape \({extents},?\) for parameter 'h.0.weight', it takes its shape"
    with pytest.raises(ValueError, match=sentence) as error:
        optimizer.load_state_dict(saved)
    assert "\n" not in str(error.value) and str(other) in str(error.value)
    weight.grad = torch.ones_like(weight)
    optimizer.step()  # nothing of it was taken
    assert optimizer.state[weight]["step"] == 1 and not torch.equal(weight, before)


def test_a_state_whose_count_is_gone_is_written_and_not_stepped() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = AdamW2([("w", weight)])
    optimizer.step()
    del optimizer.state[weight]["step"]
    assert set(optimizer.state_dict()["state"][0]) == {"exp_avg", "exp_avg_sq"}
    with pytest.raises(ValueError, match="'step' of parameter 'w' got none, it takes a number"):
        optimizer.step()


def test_a_state_dict_of_another_number_of_parameters_is_refused() -> None:
    one, two = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    saved = torch.optim.AdamW([one]).state_dict()
    with pytest.raises(
        ValueError, match=r"got parameter groups of \[1\] parameters, it takes \[2\]"
    ):
        AdamW2([("one", one), ("two", two)]).load_state_dict(saved)
    with pytest.raises(
        ValueError, match=r"got parameter groups of \[1\] parameters, it takes \[1, 1\]"
    ):
        AdamW2([{"params": [one]}, {"params": [two]}]).load_state_dict(saved)


def test_a_state_of_another_optimizer_is_refused_when_it_is_loaded() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    sgd.step()
    with pytest.raises(
        ValueError,
        match="got momentum_buffer for parameter 'w', it takes step, exp_avg, exp_avg_sq",
    ):
        AdamW2([("w", weight)]).load_state_dict(sgd.state_dict())


def shorter(moment: Tensor) -> Tensor:
    moment.untyped_storage().resize_(0)
    return moment


SPOILED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "fewer rows": (
        lambda moment: moment[:3].clone(),
        r"is \(3, 7\), .* takes its parameter's \(9, 7\)",
    ),
    "more rows": (
        lambda moment: torch.cat([moment, moment]),
        r"is \(18, 7\), .* takes its parameter's \(9, 7\)",
    ),
    "other shape": (
        lambda moment: moment.reshape(7, 9),
        r"is \(7, 9\), .* takes its parameter's \(9, 7\)",
    ),
    "other dtype": (
        lambda moment: moment.bfloat16(),
        r"torch.bfloat16, .* takes its parameter's .* torch.float32",
    ),
    "no memory": (lambda moment: moment.to("meta"), r"on meta, it takes its parameter's .* on cpu"),
    "storage taken away": (shorter, r"got a storage of 0 bytes, it takes 252"),
    "a wrapper": (
        Wrapped,
        r"'exp_avg.*' of parameter 'w' is a Wrapped, whose memory other tensors",
    ),
    "sparse": (lambda moment: moment.to_sparse(), r"it takes exp_avg, exp_avg_sq, dense tensors"),
    "missing": (
        lambda moment: None,
        r"the state of parameter 'w' holds .*, it takes exp_avg, exp_avg_sq, dense tensors",
    ),
}


@pytest.mark.parametrize("tau", [0.01, INFINITE])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("how", SPOILED)
def test_a_moment_that_does_not_fit_is_refused_before_anything_moves(
    how: str, key: str, tau: float
) -> None:
    spoil, sentence = SPOILED[how]
    weight, other = nn.Parameter(torch.ones(9, 7)), nn.Parameter(torch.ones(5, 3))
    optimizer = AdamW2([("other", other), ("w", weight)], tau=tau)
    for each in (weight, other):
        each.grad = torch.ones_like(each)
    optimizer.step()
    before = other.detach().clone()
    optimizer.state[weight][key] = spoil(optimizer.state[weight][key])
    with pytest.raises(ValueError, match=sentence) as error:
        optimizer.step()
    assert "\n" not in str(error.value) and (
        key in str(error.value) or how in ("missing", "sparse")
    )
    assert torch.equal(other, before) and optimizer.state[other]["step"] == 1


@pytest.mark.parametrize("shape", [(12, 7), (4, 7), (9, 8), (63,), (9, 7, 1)], ids=str)
def test_a_weight_of_another_shape_than_its_moments_is_refused(shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.ones(9, 7))
    optimizer = AdamW2([("w", weight)])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad = None
    weight.data = torch.ones(shape)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(
        ValueError, match=r"'exp_avg' of parameter 'w' is \(9, 7\), .* it takes its parameter's \("
    ):
        optimizer.step()
    optimizer.state.clear()
    optimizer.step()  # as a new parameter's
    expected = nn.Parameter(torch.ones(shape))
    expected.grad = torch.ones_like(expected)
    torch.optim.AdamW([expected]).step()
    assert weight.shape == torch.Size(shape)
    assert torch.allclose(weight, expected, rtol=0, atol=1e-6)  # nothing is clipped at this rate


def test_a_weight_whose_storage_was_taken_away_is_refused() -> None:
    weight = nn.Parameter(torch.ones(9, 7))
    optimizer = AdamW2([("w", weight)])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.untyped_storage().resize_(0)
    with pytest.raises(
        ValueError,
        match=r"the weight of parameter 'w', of shape \(9, 7\), got a storage of 0 bytes",
    ):
        optimizer.step()


OPTIONS: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "both": {"amsgrad": True, "maximize": True, "weight_decay": 0.1},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "tensor lr of one dimension": {"lr": torch.tensor([0.01])},
    "tensor lr and betas": {
        "lr": torch.tensor(0.003),
        "betas": (torch.tensor(0.8), torch.tensor(0.97)),
    },
    "amsgrad with a tensor lr": {"amsgrad": True, "lr": torch.tensor(0.01), "weight_decay": 0.3},
}

WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.randn(9, 7),
    "vector": lambda: torch.randn(11),
    "transposed": lambda: torch.randn(7, 9).T,
    "every other column": lambda: torch.randn(9, 14)[:, ::2],
    "part of a row": lambda: torch.randn(9, 14)[:, 3:10],
    "last dimension taken": lambda: torch.randn(9, 7, 3)[..., 1],
    "bfloat16": lambda: torch.randn(9, 7).bfloat16(),
    "float64": lambda: torch.randn(9, 7).double(),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("option", [*OPTIONS, "none"])
def test_options_and_memory_orders_are_torch_s_bit_for_bit(option: str, kind: str) -> None:
    def run(make: Make) -> torch.optim.Optimizer:
        torch.manual_seed(0)
        return trained(WEIGHTS[kind](), make, **copy.deepcopy(OPTIONS.get(option, {})))

    expected, found = run(adamw), run(adamw2)
    assert torch.equal(parameter_of(found), parameter_of(expected))
    theirs, ours = expected.state[parameter_of(expected)], found.state[parameter_of(found)]
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("kind", ["matrix", "every other column", "part of a row", "float64"])
@pytest.mark.parametrize("option", [*OPTIONS, "none"])
def test_options_and_memory_orders_clip_as_the_plain_ones(option: str, kind: str) -> None:
    """With amsgrad U is another; its σ₁ is held to SVD."""
    torch.manual_seed(0)
    start = WEIGHTS[kind]()
    options = {**copy.deepcopy(OPTIONS.get(option, {})), "lr": 0.5, "weight_decay": 0.0}
    optimizer = trained(start, AdamW2, steps=3, **options)
    weight = parameter_of(optimizer)
    before = weight.detach().clone()
    weight.grad = torch.randn(9, 7).to(weight)
    optimizer.step()
    assert isinstance(optimizer, AdamW2)
    (stats,) = optimizer.stats().values()
    moved = float(torch.linalg.matrix_norm((weight.detach() - before).double(), 2))
    sigma = float(torch.linalg.matrix_norm(before.double(), 2))
    assert stats.clipped
    assert moved == pytest.approx(
        0.01 * sigma, rel=2e-2
    )  # Rule 1 holds with equality; σ₁ is estimated to 1 %


def test_a_rate_may_become_a_tensor_and_a_number_again() -> None:
    """pytorch #145461."""

    def run(make: Make) -> Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(5, 4))
        optimizer = make([weight], lr=0.1)
        for lr in (0.1, torch.tensor(0.05), torch.tensor(0.02), 0.01):
            optimizer.param_groups[0]["lr"] = lr
            weight.grad = torch.randn(5, 4)
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(adamw2), run(adamw))


@pytest.mark.parametrize(
    ("dtype", "counts"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_steps_are_counted_whatever_the_default_dtype_is(
    dtype: torch.dtype, counts: torch.dtype
) -> None:
    """In bfloat16 a count stops at 256."""
    torch.set_default_dtype(dtype)
    try:
        expected, found = (trained(torch.ones(3), make, steps=300) for make in (adamw, adamw2))
    finally:
        torch.set_default_dtype(torch.float32)
    step = found.state[parameter_of(found)]["step"]
    assert step == 300 and step.dtype == counts
    assert torch.equal(parameter_of(found), parameter_of(expected))


def test_frozen_parameters_of_any_kind_are_passed_over() -> None:
    """QLoRA's: int and uint8 weights, complex tables, views."""
    torch.manual_seed(0)
    frozen = [
        torch.ones(4, 3, dtype=torch.int32),
        torch.ones(4, 3, dtype=torch.uint8),
        torch.ones(4, 3, dtype=torch.complex64),
        torch.ones(4, 1).expand(4, 3),
        torch.ones(4, 6)[:, ::2],
        torch.ones(4, 3).to_sparse(),
        torch.ones(4, 3, device="meta"),
    ]
    weight = nn.Parameter(torch.randn(4, 3))
    params = [weight, *(nn.Parameter(tensor, requires_grad=False) for tensor in frozen)]
    optimizer = AdamW2(params, lr=0.1)
    waiting = nn.Parameter(
        torch.ones(2, 2, dtype=torch.complex64)
    )  # it may have a gradient, and has none
    optimizer.add_param_group({"params": [waiting]})
    weight.grad = torch.randn(4, 3)
    optimizer.step()
    assert set(optimizer.stats()) == {"group0.param0"} and set(optimizer.state) == {weight}
    waiting.grad = torch.ones_like(waiting)
    with pytest.raises(ValueError, match=r"parameter 'group1\.param0' is torch\.complex64"):
        optimizer.step()


def test_vectors_pass_through_a_run_that_makes_no_step() -> None:
    """nanoGPT's resume: a state dict is loaded, saved again before a step, and loaded once more."""

    def run(stops: int) -> Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(20, 12))
        optimizer = AdamW2([("w", weight)], lr=0.05)
        grads = torch.randn(12, 20, 12)
        for step, grad in enumerate(grads):
            if step == 6:
                for _ in range(stops):
                    file = io.BytesIO()
                    torch.save(optimizer.state_dict(), file)
                    file.seek(0)
                    optimizer = AdamW2([("w", weight)], lr=0.05)
                    optimizer.load_state_dict(torch.load(file, weights_only=True))
            weight.grad = grad
            optimizer.step()
        return weight.detach()

    expected = run(0)
    assert torch.equal(run(1), expected) and torch.equal(run(3), expected)


def test_vectors_pass_through_a_copy() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(20, 12))
    optimizer = AdamW2([("w", weight)], lr=0.05)
    for grad in torch.randn(4, 20, 12):
        weight.grad = grad
        optimizer.step()
    twin_weight, twin = copy.deepcopy((weight, optimizer))
    for each, owner in ((weight, optimizer), (twin_weight, twin)):
        torch.manual_seed(1)
        each.grad = torch.randn(20, 12)
        owner.step()
    assert torch.equal(weight, twin_weight) and optimizer.stats() == twin.stats()
