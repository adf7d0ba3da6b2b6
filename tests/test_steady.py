"""What the steps after the first take for known, and that nothing else is: whatever changes between
two steps is seen.
"""

from __future__ import annotations

import gc
import io
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weyl_megatron import AdamW2

INFINITE = float("inf")


def several(count: int = 3, **options: Any) -> tuple[AdamW2, list[nn.Parameter]]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(9, 7)) for _ in range(count)]
    optimizer = AdamW2([(f"w{n}", param) for n, param in enumerate(params)], lr=0.01, **options)
    return optimizer, params


def step(optimizer: AdamW2, params: Sequence[nn.Parameter], steps: int = 1) -> None:
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()


def counts(optimizer: AdamW2, params: Sequence[nn.Parameter]) -> list[float]:
    return [float(optimizer.state[param]["step"]) for param in params]


def moved(tensor: Tensor) -> None:
    """One element on, of the same form, in storage of the same size."""
    storage = tensor.untyped_storage()
    storage.resize_(256)
    tensor.set_(storage, 1, (9, 7), (7, 1))
    storage.resize_(252)


IN_PLACE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "shorter": (
        lambda tensor: setattr(tensor, "data", tensor[:3].clone()),
        r"is \(3, 7\), .* takes its parameter's \(9, 7\)",
    ),
    "resized": (lambda tensor: tensor.resize_(9, 8), r"is \(9, 8\), .* takes .* \(9, 7\)"),
    "other dtype": (
        lambda tensor: setattr(tensor, "data", tensor.double()),
        r"torch.float64, .* takes its parameter's .* torch.float32",
    ),
    "storage taken away": (
        lambda tensor: tensor.untyped_storage().resize_(0),
        r"got a storage of 0 bytes, it takes 252",
    ),
    "storage cut": (
        lambda tensor: tensor.untyped_storage().resize_(248),
        r"got a storage of 248 bytes, it takes 252",
    ),
    "moved in its storage": (moved, r"got a storage of 252 bytes, it takes 256"),
}


@pytest.mark.parametrize("tau", [0.01, INFINITE])
@pytest.mark.parametrize("what", ["exp_avg", "exp_avg_sq", "the gradient"])
@pytest.mark.parametrize("how", IN_PLACE)
def test_what_changes_in_place_between_two_steps_is_refused(
    how: str, what: str, tau: float
) -> None:
    """The same tensor object as in the steps before, of which only what passed is remembered."""
    spoil, sentence = IN_PLACE[how]
    optimizer, params = several(tau=tau)
    step(optimizer, params, 3)
    before = [param.detach().clone() for param in params]
    is_gradient = what == "the gradient"
    spoil(params[1].grad if is_gradient else optimizer.state[params[1]][what])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{what}.*parameter 'w1'.*{sentence}"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert counts(optimizer, params) == [3.0, 3.0, 3.0]


def test_storage_that_shrinks_and_keeps_its_address_is_refused() -> None:
    """Resized twice, it may come to lie where it lay: an address says nothing of a size."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(250, 4))
    optimizer = AdamW2([("w", weight)])
    step(optimizer, [weight], 2)
    storage = optimizer.state[weight]["exp_avg"].untyped_storage()
    for size in range(3996, 3900, -4):
        storage.resize_(size)
        with pytest.raises(ValueError, match=f"got a storage of {size} bytes, it takes 4000"):
            optimizer.step()


def test_amsgrad_that_changes_from_one_group_to_another_is_checked_anew() -> None:
    """As many tensors of the same forms as before, each another's."""
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 4))]
    optimizer = AdamW2([{"params": [param], "amsgrad": n == 0} for n, param in enumerate(params)])
    step(optimizer, params, 2)
    first, second = optimizer.param_groups
    first["amsgrad"], second["amsgrad"] = False, True
    optimizer.state[params[1]]["max_exp_avg_sq"] = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"'max_exp_avg_sq' of parameter 'group1\.param0'"):
        optimizer.step()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moments_that_users_take_away_are_not_kept_alive(key: str) -> None:
    """As where they are brought to the CPU between two steps, to make room on a GPU."""
    optimizer, params = several()
    step(optimizer, params, 3)
    moments = [weakref.ref(optimizer.state[param][key]) for param in params]
    for param in params:
        optimizer.state[param][key] = optimizer.state[param][key].clone()
    gc.collect()
    assert [moment() for moment in moments] == [None] * 3
    gradients = [weakref.ref(param.grad) for param in params if param.grad is not None]
    optimizer.zero_grad()
    gc.collect()
    assert [gradient() for gradient in gradients] == [None] * 3


