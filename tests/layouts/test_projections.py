"""Projections that modules split are one matrix per part: of Hugging Face's real modules, σ₁ and
the bound of every part beside SVD's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tolerances
from tests.layouts.test_modules import matrices_of
from weyl_megatron import AdamW2
from weyl_megatron.layouts.projections import split_rows

pytest.importorskip("transformers")

Parts = Mapping[str, Tensor]

#: Of all models.
SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 1}


def stacked(weight: Tensor, **sizes: int) -> Parts:
    return dict(zip(sizes, weight.split(list(sizes.values())), strict=True))


def per_head(weight: Tensor, heads: int, **sizes: int) -> Parts:
    """As the modules do: heads apart, and each one split."""
    split = weight.view(heads, -1, weight.shape[1]).split(list(sizes.values()), dim=1)
    return {label: part.flatten(0, 1) for label, part in zip(sizes, split, strict=True)}


def deepseek_v3(q_lora_rank: int | None) -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SMALL,
            intermediate_size=32,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=10,
            qk_nope_head_dim=5,
            qk_rope_head_dim=4,
            v_head_dim=3,
            first_k_dense_replace=1,
        )
    )


def deepseek_with_low_rank() -> tuple[nn.Module, dict[str, Callable[[Tensor], Parts]]]:
    return deepseek_v3(12), {
        "self_attn.q_b_proj": lambda w: per_head(w, 4, nope=5, rope=4),
        "self_attn.kv_b_proj": lambda w: per_head(w, 4, k=5, v=3),
        "self_attn.kv_a_proj_with_mqa": lambda w: stacked(w, latent=10, rope=4),
    }


def deepseek_without() -> tuple[nn.Module, dict[str, Callable[[Tensor], Parts]]]:
    return deepseek_v3(None), {"self_attn.q_proj": lambda w: per_head(w, 4, nope=5, rope=4)}


def mamba2() -> tuple[nn.Module, dict[str, Callable[[Tensor], Parts]]]:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(**SMALL, num_heads=6, head_dim=8, expand=2, n_groups=2, state_size=4)
    return Mamba2ForCausalLM(config), {
        "mixer.in_proj": lambda w: stacked(w, z=48, x=48, B=8, C=8, dt=6)
    }


def mamba() -> tuple[nn.Module, dict[str, Callable[[Tensor], Parts]]]:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(**SMALL, expand=2, state_size=4, time_step_rank=3)
    return MambaForCausalLM(config), {
        "mixer.in_proj": lambda w: stacked(w, x=48, z=48),
        "mixer.x_proj": lambda w: stacked(w, dt=3, B=4, C=4),
    }


def qwen3_next() -> tuple[nn.Module, dict[str, Callable[[Tensor], Parts]]]:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **SMALL,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=5,
        linear_value_head_dim=3,
        layer_types=["linear_attention"],
        mlp_only_layers=[0],
        num_experts=0,
    )
    return Qwen3NextForCausalLM(config), {
        "linear_attn.in_proj_qkvz": lambda w: per_head(w, 2, q=5, k=5, v=6, z=6),
        "linear_attn.in_proj_ba": lambda w: per_head(w, 2, b=2, a=2),
    }


@pytest.mark.parametrize(
    "make", [deepseek_with_low_rank, deepseek_without, mamba2, mamba, qwen3_next]
)
@tolerances.every_iteration()
def test_each_part_has_the_bound_of_its_own_singular_values(
    make: Callable[[], tuple[nn.Module, dict[str, Callable[[Tensor], Parts]]]],
) -> None:
    torch.manual_seed(0)
    model, projections = make()
    tau, rate = 0.01, 0.1
    optimizer = AdamW2(
        model.parameters(), lr=rate, betas=(0.0, 0.0), weight_decay=0.0, tau=tau, model=model
    )
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    stats, after = optimizer.stats(), dict(model.named_parameters())
    clipped = 0
    for ending, split in projections.items():
        [name] = [name for name in before if name.endswith(f"{ending}.weight")]
        parts = split(before[name])
        labels = {key for key in stats if key.startswith(f"{name}[")}
        assert labels == {f"{name}[{label}]" for label in parts} and name not in stats
        steps = split(before[name] - after[name].detach())
        for label, weight in parts.items():
            entry = stats[f"{name}[{label}]"]
            sigma = float(torch.linalg.matrix_norm(weight.double(), 2))
            # 1e-4: block power iteration on small matrices, in float32.
            assert entry.sigma_weight == pytest.approx(sigma, rel=1e-4)
            moved = float(torch.linalg.matrix_norm(steps[label].double(), 2))
            assert moved == pytest.approx(entry.lr * entry.sigma_update, rel=1e-3)
            assert moved <= tau * sigma * 1.001
            clipped += entry.clipped
    assert clipped, "nothing was clipped: the case shows nothing"


def test_a_head_s_rows_may_be_a_matrix_of_their_own() -> None:
    """As a user asks for it: every head of q, and every head of GPT-2's stacked q, k and v."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 12), "c_attn": nn.Linear(8, 24)})
    overrides = [{"match": "q_proj.weight", "fused": 4}, {"match": "c_attn.weight", "fused": 3 * 2}]
    optimizer = AdamW2(model.named_parameters(), overrides=overrides)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    weights = {name: layer.weight.detach().clone() for name, layer in model.items()}
    optimizer.step()
    stats = optimizer.stats()
    assert len(stats) == 4 + 6
    for name, heads in {"q_proj": 4, "c_attn": 6}.items():
        for number, head in enumerate(weights[name].chunk(heads)):
            sigma = float(torch.linalg.matrix_norm(head, 2))
            # A first step's estimate is within a hundredth.
            found = stats[f"{name}.weight[{number}]"].sigma_weight
            assert found == pytest.approx(sigma, rel=1e-2)


