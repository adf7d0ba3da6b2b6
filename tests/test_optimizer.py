from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import net as nets
from tests.processes import run_ranks
from tests.wrapped import Wrapped
from weyl_megatron import AdamW2, MatrixStats
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.layouts.buffers import Layout
from weyl_megatron.reference import AdamW2Reference, exact_sigma
from weyl_megatron.rule import balanced_floor

INFINITE = float("inf")


class Mixed(nn.Module):
    """Every kind of parameter: matrices, gains, biases, a convolution, stacked experts, a frozen
    one, an unused one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2)
        self.norm = nn.LayerNorm(6)
        self.experts = nn.Parameter(torch.randn(2, 6, 5) * 0.3)
        self.head = nn.Linear(5, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x).mean((2, 3)))
        return (
            self.frozen(self.head(torch.einsum("bi,eio->bo", x, self.experts).tanh()))
            .square()
            .mean()
        )


def train(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    steps: int = 20,
    model: type[nn.Module] = Mixed,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = model()
    optimizer = make(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 5, 5)).backward()
        optimizer.step()
        schedule.step()
    return net, optimizer


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_with_infinite_tau_it_is_torch_s_adamw_bit_for_bit(weight_decay: float) -> None:
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": weight_decay}
    theirs, adamw = train(lambda net: torch.optim.AdamW(net.parameters(), **options))
    ours, adamw2 = train(lambda net: AdamW2(net.named_parameters(), tau=INFINITE, **options))
    for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert adamw.state[one].keys() == adamw2.state[other].keys()
        assert all(
            torch.equal(value, adamw2.state[other][key]) for key, value in adamw.state[one].items()
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_follows_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    net = nets.make_net().to(dtype)
    twin = copy.deepcopy(net)
    options: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1, "tau": 0.01}
    optimizer = AdamW2(net.named_parameters(), **options)
    reference = AdamW2Reference(twin.named_parameters(), **options)
    for batch in nets.batches(1).flatten(0, 2).repeat(2, 1, 1)[:50]:
        for each, step in ((net, optimizer.step), (twin, reference.step)):
            each.zero_grad()
            each(batch).backward()
            step()
    rates = {name: entry.lr for name, entry in optimizer.stats().items()}
    assert any(rate < 0.02 for rate in rates.values())
    for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        # A handful of roundings of float64; of float32, carried through 50 steps.
        assert torch.allclose(
            one, other, rtol=0, atol=tolerance * float(other.detach().abs().max()) * 10
        ), name


def test_stats_say_what_the_step_did() -> None:
    _, optimizer = train(lambda net: AdamW2(net.named_parameters(), lr=0.02, tau=0.003), steps=1)
    torch.manual_seed(0)
    before = dict(Mixed().named_parameters())
    stats = optimizer.stats()  # type: ignore[attr-defined]
    assert set(stats) == {"conv.weight", "experts[0]", "experts[1]", "head.weight", "unused.weight"}
    entry = stats["conv.weight"]
    assert isinstance(entry, MatrixStats) and entry.clipped and entry.tau == 0.003
    assert entry.sigma_weight == pytest.approx(
        exact_sigma(before["conv.weight"].detach().flatten(1)), rel=1e-4
    )
    assert entry.lr == pytest.approx(0.003 * entry.sigma_weight / entry.sigma_update, rel=1e-6)
    assert stats["unused.weight"] == MatrixStats(
        stats["unused.weight"].sigma_weight, 0.0, 0.02, False, 0.003
    )


@pytest.mark.parametrize("part", ["conv", "experts"])
def test_convolutions_and_experts_move_as_the_matrices_they_are(part: str) -> None:
    """Against the reference on 2-D views of the same gradients."""
    torch.manual_seed(0)
    shape = (6, 3, 2, 2) if part == "conv" else (2, 6, 5)
    weight = nn.Parameter(torch.randn(shape))
    pieces = (
        [weight.detach().clone().flatten(1)] if part == "conv" else list(weight.detach().clone())
    )
    names = ["w"] if part == "conv" else ["w[0]", "w[1]"]
    reference = AdamW2Reference(zip(names, pieces, strict=True), lr=0.05, tau=0.01)
    optimizer = AdamW2([("w", weight)], lr=0.05, tau=0.01)
    for _ in range(10):
        weight.grad = torch.randn(shape)
        grads = [weight.grad.flatten(1)] if part == "conv" else list(weight.grad)
        for piece, grad in zip(pieces, grads, strict=True):
            piece.grad = grad
        optimizer.step()
        reference.step()
    moved = weight.detach().flatten(1) if part == "conv" else weight.detach()
    expected = pieces[0] if part == "conv" else torch.stack(pieces)
    assert torch.allclose(moved, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)], ids=["rows (nanoGPT)", "columns (Conv1D)"])
def test_gpt2_s_stacked_qkv_takes_three_rates(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    axis = 0 if shape[0] == 24 else 1
    weight = nn.Parameter(
        torch.randn(shape)
        * torch.repeat_interleave(torch.tensor([1.0, 0.1, 3.0]), 8).unsqueeze(1 - axis)
    )
    pieces = [piece.clone() for piece in weight.detach().chunk(3, axis)]
    name = "h.0.attn.c_attn.weight"
    reference = AdamW2Reference(
        zip([f"{name}[{x}]" for x in "qkv"], pieces, strict=True), lr=0.05, tau=0.01
    )
    optimizer = AdamW2([(name, weight)], lr=0.05, tau=0.01)
    for _ in range(10):
        weight.grad = torch.randn(shape)
        for piece, grad in zip(pieces, weight.grad.chunk(3, axis), strict=True):
            piece.grad = grad
        optimizer.step()
        reference.step()
    assert list(optimizer.stats()) == [f"{name}[{x}]" for x in "qkv"]
    assert len({entry.lr for entry in optimizer.stats().values()}) == 3
    assert torch.allclose(weight, torch.cat(pieces, axis), rtol=1e-5, atol=1e-6)


def test_vectors_take_the_scheduled_rate_and_are_clipped_where_asked() -> None:
    def step(**options: Any) -> torch.Tensor:
        bias = nn.Parameter(torch.full((9,), 0.5))
        bias.grad = torch.arange(1.0, 10.0)
        AdamW2([("bias", bias)], lr=0.1, tau=0.01, weight_decay=0.0, **options).step()
        return bias.detach()

    assert torch.allclose(step(), torch.full((9,), 0.4))
    assert torch.allclose(step(clip_vectors=True), torch.full((9,), 0.5 * 0.99))


@pytest.mark.parametrize("tau", [0.01, "auto"])
def test_a_zero_initialised_matrix_moves(tau: Any) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(16, 8))
    optimizer = AdamW2([("w", weight)], lr=1e-2, tau=tau, io=[] if tau == "auto" else None)
    for _ in range(20):
        weight.grad = torch.randn(16, 8)
        optimizer.step()
    assert weight.detach().norm() > 1e-3


def test_without_the_floor_a_zero_initialised_matrix_stays_zero() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    weight.grad = torch.ones(4, 4)
    AdamW2([("w", weight)], floor_std=0).step()
    assert not weight.detach().any()


def test_overrides_and_groups_set_tau_and_exempt_by_pattern() -> None:
    torch.manual_seed(0)
    names = ["h.0.a.weight", "h.0.b.weight", "h.1.a.weight", "head.weight"]
    weights = {name: nn.Parameter(torch.randn(6, 6)) for name in names}
    groups = [
        {"params": list(weights.items())[:3]},
        {"params": list(weights.items())[3:], "tau": 0.5},
    ]
    overrides = [
        {"match": "h.*", "tau": 0.02},
        {"match": "h.1.*", "tau": 0.03},
        {"match": "*.b.*", "exempt": True},
    ]
    optimizer = AdamW2(groups, overrides=overrides)
    for weight in weights.values():
        weight.grad = torch.randn(6, 6)
    optimizer.step()
    assert {name: entry.tau for name, entry in optimizer.stats().items()} == {
        "h.0.a.weight": 0.02,
        "h.1.a.weight": 0.03,
        "head.weight": 0.5,
    }


def test_auto_shares_one_budget_among_hidden_matrices_and_has_its_floor() -> None:
    torch.manual_seed(0)
    named = [
        ("wte.weight", (20, 8)),
        ("h.0.c_attn.weight", (24, 8)),
        ("h.0.fc.weight", (16, 8)),
        ("lm_head.weight", (20, 8)),
    ]
    params = [(name, nn.Parameter(torch.randn(shape) * 1e-4)) for name, shape in named]
    for _, param in params:
        param.grad = torch.randn_like(param)
    optimizer = AdamW2(params, lr=1.0, tau="auto")
    optimizer.step()
    stats = optimizer.stats()
    assert {name for name, entry in stats.items() if entry.tau == 0.1} == {
        "wte.weight",
        "lm_head.weight",
    }
    assert {entry.tau for name, entry in stats.items() if name.startswith("h.")} == {
        0.144 / 4
    }  # q, k, v, fc
    floor = balanced_floor(16, 8)
    assert stats["h.0.fc.weight"].lr == pytest.approx(
        0.144 / 4 * floor / stats["h.0.fc.weight"].sigma_update
    )


def test_channels_last_convolutions_are_the_same_matrices() -> None:
    torch.manual_seed(0)
    plain = nn.Parameter(torch.randn(6, 3, 4, 4))
    last = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    optimizers = [AdamW2([("w", plain)], lr=0.05), AdamW2([("w", last)], lr=0.05)]
    for _ in range(5):
        grad = torch.randn(6, 3, 4, 4)
        for weight, optimizer in zip((plain, last), optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step()
    # Both estimate the same σ₁, from other start vectors; cold iterations bring either within 1e-3
    # of it.
    assert optimizers[0].stats()["w"].sigma_weight == pytest.approx(
        optimizers[1].stats()["w"].sigma_weight, rel=1e-3
    )
    assert torch.allclose(plain, last, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tau", [1e6, INFINITE])  # in the fused kernel, in plain torch
@pytest.mark.parametrize("when", ["in mid-run", "when a checkpoint is loaded"])
def test_a_convolution_that_becomes_channels_last_keeps_its_moments(when: str, tau: float) -> None:
    torch.manual_seed(0)
    first, grads = torch.randn(6, 3, 4, 4), torch.randn(8, 6, 3, 4, 4)

    def run(make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> torch.Tensor:
        weight = nn.Parameter(first.clone())
        optimizer = make(weight)
        for step, grad in enumerate(grads):
            if step == 4:
                if when == "in mid-run":
                    weight.data = weight.data.to(memory_format=torch.channels_last)
                else:
                    state = copy.deepcopy(optimizer.state_dict())
                    weight = nn.Parameter(weight.detach().to(memory_format=torch.channels_last))
                    optimizer = make(weight)
                    optimizer.load_state_dict(state)
            weight.grad = grad.clone()
            optimizer.step()
        return weight.detach()

    expected = run(lambda weight: torch.optim.AdamW([weight], lr=0.05, foreach=False))
    found = run(lambda weight: AdamW2([("w", weight)], lr=0.05, tau=tau))
    assert torch.allclose(found, expected, rtol=0, atol=2e-6)  # roundings of eight steps


def test_parameters_that_are_frozen_unfrozen_or_added_later_are_stepped() -> None:
    torch.manual_seed(0)
    one, two, three = (nn.Parameter(torch.randn(5, 4)) for _ in range(3))
    two.requires_grad_(False)
    optimizer = AdamW2([("one", one), ("two", two)], tau=0.01, lr=0.1)

    def step() -> set[str]:
        for weight in (one, two, three):
            weight.grad = torch.randn(5, 4) if weight.requires_grad else None
        optimizer.step()
        return set(optimizer.stats())

    assert step() == {"one"}
    two.requires_grad_(True)
    assert step() == {"one", "two"}
    optimizer.add_param_group({"params": [("three", three)], "lr": 0.2})
    assert step() == {"one", "two", "three"}
    assert optimizer.state[three]["step"] == 1 and optimizer.state[one]["step"] == 3


def test_a_closure_s_loss_is_returned() -> None:
    weight = nn.Parameter(torch.ones(2, 2))

    def closure() -> torch.Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert AdamW2([weight]).step(closure) == 4.0  # type: ignore[arg-type]


def test_what_it_cannot_step_is_named() -> None:
    ugly: list[tuple[torch.Tensor, str]] = [
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
        (torch.ones(4, 1).expand(4, 3), "share memory"),
        (torch.ones(2, 2, device="meta"), "meta device"),
        (Wrapped(torch.ones(2, 2)), "is a Wrapped, whose memory other tensors have"),
    ]
    for tensor, message in ugly:
        parameter = nn.Parameter(tensor)
        parameter.grad = torch.ones_like(parameter)
        with pytest.raises((ValueError, RuntimeError), match=f"AdamW2: parameter 'w'.*{message}"):
            AdamW2([("w", parameter)]).step()
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    other = nn.Parameter(torch.ones(2, 2))
    other.grad = torch.ones_like(other)
    optimizer = AdamW2([("other", other), *table.named_parameters()])
    with pytest.raises(ValueError, match="sparse gradient"):
        optimizer.step()
    assert optimizer.state[other]["step"] == 0  # the step that was refused is not counted


@pytest.mark.parametrize("are_groups", [True, False], ids=["in two groups", "in one"])
def test_a_name_that_two_parameters_have_is_told_apart(are_groups: bool) -> None:
    encoder, decoder = nn.Linear(3, 2), nn.Linear(3, 2)
    pairs = [list(encoder.named_parameters()), list(decoder.named_parameters())]
    groups = (
        [{"params": named} for named in pairs] if are_groups else [{"params": pairs[0] + pairs[1]}]
    )
    optimizer = AdamW2(groups)
    for weight in (encoder.weight, decoder.weight):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert set(optimizer.stats()) == {"weight", "group1.weight" if are_groups else "group0.weight"}
    names = [
        name for group in optimizer.state_dict()["param_groups"] for name in group["param_names"]
    ]
    assert names == ["weight", "bias"] * 2  # torch's own key keeps what was given


def test_names_that_a_group_says_are_those_of_its_parameters() -> None:
    """As torchtitan makes groups; torch.optim.AdamW keeps the key."""
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = AdamW2([{"params": [weight], "param_names": ["h.0.weight"]}])
    optimizer.step()
    assert set(optimizer.stats()) == {"h.0.weight"}
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == ["h.0.weight"]
    other = AdamW2([weight])
    other.load_state_dict(state)
    assert other.param_groups[0]["param_names"] == ["h.0.weight"]


REFUSED = [("capturable", True), ("differentiable", True), ("decoupled_weight_decay", False)]


@pytest.mark.parametrize("is_late", [False, True], ids=["when it is made", "later"])
@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_a_parameter_group_may_not_ask_for_what_is_not_done(
    key: str, value: bool, is_late: bool
) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    sentence = f"AdamW2: {key} got {value}, it takes {not value}"
    if is_late:
        optimizer = AdamW2([("w", weight)])
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match=sentence):
            optimizer.step()
    else:
        with pytest.raises(ValueError, match=sentence):
            AdamW2([{"params": [("w", weight)], key: value}])
    assert torch.equal(weight, torch.ones(2, 2))


@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay", "betas"])
@pytest.mark.parametrize("tau", [0.01, INFINITE])
def test_a_hyperparameter_that_becomes_no_number_is_refused_before_anything_moves(
    key: str, tau: float
) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = AdamW2([("w", weight)], tau=tau)
    optimizer.param_groups[0][key] = ("0.9", "0.99") if key == "betas" else "0.1"
    with pytest.raises(ValueError, match=f"a parameter group's {key} got .*, it takes numbers"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))


def test_without_parameters_the_layout_is_read_once() -> None:
    reads = []
    optimizer = AdamW2(
        [{"params": []}, {"params": []}]
    )  # Megatron's stages without experts have such a one

    def read() -> Layout:
        reads.append(None)
        return Layout([])

    optimizer.engine = GivenLayout(read)
    for _ in range(3):
        optimizer.step()
    assert len(reads) == 1 and optimizer.stats() == {}


def test_a_training_loop_s_tensors_are_not_kept_alive_where_deepspeed_is_imported() -> None:
    pytest.importorskip("deepspeed")
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamW2([("w", weight)])
    losses = []
    for _ in range(2):
        loss = (weight @ torch.ones(2, 2)).sum()
        losses.append(weakref.ref(loss))
        loss.backward()
        optimizer.step()
    del loss
    assert [each() for each in losses] == [None, None]


def test_a_tensor_that_an_engine_put_in_place_of_the_parameters_is_refused() -> None:
    optimizer = AdamW2([("h.0.weight", nn.Parameter(torch.ones(3, 3)))])
    flat = nn.Parameter(torch.ones(9))
    flat.grad = torch.ones(9)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(
        ValueError, match=r"an engine replaced parameter 'h.0.weight' .* shape \(9,\)"
    ):
        optimizer.step()


def test_tensor_parallel_marks_without_a_group_are_refused() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    weight.tensor_model_parallel, weight.partition_dim = True, 0  # type: ignore[attr-defined]
    weight.grad = torch.ones(3, 3)
    with pytest.raises(
        ValueError, match="parameter 'w' is tensor-parallel, but no tensor-parallel group is known"
    ):
        AdamW2([("w", weight)]).step()


def test_ddp_trains_as_one_process_and_fsdp1_is_refused() -> None:
    """Two real processes, see ddp_worker.py."""
    output = run_ranks("torch", Path(__file__).with_name("ddp_worker.py"), 2)
    assert "ddp follows one process" in output
    assert "fsdp1 refused" in output


def test_names_lose_what_wrappers_put_in_front() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    weight.grad = torch.ones(3, 3)
    optimizer = AdamW2([("module._orig_mod.h.0.weight", weight)])
    optimizer.step()
    assert set(optimizer.stats()) == {"h.0.weight"}


def test_a_step_warns_of_nothing() -> None:
    """torch 2.14 deprecates the older of two names of one check, which an optimizer may call."""
    weight = nn.Parameter(torch.randn(8, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = AdamW2([("w", weight)], lr=0.1)
        for _ in range(2):
            weight.grad = torch.randn(8, 6)
            optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()


def test_a_compiled_step_is_not_traced() -> None:
    """torchdynamo #979, torchtune #2516: traced, six steps took minutes."""

    def run(prepare: Callable[[Any], Any]) -> torch.Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(8, 6))
        step = prepare(AdamW2([("w", weight)], lr=0.1).step)
        for _ in range(3):
            weight.grad = torch.randn(8, 6)
            step()
        return weight.detach()

    torch._dynamo.utils.counters.clear()
    found = run(lambda step: torch.compile(step, backend="eager"))
    assert torch.equal(found, run(lambda step: step))
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] == 0


def test_a_gradient_that_is_not_finite_ends_in_weights_that_are_not_as_under_adamw() -> None:
    def weights(make: Callable[..., torch.optim.Optimizer]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        one, other = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
        one.grad, other.grad = torch.randn(4, 3), torch.randn(4, 3)
        one.grad[1, 1] = float("nan")
        make([one, other], lr=1e-6).step()
        return [one.detach(), other.detach()]

    bad, good = weights(AdamW2)
    _, expected = weights(torch.optim.AdamW)
    assert bad.isnan().any() and torch.equal(good, expected)
