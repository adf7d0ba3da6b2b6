from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.processes import run_ranks
from weyl_megatron.engines.megatron.modules import fused_weights, global_names
from weyl_megatron.layouts.grid import Box, grid_of
from weyl_megatron.layouts.tensor_parallel import Sharding


class Layer(nn.Module):
    """Stands where Megatron's transformer layer does: numbered from 1 over all stages."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number
        self.norm = nn.LayerNorm(4)


class Stage(nn.Module):
    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(number) for number in numbers)


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def names(*chunks: nn.Module, expert_rank: int = 0) -> list[str]:
    return list(global_names(chunks, expert_rank).values())


def test_layers_are_numbered_over_all_stages_whatever_wraps_the_model() -> None:
    found = names(Wrapped(Wrapped(Stage(5, 6))), Wrapped(Stage(13)))
    assert [name for name in found if name.endswith("weight")] == [
        "layers.4.norm.weight",
        "layers.5.norm.weight",
        "layers.12.norm.weight",
    ]


def test_compiled_layers_and_models_keep_their_names() -> None:
    stage = Stage(5, 6)
    expected = names(Wrapped(stage))
    assert names(Wrapped(torch.compile(stage, backend="eager"))) == expected
    assert names(torch.compile(Wrapped(stage), backend="eager")) == expected
    stage.layers[1] = torch.compile(stage.layers[1], backend="eager")
    assert names(Wrapped(stage)) == expected


def test_names_that_two_chunks_share_are_told_apart() -> None:
    assert names(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)) == [
        "weight",
        "chunk1.weight",
    ]


def test_two_parameters_of_one_chunk_keep_two_names() -> None:
    odd = Wrapped(nn.Linear(2, 2, bias=False))
    odd.register_parameter("weight", nn.Parameter(torch.ones(2)))
    assert sorted(names(odd)) == ["module.weight", "weight"]


def test_experts_are_numbered_over_all_ranks() -> None:
    experts = nn.Module()
    experts.local_experts = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(2)])
    assert names(experts, expert_rank=3) == ["local_experts.6.weight", "local_experts.7.weight"]

    grouped = nn.Module()  # as Transformer Engine's grouped linear layer
    grouped.num_gemms = 2  # type: ignore[assignment]
    grouped.weight0, grouped.weight1 = (
        nn.Parameter(torch.ones(2, 2)),
        nn.Parameter(torch.ones(2, 2)),
    )
    assert names(grouped, expert_rank=3) == ["weight6", "weight7"]


def attention(rows: int, **config: object) -> nn.Module:
    module = nn.Module()
    module.config = SimpleNamespace(num_attention_heads=4, num_query_groups=2, **config)  # type: ignore[assignment]
    module.hidden_size_per_attention_head = 3  # type: ignore[assignment]
    module.linear_qkv = nn.Linear(5, rows, bias=False)
    return module


def test_linear_qkv_is_q_k_and_v_of_every_query_group() -> None:
    module = attention(rows=2 * (2 + 1 + 1) * 3)
    weight = module.linear_qkv.weight
    fused = fused_weights([module], {})[id(weight)]
    assert (fused.labels, fused.sizes) == (("q", "k", "v"), (12, 6, 6))
    blocks = grid_of(weight.shape, fused=fused).blocks
    assert [(b.matrix, b.grid_row, b.rows, b.row) for b in blocks] == [
        (0, 0, 6, 0),
        (1, 6, 3, 0),
        (2, 9, 3, 0),
        (0, 12, 6, 6),
        (1, 18, 3, 3),
        (2, 21, 3, 3),
    ]


def test_a_query_group_may_span_ranks() -> None:
    module = attention(rows=6)
    weight = module.linear_qkv.weight
    sharding = Sharding(None, 0, (6, 6, 6, 6), 1)  # type: ignore[arg-type]
    fused = fused_weights([module], {id(weight): sharding})[id(weight)]
    # Rows 6 to 11 of the whole weight: k and v of the first group.
    blocks = grid_of((24, 5), box=Box((6, 0), (6, 5)), fused=fused).blocks
    assert [(b.matrix, b.grid_row, b.rows, b.row) for b in blocks] == [(1, 0, 3, 0), (2, 3, 3, 0)]


def test_an_output_gate_is_a_matrix_of_its_own() -> None:
    module = attention(rows=2 * (2 + 2 + 1 + 1) * 3, attention_output_gate=True)
    assert fused_weights([module], {})[id(module.linear_qkv.weight)].labels == (
        "q",
        "gate",
        "k",
        "v",
    )


def test_a_weight_whose_rows_do_not_fit_the_pattern_is_left_whole() -> None:
    assert fused_weights([attention(rows=25)], {}) == {}


def gated(kind: str = "MLP", **config: object) -> nn.Module:
    module = type(kind, (nn.Module,), {})()
    module.config = SimpleNamespace(gated_linear_unit=True, **config)
    module.linear_fc1 = nn.Linear(5, 8, bias=False)
    return module


def test_every_rank_has_its_rows_of_gate_and_of_up() -> None:
    module = gated()
    weight = module.linear_fc1.weight
    sharding = Sharding(None, 0, (8, 8), 1)  # type: ignore[arg-type]
    fused = fused_weights([module], {id(weight): sharding})[id(weight)]
    assert fused.sizes == (8, 8)
    blocks = grid_of((16, 5), box=Box((8, 0), (8, 5)), fused=fused).blocks
    assert [(b.matrix, b.grid_row, b.rows, b.row) for b in blocks] == [(0, 0, 4, 4), (1, 4, 4, 4)]


def test_grouped_experts_may_interleave_gate_and_up() -> None:
    module = gated("TEGroupedMLP", moe_mlp_glu_interleave_size=2)
    pieces = fused_weights([module], {})[id(module.linear_fc1.weight)].pieces
    assert [(piece.part, piece.begin, piece.size) for piece in pieces] == [
        (0, 0, 2),
        (1, 2, 2),
        (0, 4, 2),
        (1, 6, 2),
    ]


def test_a_linear_fc1_without_a_gate_is_one_matrix() -> None:
    module = gated()
    module.config.gated_linear_unit = False
    assert fused_weights([module], {}) == {}


def test_packed_experts_are_refused_in_one_sentence() -> None:
    with pytest.raises(
        ValueError,
        match=r"module '' is a GroupedMLP, whose packed experts .* it takes TEGroupedMLP",
    ):
        fused_weights([gated("GroupedMLP")], {})


def test_in_proj_of_mamba_and_gated_delta_net_is_the_parts_that_they_split() -> None:
    pytest.importorskip("megatron.core.ssm.gated_delta_net", reason="megatron-core before 0.16")
    worker = Path(__file__).with_name("packed_worker.py")
    assert run_ranks("megatron", worker, 2).count("all agree") == 2


def test_newer_modules_say_themselves_what_they_pack() -> None:
    module = nn.Module()
    module.in_proj = nn.Linear(5, 14, bias=False)
    module.in_proj_split_sections = (4, 4, 6)  # type: ignore[assignment]
    module.in_proj_split_names = ["query", "key", "g"]  # type: ignore[assignment]
    fused = fused_weights([module], {})[id(module.in_proj.weight)]
    assert (fused.labels, fused.sizes) == (("query", "key", "g"), (4, 4, 6))
    other = nn.Module()
    other.in_proj = nn.Linear(5, 14, bias=False)
    other.in_proj.weight.partition_sizes = [4, 4, 2, 2, 2]  # type: ignore[attr-defined]
    assert fused_weights([other], {})[id(other.in_proj.weight)].labels == ("z", "x", "B", "C", "dt")
    other.in_proj.weight.partition_sizes = [4, 4, 6]  # type: ignore[attr-defined]
    assert fused_weights([other], {})[id(other.in_proj.weight)].labels == ("0", "1", "2")
