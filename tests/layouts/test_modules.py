from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.utils import parametrizations, prune, weight_norm

from tests.layouts.test_grid import rebuild
from weyl_megatron.layouts.buffers import Layout, Parameter
from weyl_megatron.layouts.kinds import Kind
from weyl_megatron.layouts.modules import SeenModel, kind_by_name, kinds_of
from weyl_megatron.settings import check_settings
from weyl_megatron.thresholds import Thresholds
from weyl_megatron.transformer.reparam import sigma_reparam

OPTIONS: dict[str, Any] = {
    "power_iters": 2,
    "floor_std": 1e-3,
    "clip_vectors": False,
    "io": None,
    "others": {},
}


def matrices_of(module: nn.Module, name: str, **override: Any) -> list[Tensor]:
    """The matrices that a module's parameter is measured as."""
    weight = dict(module.named_parameters())[name].detach()
    overrides = [{"match": name, **override}] if override else []
    parameter = Parameter(name, tuple(weight.shape), kind=kinds_of(module)[name])
    given_settings = check_settings(tau=0.01, overrides=overrides, **OPTIONS)
    grid = Thresholds(given_settings, Layout([], parameters=[parameter]), False).grid(parameter)
    return [] if grid is None else rebuild(grid, weight)


def singular_values(*matrices: Tensor) -> Tensor:
    """All that are not 0, the largest first: also those of the block-diagonal matrix of
    ``matrices``.
    """
    values = torch.cat([torch.linalg.svdvals(matrix.double()) for matrix in matrices])
    return values[values > 1e-6].sort(descending=True).values


def applied(module: nn.Module, features: int, taps: tuple[int, ...]) -> Tensor:
    """The matrix of the linear map that a convolution makes of one window, or of one place that it
    spreads.
    """
    place = torch.zeros(features, *taps)
    jacobian: Tensor = jacrev(lambda x: module(x[None]).flatten())(place)
    return jacobian.flatten(1)


