from __future__ import annotations

from typing import Any

import pytest

from weyl_megatron.layouts.buffers import Layout
from weyl_megatron.settings import check_settings
from weyl_megatron.thresholds import Thresholds


@pytest.mark.parametrize(
    ("tau", "overrides", "has_fast"),
    [
        (0.01, [], False),
        (0.05, [], False),
        (0.1, [], True),
        (0.01, [{"match": "wte.*", "tau": 0.1}], True),
        (0.01, [{"match": "wte.*", "exempt": True}], False),
        (0.01, [{"match": "wte.*", "tau": float("inf")}], True),
    ],
)
def test_whether_weights_may_change_fast_does_not_hang_on_what_a_rank_has(
    tau: float, overrides: list[dict[str, Any]], has_fast: bool
) -> None:
    options = {"power_iters": 2, "floor_std": 1e-3, "clip_vectors": False, "io": None, "others": {}}
    settings = check_settings(tau=tau, overrides=overrides, **options)
    nothing = Layout([], is_part=True)  # a pipeline stage without the embedding
    assert Thresholds(settings, nothing, auto=False).has_fast == has_fast