def test_one_count_that_several_parameters_were_handed_is_counted_for_each() -> None:
    """As a checkpoint may keep it, once for all (Megatron's)."""
    optimizer, params = several()
    step(optimizer, params)
    state, shared = optimizer.state_dict(), torch.tensor(4.0)
    for entry in state["state"].values():
        entry["step"] = shared
    optimizer.load_state_dict(state)
    step(optimizer, params, 3)
    assert counts(optimizer, params) == [7.0, 7.0, 7.0] and shared == 4.0
    optimizer.state[params[0]]["step"].fill_(1)
    assert counts(optimizer, params) == [1.0, 7.0, 7.0]


def test_a_count_that_is_replaced_between_two_steps_is_gone_on_from() -> None:
    optimizer, params = several()
    step(optimizer, params, 3)
    taken = optimizer.state[params[2]]["step"]
    optimizer.state[params[0]]["step"] = 10
    optimizer.state[params[1]]["step"] = taken  # of another parameter
    step(optimizer, params)
    assert counts(optimizer, params) == [11.0, 4.0, 4.0] and taken == 3.0
    optimizer.state[params[1]]["step"].data = torch.tensor(20.0)  # in place, in other memory
    step(optimizer, params)
    assert counts(optimizer, params) == [12.0, 21.0, 5.0]
    optimizer.state[params[2]]["step"].copy_(torch.tensor(30.0))  # as torch's DCP loads
    step(optimizer, params)
    assert counts(optimizer, params) == [13.0, 22.0, 31.0]


def test_counts_keep_the_dtypes_and_shapes_that_they_were_given() -> None:
    """As torch.optim.AdamW keeps them."""
    optimizer, params = several(count=4)
    step(optimizer, params)
    given = [torch.tensor(4), torch.full((1,), 5.0), torch.tensor(6.0, dtype=torch.float64)]
    for param, count in zip(params, given, strict=False):
        optimizer.state[param]["step"] = count
    step(optimizer, params, 3)
    held = [optimizer.state[param]["step"] for param in params]
    assert counts(optimizer, params) == [7.0, 8.0, 9.0, 4.0]
    assert [count.dtype for count in held[:3]] == [count.dtype for count in given]
    assert held[1].shape == (1,) and held[3].dtype == torch.float32


@pytest.mark.parametrize("tau", [1e6, INFINITE])
def test_each_parameter_is_corrected_for_its_own_count(tau: float) -> None:
    """Bit for bit as torch.optim.AdamW where nothing is clipped in plain torch."""

    def run(make: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(9, 7)) for _ in range(3)]
        optimizer = make(params, lr=0.01)
        for number in range(9):
            for param, every in zip(params, (1, 2, 3), strict=True):
                param.grad = torch.randn(9, 7) if number % every == 0 else None
            optimizer.step()
            if number == 5:
                optimizer.state[params[0]]["step"] += 7
        assert [float(optimizer.state[param]["step"]) for param in params] == [16, 5, 3]
        return [param.detach() for param in params]

    found = run(lambda params, lr: AdamW2(params, tau=tau, lr=lr))
    expected = run(lambda params, lr: torch.optim.AdamW(params, lr=lr, foreach=False))
    # 1e6 is stepped in the fused kernel, which rounds otherwise in each of nine steps.
    tolerance = 0.0 if tau == INFINITE else 1e-6
    for weight, wanted in zip(found, expected, strict=True):
        assert torch.allclose(weight, wanted, rtol=0, atol=tolerance)


def test_an_optimizer_that_loads_another_s_state_dict_counts_by_itself() -> None:
    first, params = several()
    step(first, params, 2)
    second = AdamW2([(f"w{n}", param) for n, param in enumerate(params)])
    second.load_state_dict(first.state_dict())
    step(first, params, 3)
    assert counts(second, params) == [2.0, 2.0, 2.0]
    step(second, params)
    assert counts(second, params) == [3.0, 3.0, 3.0] and counts(first, params) == [5.0, 5.0, 5.0]


def test_counts_share_memory_that_stays_small() -> None:
    """A pickle of one writes the memory of all it shares with; a count of its own takes as much."""
    optimizer, params = several(count=600)
    step(optimizer, params, 2)
    views = [optimizer.state[param]["step"] for param in params]
    assert len({view.untyped_storage().data_ptr() for view in views}) == 3
    alone = len(pickle.dumps(torch.tensor(2.0)))
    assert all(len(pickle.dumps(view)) < alone + 2048 for view in views[::100])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["state"]
    assert {float(entry["step"]) for entry in loaded.values()} == {2.0}
