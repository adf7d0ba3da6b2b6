from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from weyl_megatron.layouts.adapters import adapter_partner, low_rank_pairs
from weyl_megatron.layouts.modules import kind_by_name, kinds_of

peft = pytest.importorskip("peft")

#: PEFT's methods and, of each, how many of its parameters are matrices; what is left is scales,
#: kernels and the like.
METHODS: dict[str, tuple[Any, int]] = {
    "LoRA": (lambda: peft.LoraConfig(r=2, target_modules=["up"]), 2),
    "DoRA": (lambda: peft.LoraConfig(r=2, target_modules=["up"], use_dora=True), 2),
    "LoRA of an embedding": (lambda: peft.LoraConfig(r=2, target_modules=["table"]), 2),
    "LoRA of a convolution": (lambda: peft.LoraConfig(r=2, target_modules=["conv"]), 2),
    "AdaLoRA": (lambda: peft.AdaLoraConfig(target_modules=["up"], total_step=9), 2),
    "VeRA": (lambda: peft.VeraConfig(r=2, target_modules=["up"]), 0),
    "IA³": (lambda: peft.IA3Config(target_modules=["up"], feedforward_modules=[]), 0),
    "LoHa": (lambda: peft.LoHaConfig(r=2, target_modules=["up"]), 4),
    "LoKr": (lambda: peft.LoKrConfig(r=2, target_modules=["up"]), 3),
    "OFT": (lambda: peft.OFTConfig(oft_block_size=4, target_modules=["up"]), 0),
    "BOFT": (lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["up"]), 0),
    "HRA": (lambda: peft.HRAConfig(r=2, target_modules=["up"]), 1),
    "VB-LoRA": (
        lambda: peft.VBLoRAConfig(target_modules=["up"], vector_length=4, num_vectors=6),
        1,
    ),
    "RandLoRA": (lambda: peft.RandLoraConfig(r=2, target_modules=["up"]), 0),
    "DeLoRA": (lambda: peft.DeloraConfig(r=2, target_modules=["up"]), 2),
}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.up = nn.Linear(8, 24)
        self.head = nn.Linear(24, 12)


@pytest.mark.filterwarnings(
    "ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly"
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_peft_is_an_adapter_by_its_module_and_by_its_name(method: str) -> None:
    make, matrices = METHODS[method]
    net = peft.get_peft_model(Base(), make())
    kinds = kinds_of(net)
    trained = {name: param for name, param in net.named_parameters() if param.requires_grad}
    assert trained
    assert {kinds[name].role for name in trained} == {"adapter"}
    assert sum(kinds[name].form != "vector" for name in trained) == matrices
    for name, param in trained.items():
        by_name = kind_by_name(name, tuple(param.shape))
        assert param.dim() < 2 or (by_name is not None and by_name.form == kinds[name].form), name


def test_a_method_that_no_name_tells_is_what_its_layers_list() -> None:
    class Layer(nn.Linear):
        adapter_layer_names = ("new_factor", "new_lengths")

        def __init__(self) -> None:
            super().__init__(4, 5)
            self.new_factor = nn.ParameterDict({"default": torch.zeros(5, 2)})
            self.new_lengths = nn.ParameterDict({"default": torch.zeros(5, 1)})

    kinds = kinds_of(nn.ModuleDict({"q": Layer()}))
    roles = {name: (kind.role, kind.form) for name, kind in kinds.items()}
    assert roles["q.new_factor.default"] == ("adapter", "matrix")
    assert roles["q.new_lengths.default"] == ("adapter", "vector")
    assert kinds["q.weight"].role is None


@pytest.mark.parametrize(
    ("name", "partner"),
    [
        ("q.lora_A.default.weight", "q.lora_B.default.weight"),
        ("q.lora_a.weight", "q.lora_b.weight"),
        ("to_q_lora.down.weight", "to_q_lora.up.weight"),  # diffusers
        ("lora_unet_mid.lora_up.weight", "lora_unet_mid.lora_down.weight"),  # kohya
        ("linear_qkv.adapter.linear_in.weight", "linear_qkv.adapter.linear_out.weight"),  # NeMo
        ("mlp.linear_in.weight", None),
        ("down.weight", None),
        ("q.weight", None),
    ],
)
def test_names_of_several_libraries_tell_factors(name: str, partner: str | None) -> None:
    assert adapter_partner(name) == partner


A, B = (8, 64), (128, 8)


def test_shapes_tell_a_home_made_adapter_where_nothing_else_is_trained() -> None:
    pair = {"q.first": A, "q.second": B}
    assert low_rank_pairs(pair) == {"q.first": "q.second", "q.second": "q.first"}
    turned = {"q.first": (80, 8), "q.second": (8, 96)}
    assert low_rank_pairs(turned) == {"q.first": "q.second", "q.second": "q.first"}
    assert low_rank_pairs(pair | {"k.weight": (64, 64)}) == {}
    assert set(low_rank_pairs(pair | {"k.weight": (64, 64)}, is_partly_frozen=True)) == set(pair)
    assert set(low_rank_pairs(pair | {"head.weight": (9, 64)}, {"head.weight"})) == set(pair)


@pytest.mark.parametrize(
    "shapes",
    [
        {"mlp.up.weight": (256, 64), "mlp.down.weight": (64, 256)},
        {"mlp.up.weight": (512, 64), "mlp.down.weight": (64, 512)},  # Gemma's
        {"encoder.0.weight": A, "decoder.0.weight": B},
        {"q.a.weight": (32, 64), "q.b.weight": (64, 32)},
        {"q.bias": (8,), "k.bias": (8,)},
    ],
    ids=["an MLP", "a wide MLP", "two layers", "half as thin", "vectors"],
)
def test_what_is_no_adapter_by_shape(shapes: dict[str, tuple[int, ...]]) -> None:
    assert low_rank_pairs(shapes, is_partly_frozen=True) == {}


class HomeMade(nn.Module):
    """Neither names nor a library's classes tell."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(128, 64), requires_grad=False)
        self.first = nn.Parameter(torch.randn(*A))
        self.second = nn.Parameter(torch.zeros(*B))


def test_a_home_made_adapter_is_known_beside_what_is_frozen() -> None:
    kinds = kinds_of(
        nn.ModuleDict({"q": HomeMade(), "norm": nn.LayerNorm(4), "out": nn.Linear(128, 64)})
    )
    assert {name for name, kind in kinds.items() if kind.role == "adapter"} == {
        "q.first",
        "q.second",
    }
    assert kinds["q.first"].partner == "q.second"
