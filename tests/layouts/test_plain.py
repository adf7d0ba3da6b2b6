"""What AdamW2 makes of a model's parameters in plain PyTorch: shown the model, given names, given
neither.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weyl_megatron import AdamW2

SHOWN = pytest.mark.parametrize("shown", [True, False], ids=["model shown", "names alone"])


def steps(
    optimizer: AdamW2,
    model: nn.Module,
    number: int,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """Step on gradients that depend on the parameter's name alone; return the weights."""
    for step in range(number):
        for index, (name, param) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(1000 * step + index)
            shape = (shapes or {}).get(name, tuple(param.shape))
            param.grad = torch.randn(shape, generator=generator).reshape(param.shape)
        optimizer.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def pair(kind: str, *sizes: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A 1-D convolution and its 2-D twin of one height with the same weights."""
    torch.manual_seed(0)
    one = getattr(nn, f"{kind}1d")(*sizes, **options)
    two = getattr(nn, f"{kind}2d")(*sizes[:2], (sizes[2], 1), **options)
    with torch.no_grad():
        two.weight.copy_(one.weight[..., None])
        two.bias.copy_(one.bias)
    return one, two


@SHOWN
@pytest.mark.parametrize(
    ("kind", "sizes", "groups"),
    [
        ("Conv", (24, 16, 3), 1),
        ("Conv", (24, 16, 3), 4),
        ("Conv", (24, 24, 5), 24),
        ("ConvTranspose", (24, 16, 3), 1),
        ("ConvTranspose", (24, 24, 3), 24),
    ],
    ids=["plain", "grouped", "depthwise", "transposed", "transposed depthwise"],
)
def test_a_1d_convolution_steps_as_its_2d_twin(
    kind: str, sizes: tuple[int, int, int], groups: int, shown: bool
) -> None:
    """Emerging-Optimizers #69, OLMo-core #606, dion #119: the former was 16 experts."""
    one, two = pair(kind, *sizes, groups=groups)
    shapes = {"weight": tuple(one.weight.shape)}  # type: ignore[union-attr, arg-type]
    ends = []
    for net in (one, two):
        optimizer = AdamW2(net.named_parameters(), lr=0.1, model=net if shown else None)
        ends.append(steps(optimizer, net, 20, shapes))
        assert len(optimizer.stats()) == (groups if shown and groups == 4 else 1)
        assert any(entry.clipped for entry in optimizer.stats().values())
    assert torch.equal(ends[0]["weight"].flatten(), ends[1]["weight"].flatten())


class Stem(nn.Module):
    """Whisper's, with a block and a head behind it."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        taps: Any = 3 if dims == 1 else (3, 1)
        conv = nn.Conv1d if dims == 1 else nn.Conv2d
        self.conv1, self.conv2 = conv(80, 384, taps), conv(384, 384, taps)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)


@SHOWN
def test_whisper_s_stem_has_the_balanced_tau_of_its_2d_twin(shown: bool) -> None:
    taus = []
    for dims in (1, 2):
        net = Stem(dims)
        optimizer = AdamW2(net.named_parameters(), tau="auto", model=net if shown else None)
        steps(optimizer, net, 1)
        assert optimizer.stats().keys() == {
            "conv1.weight",
            "conv2.weight",
            "fc.weight",
            "head.weight",
        }
        buffers = optimizer._tensors.in_groups(optimizer.param_groups)  # type: ignore[union-attr]
        (buffer,) = (buffer for buffer in buffers if buffer.name == "fc.weight")
        taus.append(
            optimizer._thresholds.floor_and_tau(buffer.shards[0].parameter, 8, 8, "balanced")[1]
        )
    assert taus == [0.144 / 3, 0.144 / 3]


def test_groups_of_a_convolution_share_one_part_of_the_budget() -> None:
    """They are blocks of one block-diagonal matrix, whose σ₁ is the largest of theirs."""
    net = nn.ModuleDict(
        {"conv": nn.Conv1d(12, 12, 3, groups=4), "fc": nn.Linear(3, 3), "head": nn.Linear(3, 2)}
    )
    optimizer = AdamW2(net.named_parameters(), tau="auto", model=net)
    steps(optimizer, net, 1)
    assert len(optimizer.stats()) == 6 and optimizer._thresholds._hidden == 2


def test_what_is_measured_is_what_the_module_applies() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "grouped": nn.Conv1d(12, 8, 3, groups=2),
            "spread": nn.ConvTranspose1d(6, 4, 3, groups=2),
            "attention": nn.MultiheadAttention(6, 2),
            "gru": nn.GRU(5, 4),
        }
    )
    grouped, spread = (
        net.get_parameter(f"{name}.weight").detach().clone() for name in ("grouped", "spread")
    )
    attention, gates = (
        net["attention"].in_proj_weight.detach().clone(),
        net["gru"].weight_ih_l0.detach().clone(),
    )
    optimizer = AdamW2(net.parameters(), lr=10.0, model=net)  # a rate at which nothing is certified
    steps(optimizer, net, 1)
    expected = {f"grouped.weight[{g}]": part.flatten(1) for g, part in enumerate(grouped.chunk(2))}
    expected |= {f"spread.weight[{g}]": part.flatten(1) for g, part in enumerate(spread.chunk(2))}
    expected |= {
        f"attention.in_proj_weight[{part}]": m
        for part, m in zip("qkv", attention.chunk(3), strict=True)
    }
    expected |= {
        f"gru.weight_ih_l0[{gate}]": m for gate, m in zip("rzn", gates.chunk(3), strict=True)
    }
    stats = optimizer.stats()
    assert expected.keys() <= stats.keys()
    for name, matrix in expected.items():
        assert stats[name].sigma_weight == pytest.approx(
            float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-3
        ), name


class Attention(nn.Module):
    """nanoGPT's layer of three, q four times larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c_attn, self.c_proj = nn.Linear(32, 96, bias=False), nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            self.c_attn.weight[:32] *= 4


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    params = list(net.parameters())
    return [{"params": params[1:]}, {"params": params[:1], "weight_decay": 0.0}]


def test_without_names_it_says_once_what_is_not_split(caplog: pytest.LogCaptureFixture) -> None:
    """nanoGPT #213, timm's layer decay, the Trainer without DeepSpeed."""
    net = Attention()
    optimizer = AdamW2(groups_of(net))
    steps(optimizer, net, 2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(24, 8))]})
    steps(optimizer, net, 1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert (
        "'group1.param0' (96, 32) may be q, k and v" in record.message
        and "model=model" in record.message
    )
    assert "group1.param0" in optimizer.stats()


@pytest.mark.parametrize("rows", [64, 128, 97])
def test_weights_of_another_shape_than_three_stacked_ones_are_not_named(
    rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Linear(32, rows)
    steps(AdamW2(net.parameters()), net, 1)
    assert not caplog.records


def test_adamw_and_who_was_told_hear_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for options in (
        {"tau": float("inf")},
        {"overrides": [{"match": "group1.param0", "fused": 3}]},
        {"overrides": [{"match": "*", "fused": 1}]},
    ):
        net = Attention()
        steps(AdamW2(groups_of(net), **options), net, 1)
    assert not caplog.records


def test_the_model_gives_names_to_groups_that_have_none(caplog: pytest.LogCaptureFixture) -> None:
    ends, rates = [], []
    for shown in (True, False):
        net = Attention()
        if shown:
            optimizer = AdamW2(groups_of(net), lr=0.05, model=net)
        else:
            optimizer = AdamW2([{**g, "params": named} for g, named in named_groups(net)], lr=0.05)
        ends.append(steps(optimizer, net, 5))
        rates.append({name: entry.lr for name, entry in optimizer.stats().items()})
    assert rates[0] == rates[1] and rates[0].keys() == {
        f"c_attn.weight[{part}]" for part in "qkv"
    } | {"c_proj.weight"}
    assert rates[0]["c_attn.weight[q]"] > 2 * rates[0]["c_attn.weight[k]"]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not caplog.records


def named_groups(net: nn.Module) -> list[tuple[dict[str, Any], list[tuple[str, nn.Parameter]]]]:
    names = {id(param): name for name, param in net.named_parameters()}
    return [(group, [(names[id(p)], p) for p in group["params"]]) for group in groups_of(net)]


def test_it_says_once_what_weights_of_three_dimensions_were_taken_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = nn.Module()
    net.conv, net.deep = nn.Conv1d(24, 16, 3), nn.Conv1d(4, 4, 9, groups=4)
    net.experts = nn.Parameter(torch.randn(2, 6, 8))
    net.pos_embed = nn.Parameter(torch.randn(1, 6, 8))
    net.patch = nn.Conv2d(3, 4, 2)
    optimizer = AdamW2(net.named_parameters())
    steps(optimizer, net, 2)
    stacks, convolutions = (record.message for record in caplog.records)
    assert "'experts' (2, 6, 8)" in stacks and "pos_embed" not in stacks
    assert (
        "'conv.weight' (16, 24, 3), 'deep.weight' (4, 1, 9)" in convolutions
        and "patch" not in convolutions
    )
    assert "'kind': 'convolution' or 'experts'" in convolutions
    caplog.clear()
    told = [{"match": "*", "kind": "convolution"}, {"match": "experts", "kind": "experts"}]
    steps(AdamW2(net.named_parameters(), overrides=told), net, 1)
    steps(AdamW2(net.named_parameters(), model=net), net, 1)
    assert not caplog.records


def test_a_stack_that_has_the_shape_of_a_convolution_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its module is no convolution, and may still use it as one."""
    net = nn.Module()
    net.per_head = nn.Parameter(torch.randn(24, 2, 4))
    optimizer = AdamW2(net.parameters(), model=net)
    steps(optimizer, net, 2)
    (record,) = caplog.records
    assert "'per_head' (24, 2, 4)" in record.message and len(optimizer.stats()) == 24


@pytest.mark.parametrize(
    ("shape", "matrices"),
    [
        ((64, 48, 3), 1),
        ((96, 6, 16), 1),  # wav2vec 2.0's positions, grouped, of as many taps as 16
        ((512, 1, 10), 1),
        ((16, 1, 31), 1),  # depthwise, of more taps than channels
        ((8, 64, 128), 8),
        ((128, 48, 160), 128),
        ((1, 9, 16), 1),
    ],
)
def test_shapes_alone_tell_common_convolutions_from_common_experts(
    shape: tuple[int, ...], matrices: int
) -> None:
    weight = nn.Parameter(torch.randn(shape))
    optimizer = AdamW2([("weight", weight)])
    weight.grad = torch.randn(shape)
    optimizer.step()
    assert len(optimizer.stats()) == matrices


def test_copies_and_replaced_parameters_stay_what_they_are() -> None:
    """gaussian-splatting #897."""
    net = nn.Sequential(nn.Conv1d(12, 8, 3, groups=2))
    optimizer = AdamW2(net.parameters(), model=net)
    expected = {"0.weight[0]", "0.weight[1]"}
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for param in copied.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        copied.step()
        assert copied.stats().keys() == expected
    steps(optimizer, net, 1)
    net[0].weight = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.randn(10, 6, 3))
    optimizer.state.clear()
    steps(optimizer, net, 1)
    assert optimizer.stats().keys() == expected


def test_a_group_that_is_added_later_goes_by_the_model_s_names() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(12, 8, 3, groups=2))
    optimizer = AdamW2(net[0].parameters(), model=net)
    optimizer.add_param_group({"params": list(net[1].parameters())})
    steps(optimizer, net, 1)
    assert optimizer.stats().keys() == {"0.weight", "1.weight[0]", "1.weight[1]"}