def test_gate_and_up_of_experts_that_say_nothing_are_seen_beside_the_projection_back() -> None:
    from transformers import GptOssConfig, Llama4TextConfig, LongcatFlashConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

    sizes = {"hidden_size": 6, "intermediate_size": 5}
    llama = Llama4TextExperts(Llama4TextConfig(**sizes, num_local_experts=2))
    longcat = LongcatFlashExperts(
        LongcatFlashConfig(
            hidden_size=6, expert_ffn_hidden_size=5, n_routed_experts=2, zero_expert_num=0
        )
    )
    for experts, dim in ((llama, 2), (longcat, 1)):
        weight = nn.init.normal_(experts.gate_up_proj).detach()
        parts = [part for matrix in weight for part in matrix.chunk(2, dim - 1)]
        matrices = matrices_of(experts, "gate_up_proj")
        assert len(matrices) == 2 * 2
        for matrix, part in zip(matrices, parts, strict=True):
            torch.testing.assert_close(torch.linalg.svdvals(matrix), torch.linalg.svdvals(part))
    in_turn = GptOssExperts(GptOssConfig(**sizes, num_local_experts=2))
    nn.init.normal_(in_turn.gate_up_proj)
    assert len(matrices_of(in_turn, "gate_up_proj")) == 2


MLA = SimpleNamespace(
    qk_nope_head_dim=5,
    qk_rope_head_dim=4,
    v_head_dim=3,
    kv_lora_rank=10,
    q_lora_rank=None,
    num_heads=4,
)


def test_a_band_of_heads_is_split_and_what_is_packed_otherwise_is_not() -> None:
    assert (
        split_rows("kv_b_proj", MLA, 4 * 8) == split_rows("kv_b_proj", MLA, 8) == {"k": 5, "v": 3}
    )
    assert split_rows("kv_b_proj", MLA, 33) == {}
    assert split_rows("q_proj", MLA, 4 * 9) == {"nope": 5, "rope": 4}
    assert split_rows("q_proj", MLA, 2 * 4 * 9) == {}  # with a gate beside it, say
    assert split_rows("q_b_proj", MLA, 4 * 9) == {}
    assert split_rows("o_proj", MLA, 24) == {}


def test_a_module_that_takes_rows_in_turn_is_left_whole() -> None:
    """Zamba's x and z are rows in turn; GPT-OSS's gate and up are columns in turn."""
    zamba = SimpleNamespace(
        intermediate_size=6, ssm_state_size=2, time_step_rank=1, n_mamba_heads=2
    )
    assert split_rows("in_proj", zamba, 12) == {}
    zamba.__dict__.pop("n_mamba_heads")
    assert split_rows("in_proj", zamba, 12) == {"x": 6, "z": 6}