@pytest.mark.parametrize("taps", [(3,), (3, 2), (2, 1, 2)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_convolution_is_the_matrices_that_it_applies_to_a_window(
    taps: tuple[int, ...], groups: int
) -> None:
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(taps) - 1](12, 6, taps, groups=groups, bias=False)
    matrices = matrices_of(conv, "weight")
    assert len(matrices) == groups
    # 1e-5: torch convolves in float32.
    torch.testing.assert_close(
        singular_values(*matrices), singular_values(applied(conv, 12, taps)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("taps", [(3,), (3, 2), (2, 1, 2)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_transposed_convolution_is_the_matrices_that_spread_a_place(
    taps: tuple[int, ...], groups: int
) -> None:
    kinds = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    conv = kinds[len(taps) - 1](12, 6, taps, groups=groups, bias=False)
    matrices = matrices_of(conv, "weight")
    assert len(matrices) == groups
    expected = singular_values(applied(conv, 12, (1,) * len(taps)))
    torch.testing.assert_close(singular_values(*matrices), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(8, 8, 3, groups=8),
        nn.Conv1d(8, 16, 3, groups=8),
        nn.Conv2d(8, 4, 3, groups=4),  # one channel out of each group
        nn.ConvTranspose1d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 4, 3, groups=4),
    ],
    ids=["depthwise", "with a multiplier", "one out", "transposed", "transposed, one out"],
)
def test_a_depthwise_convolution_is_one_matrix_of_all_its_taps(conv: nn.Module) -> None:
    weight = dict(conv.named_parameters())["weight"].detach()
    (matrix,) = matrices_of(conv, "weight")
    assert torch.equal(matrix, weight.flatten(1))
    assert (
        torch.linalg.matrix_norm(matrix, 2) >= weight.flatten(1).norm(dim=1).max()
    )  # the layer's own σ₁


def test_attention_is_q_k_and_v() -> None:
    attention = nn.MultiheadAttention(6, 2)
    found = matrices_of(attention, "in_proj_weight")
    assert all(map(torch.equal, found, attention.in_proj_weight.detach().chunk(3)))
    apart = nn.MultiheadAttention(6, 2, kdim=5, vdim=4)
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        assert torch.equal(
            matrices_of(apart, name)[0], dict(apart.named_parameters())[name].detach()
        )


@pytest.mark.parametrize(
    ("net", "name", "gates"),
    [
        (nn.LSTM(5, 4, 2, proj_size=3), "weight_ih_l1", 4),
        (nn.LSTM(5, 4, bidirectional=True), "weight_hh_l0_reverse", 4),
        (nn.LSTM(5, 4, proj_size=3), "weight_hr_l0", 1),
        (nn.GRU(5, 4), "weight_hh_l0", 3),
        (nn.RNN(5, 4), "weight_hh_l0", 1),
        (nn.LSTMCell(5, 4), "weight_ih", 4),
        (nn.GRUCell(5, 4), "weight_hh", 3),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_recurrent_weight_is_a_matrix_for_each_gate(
    net: nn.Module, name: str, gates: int
) -> None:
    found, weight = matrices_of(net, name), dict(net.named_parameters())[name].detach()
    assert len(found) == gates and all(map(torch.equal, found, weight.chunk(gates)))


def test_a_bilinear_map_is_linear_in_the_outer_product() -> None:
    several, single = nn.Bilinear(3, 4, 5), nn.Bilinear(3, 4, 1)
    left, right = torch.randn(3), torch.randn(4)
    (matrix,) = matrices_of(several, "weight")
    torch.testing.assert_close(
        matrix @ torch.outer(left, right).flatten() + several.bias, several(left, right)
    )
    (matrix,) = matrices_of(single, "weight")
    torch.testing.assert_close((left @ matrix @ right)[None] + single.bias, single(left, right))


class Experts(nn.Module):
    """A stack beside a convolution of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(16, 6, 3))
        self.up_bias = nn.Parameter(torch.randn(16, 3))
        self.router = nn.Parameter(torch.randn(16, 6))
        self.conv = nn.Conv1d(6, 16, 3)
        self.position = nn.Parameter(torch.randn(1, 7, 6))
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.picture = nn.Parameter(torch.randn(4, 3, 2, 2))


def test_modules_tell_experts_from_convolutions_of_one_shape() -> None:
    net = Experts()
    assert all(map(torch.equal, matrices_of(net, "up"), net.up.detach()))
    assert torch.equal(matrices_of(net, "conv.weight")[0], net.conv.weight.detach().flatten(1))
    assert torch.equal(matrices_of(net, "position")[0], net.position.detach()[0])
    assert torch.equal(matrices_of(net, "router")[0], net.router.detach())
    assert torch.equal(matrices_of(net, "picture")[0], net.picture.detach().flatten(1))
    assert matrices_of(net, "up_bias") == matrices_of(net, "token") == []


def test_gains_of_norms_are_no_matrices_whatever_their_shape() -> None:
    net = nn.Sequential(nn.LayerNorm((4, 5)), nn.LayerNorm((3, 4, 5)), nn.RMSNorm((4, 5)))
    assert {kind.form for kind in kinds_of(net).values()} == {"vector"}


class GatedExperts(nn.Module):
    """As Hugging Face's decorator marks them."""

    def __init__(self, **marks: bool) -> None:
        super().__init__()
        rows, cols = (3, 8) if marks.get("is_transposed") else (8, 3)
        self.gate_up_proj = nn.Parameter(torch.randn(2, rows, cols))
        for name, mark in marks.items():
            setattr(self, name, mark)


def test_gate_and_up_of_experts_are_apart_where_their_module_says_how_they_lie() -> None:
    known = {"has_gate": True, "is_concatenated": True}
    for transposed in (False, True):
        net = GatedExperts(**known, is_transposed=transposed)
        expected = [
            part
            for expert in net.gate_up_proj.detach()
            for part in expert.chunk(2, int(transposed))
        ]
        assert all(map(torch.equal, matrices_of(net, "gate_up_proj"), expected))
    assert len(matrices_of(GatedExperts(has_gate=True, is_concatenated=False), "gate_up_proj")) == 2
    assert len(matrices_of(GatedExperts(), "gate_up_proj")) == 2


def test_overrides_part_experts_and_convolutions() -> None:
    net = GatedExperts()
    stack = net.gate_up_proj.detach()
    halves = [part for expert in stack for part in expert.chunk(2)]
    assert all(map(torch.equal, matrices_of(net, "gate_up_proj", fused=2), halves))
    sizes = [part for expert in stack for part in expert.split([1, 2], 1)]
    assert all(map(torch.equal, matrices_of(net, "gate_up_proj", fused=[1, 2]), sizes))
    conv = nn.Conv1d(4, 6, 3)
    weight = conv.weight.detach()
    assert all(map(torch.equal, matrices_of(conv, "weight", fused=3), weight.flatten(1).chunk(3)))
    by_input = [part.flatten(1) for part in weight.split([1, 3], 1)]
    assert all(map(torch.equal, matrices_of(conv, "weight", fused=[1, 3]), by_input))
    (whole,) = matrices_of(nn.Conv1d(4, 6, 3, groups=2), "weight", fused=1)
    assert whole.shape == (6, 6)
    with pytest.raises(ValueError, match=r"'fused' of parameter 'weight' got 5, but it takes"):
        matrices_of(conv, "weight", fused=5)


def test_an_override_says_what_a_weight_of_three_dimensions_is() -> None:
    net = Experts()
    assert torch.equal(matrices_of(net, "up", kind="convolution")[0], net.up.detach().flatten(1))
    assert len(matrices_of(net, "conv.weight", kind="experts")) == 16
    assert (
        len(matrices_of(nn.Conv1d(4, 6, 3, groups=2), "weight", kind="convolution")) == 2
    )  # its module knows more
    assert len(matrices_of(nn.Linear(3, 4), "weight", kind="experts")) == 1
    with pytest.raises(
        ValueError, match="overrides' kind got 'linear', it takes 'convolution' or 'experts'"
    ):
        matrices_of(net, "up", kind="linear")


@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: sigma_reparam(nn.ModuleList([conv])),
    ],
    ids=["weight_norm", "weight_norm's parametrization", "spectral_norm", "prune", "σReparam"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_weight_that_is_computed_from_another_is_its_module_s(
    change: Callable[[nn.Module], Any],
) -> None:
    conv = nn.Conv2d(6, 4, 3, groups=2)
    change(conv)
    forms = {name: kind for name, kind in kinds_of(conv).items() if name != "bias"}
    weights = [name for name, kind in forms.items() if kind == Kind("convolution", groups=2)]
    assert len(weights) == 1
    assert all(kind.form == "vector" for name, kind in forms.items() if name not in weights)
    assert len(matrices_of(conv, weights[0])) == 2


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_the_lengths_of_weight_norm_are_known_by_name_alone() -> None:
    for net in (weight_norm(nn.Linear(3, 4)), parametrizations.weight_norm(nn.Linear(3, 4))):
        forms = {
            name: kind_by_name(name, tuple(param.shape)) for name, param in net.named_parameters()
        }
        assert [kind.form for kind in forms.values() if kind is not None] == ["vector"]


def test_lora_s_factors_know_each_other() -> None:
    """PEFT's, and what goes by the same names elsewhere."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Conv1d(5, 6, 3))
    net = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["0", "1", "2"], r=2, use_dora=False)
    )
    kinds = kinds_of(net)
    trained = [name for name, param in net.named_parameters() if param.requires_grad]
    assert len(trained) == 6
    for name in trained:
        assert kinds[name].role == "adapter" and kinds[kinds[name].partner or ""].partner == name
        by_name = kind_by_name(name, tuple(net.get_parameter(name).shape))
        assert by_name is not None and by_name.partner == kinds[name].partner
    assert [kinds[name].form for name in trained if ".2." in name] == ["convolution", "convolution"]
    assert kinds["base_model.model.0.base_layer.weight"].role == "embedding"


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("h.0.q.lora_magnitude_vector.default.weight", (1, 4, 1, 1), Kind("vector")),
        ("h.0.q.ia3_l.default", (4, 1), Kind("vector")),
        ("h.0.q.lora_E.default", (4, 1), Kind("vector")),
        ("h.0.q.weight", (4, 3), None),
        (
            "h.0.q.lora_up.weight",
            (4, 2),
            Kind("matrix", role="adapter", partner="h.0.q.lora_down.weight"),
        ),
        ("h.0.q.lora_A", (2, 4), Kind("matrix", role="adapter", partner="h.0.q.lora_B")),
    ],
)
def test_adapters_are_known_by_their_names(
    name: str, shape: tuple[int, ...], kind: Kind | None
) -> None:
    assert kind_by_name(name, shape) == kind


def test_a_factor_whose_partner_the_model_does_not_have_has_none() -> None:
    net = nn.ModuleDict({"lora_A": nn.Linear(3, 2), "other": nn.Linear(2, 3)})
    assert kinds_of(net)["lora_A.weight"].partner is None


def test_the_model_is_not_kept_and_its_parameters_go_by_its_names() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(3, 4, 2))
    first, foreign = net[0].weight, nn.Parameter(torch.zeros(2))
    seen = SeenModel(net)
    assert seen.names([first, foreign]) == ["0.weight", None]
    seen.rename([first], ["encoder.0.weight"])
    assert seen.kinds["encoder.0.weight"] == seen.kinds["0.weight"]
    with pytest.raises(ValueError, match=r"model got a list, it takes a torch\.nn\.Module"):
        SeenModel([net])  # type: ignore[arg-type]


def test_wrappers_do_not_change_what_a_parameter_is() -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Linear(3, 4))
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = net
    assert kinds_of(wrapped) == kinds_of(net)


@given(data=st.data(), transposed=st.booleans(), dims=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_any_convolution_in_any_memory_order_is_what_it_applies(
    data: st.DataObject, transposed: bool, dims: int
) -> None:
    """Channels last, and weights that are views of another framework's (k, in, out), have the same
    σ₁.
    """
    groups = data.draw(st.integers(1, 3))
    inputs, outputs = (groups * data.draw(st.integers(2, 4)) for _ in range(2))
    taps = tuple(data.draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    names = ("ConvTranspose" if transposed else "Conv") + f"{dims}d"
    conv = getattr(nn, names)(inputs, outputs, taps, groups=groups, bias=False)
    weight = conv.weight.detach()
    order = data.draw(st.permutations(range(weight.dim())))
    parameter = Parameter(
        "weight", tuple(weight.shape), kind=kinds_of(conv)["weight"], order=tuple(order)
    )
    plain = check_settings(tau=0.01, overrides=(), **OPTIONS)
    grid = Thresholds(plain, Layout([], parameters=[parameter]), False).grid(parameter)
    assert grid is not None
    assert sum(block.rows * block.cols for block in grid.blocks) == weight.numel()
    matrices = rebuild(grid, weight.permute(order).contiguous())
    expected = applied(conv, inputs, (1,) * dims if transposed else taps)
    torch.testing.assert_close(
        singular_values(*matrices), singular_values(expected), rtol=1e-5, atol=1e-5
    )


@given(shape=st.lists(st.integers(1, 5), min_size=3, max_size=4), data=st.data())
@settings(deadline=None, max_examples=100)
def test_experts_in_any_memory_order_are_the_same_matrices(
    shape: list[int], data: st.DataObject
) -> None:
    weight = torch.randn(shape)
    order = data.draw(st.permutations(range(len(shape))))
    fused = data.draw(st.sampled_from([None, 2, 3]))
    if fused is not None and shape[-2] % fused and shape[-1] % fused:
        fused = None
    overrides = [] if fused is None else [{"match": "*", "fused": fused}]
    parameter = Parameter("w", tuple(shape), kind=Kind("experts"), order=tuple(order))
    if parameter.is_vector:
        return
    given_settings = check_settings(tau=0.01, overrides=overrides, **OPTIONS)
    grid = Thresholds(given_settings, Layout([], parameters=[parameter]), False).grid(parameter)
    assert grid is not None
    matrices = rebuild(grid, weight.permute(order).contiguous())
    expected = list(weight.flatten(0, -3))
    if fused is not None:
        axis = 0 if shape[-2] % fused == 0 else 1
        expected = [part for expert in expected for part in expert.chunk(fused, axis)]
    for found, matrix in zip(matrices, expected, strict=True):
        assert torch.equal(found, matrix) or torch.equal(found.T, matrix)


def test_a_tied_weight_is_an_embedding_whichever_owner_comes_first() -> None:
    net = nn.ModuleDict({"out": nn.Linear(4, 7, bias=False), "words": nn.Embedding(7, 4)})
    net["out"].weight = net["words"].weight
    assert {name: kind.role for name, kind in kinds_of(net).items()} == {
        "out.weight": "embedding",
        "words.weight": "embedding",
    }


def test_a_hugging_face_head_is_known_whatever_it_is_called() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decode = nn.Linear(4, 7)

        def get_output_embeddings(self) -> nn.Module:
            return self.decode

    assert {name: kind.role for name, kind in kinds_of(Model()).items()} == {
        "decode.weight": "head",
        "decode.bias": None,
    }