def test_names_of_the_user_s_own_are_kept_and_known() -> None:
    net = nn.Sequential(nn.Conv1d(12, 8, 3, groups=2))
    optimizer = AdamW2(
        [(f"encoder.{name}", param) for name, param in net[0].named_parameters()], model=net
    )
    steps(optimizer, net, 1)
    assert optimizer.stats().keys() == {"encoder.weight[0]", "encoder.weight[1]"}


def test_the_optimizer_does_not_keep_the_model() -> None:
    net = nn.Sequential(nn.Linear(3, 4))
    optimizer, seen = AdamW2(net.named_parameters(), model=net), weakref.ref(net)
    steps(optimizer, net, 1)
    del net
    gc.collect()
    assert seen() is None


def test_another_model_s_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="model got a module that has none of the parameters"):
        AdamW2(nn.Linear(3, 4).parameters(), model=nn.Conv1d(3, 4, 2))
    with pytest.raises(ValueError, match="model got a str"):
        AdamW2(nn.Linear(3, 4).parameters(), model="gpt2")  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 2, 1), (2, 0, 1)])
def test_the_order_of_memory_changes_nothing(order: tuple[int, ...]) -> None:
    """As of weights that are views of another framework's (k, in, out)."""
    torch.manual_seed(0)
    plain = nn.Conv1d(6, 8, 3, groups=2, bias=False)
    turned = copy.deepcopy(plain)
    back = [order.index(dim) for dim in range(3)]
    turned.weight = nn.Parameter(plain.weight.detach().permute(order).contiguous().permute(back))
    assert not turned.weight.is_contiguous()
    ends, sigmas = [], []
    for net in (plain, turned):
        optimizer = AdamW2(net.named_parameters(), lr=0.05, model=net, power_iters=20)
        ends.append(steps(optimizer, net, 10)["weight"])
        sigmas.append([entry.sigma_weight for entry in optimizer.stats().values()])
    # Start vectors lie along other columns, so that σ₁ agrees as far as 20 iterations find it.
    torch.testing.assert_close(torch.tensor(sigmas[1]), torch.tensor(sigmas[0]), rtol=1e-3, atol=0)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-5)
