"""Projections that a module splits once it has multiplied: which rows of the weight are which part.

The attributes are those of Hugging Face's modules; an engine's own say it in its folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Attributes that tell a kind of module.
_MLA = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
_MAMBA2 = ("intermediate_size", "n_groups", "ssm_state_size", "num_heads")
_MAMBA = ("intermediate_size", "ssm_state_size", "time_step_rank")
_DELTA = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")


def split_rows(attribute: str, module: Any, rows: int) -> Mapping[str, int]:
    """Return how many consecutive rows each part has, by its label, in an order that repeats down
    the weight; empty: it is one matrix.

    ======================  ======================================  ======================
    module                  projection                              parts
    ======================  ======================================  ======================
    MLA (DeepSeek and kin)  ``kv_b_proj``                           per head [k, v]
    …                       ``q_b_proj``, or ``q_proj``             per head [nope, rope]
    …                       ``kv_a_proj_with_mqa``                  [latent, rope]
    Mamba-2                 ``in_proj``                             [z, x, B, C, dt]
    Mamba                   ``in_proj``; ``x_proj``                 [x, z]; [dt, B, C]
    Gated DeltaNet          ``in_proj_qkvz``                        per head [q, k, v, z]
    …                       ``in_proj_ba``; ``in_proj_qkv``         per head [b, a]; [q, k, v]
    ======================  ======================================  ======================

    Args:
        attribute: what the module calls the projection.
        module: that splits what comes out of it.
        rows: of the weight, or of this rank's band of it.
    """
    parts, most = _parts(attribute, module)
    period = sum(parts.values())
    fits = period > 0 and min(parts.values()) > 0 and rows % period == 0
    # Bands of heads are fewer; what is more than all heads is packed in another way.
    return parts if fits and most % (rows // period) == 0 else {}


def _parts(attribute: str, module: Any) -> tuple[dict[str, int], int]:
    """Return the parts in one period, and how many periods the whole weight has."""
    if sizes := _numbers(module, _MLA):
        nope, rope, value, rank = sizes
        if attribute == "kv_a_proj_with_mqa":
            return {"latent": rank, "rope": rope}, 1
        heads = getattr(getattr(module, "config", None), "num_attention_heads", 0)
        heads = heads or getattr(module, "num_heads", 0)
        if attribute == "kv_b_proj":
            return {"k": nope, "v": value}, heads
        has_low_rank = getattr(module, "q_lora_rank", None) is not None
        if attribute == ("q_b_proj" if has_low_rank else "q_proj"):
            return {"nope": nope, "rope": rope}, heads
    elif sizes := _numbers(module, _MAMBA2):
        inner, groups, state, heads = sizes
        if attribute == "in_proj":
            states = groups * state
            return {"z": inner, "x": inner, "B": states, "C": states, "dt": heads}, 1
    elif sizes := _numbers(module, _MAMBA):
        inner, state, rank = sizes
        # Zamba, whose Mamba has heads, takes x and z from rows in turn.
        if attribute == "in_proj" and not hasattr(module, "n_mamba_heads"):
            return {"x": inner, "z": inner}, 1
        if attribute == "x_proj":
            return {"dt": rank, "B": state, "C": state}, 1
    elif sizes := _numbers(module, _DELTA):
        k_heads, v_heads, k_width, v_width = sizes
        v_rows = v_heads // max(1, k_heads)
        if attribute == "in_proj_qkvz":
            wide = v_rows * v_width
            return {"q": k_width, "k": k_width, "v": wide, "z": wide}, k_heads
        if attribute == "in_proj_ba":
            return {"b": v_rows, "a": v_rows}, k_heads
        if attribute == "in_proj_qkv":
            keys = k_heads * k_width
            return {"q": keys, "k": keys, "v": v_heads * v_width}, 1
    return {}, 0


def _numbers(module: Any, names: tuple[str, ...]) -> list[int]:
    """Return the attributes of those names, or none where one is no whole number."""
    numbers = [getattr(module, name, None) for name in names]
    whole = [number for number in numbers if type(number) is int]
    return whole if len(whole) == len(names) else []
