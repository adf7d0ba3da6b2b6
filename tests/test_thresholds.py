from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from weyl_megatron.layouts.buffers import Layout, Parameter
from weyl_megatron.layouts.kinds import Kind
from weyl_megatron.settings import check_settings
from weyl_megatron.thresholds import Thresholds

OPTIONS: dict[str, Any] = {
    "power_iters": 2,
    "floor_std": 1e-3,
    "clip_vectors": False,
    "io": None,
    "others": {},
}


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
    settings = check_settings(tau=tau, overrides=overrides, **OPTIONS)
    nothing = Layout([], is_part=True)  # a pipeline stage without the embedding
    assert Thresholds(settings, nothing, auto=False).has_fast == has_fast


CONVOLUTION = Parameter("stem.conv", (6, 4, 3), kind=Kind("convolution", groups=2))
GUESSED = Parameter("stem.guessed", (6, 4, 3))
EMBEDDING = Parameter("table", (9, 4), kind=Kind("matrix", role="embedding"))


def test_stages_tell_each_other_what_their_modules_say() -> None:
    """A stage without the embedding shares out the budget as that which has it."""
    settings = check_settings(tau="balanced", overrides=(), **OPTIONS)
    stages = [[EMBEDDING, CONVOLUTION], [Parameter("fc.weight", (4, 4))]]
    told: list[Any] = []

    def collect(found: Any) -> list[Any]:
        told.append(found)
        return told

    for stage in stages:  # what each tells
        with suppress(ValueError):
            Thresholds(settings, Layout([], parameters=stage, gather=collect), auto=True)
    taus = []
    for stage in stages:
        thresholds = Thresholds(
            settings, Layout([], parameters=stage, gather=lambda _: told), auto=True
        )
        taus.append(thresholds.floor_and_tau(CONVOLUTION, 6, 4, "balanced")[1])
        assert thresholds.floor_and_tau(EMBEDDING, 9, 4, "balanced")[1] == 0.1
    assert taus == [0.144 / 2] * 2


def test_what_was_guessed_is_said_of_few_and_counted() -> None:
    parameters = [Parameter(f"conv{number}.weight", (6, 4, 3)) for number in range(9)]
    settings = check_settings(tau=0.01, overrides=(), **OPTIONS)
    (sentence,) = Thresholds(
        settings, Layout([], parameters=[CONVOLUTION, *parameters]), auto=False
    ).notices()
    assert (
        "'conv3.weight' (6, 4, 3) and 5 more;" in sentence
        and "conv4" not in sentence
        and "stem" not in sentence
    )


def test_biases_beside_adapters_are_no_reason_to_ask_for_embeddings() -> None:
    shapes = {"q.lora_A.weight": (2, 4), "q.lora_B.weight": (4, 2), "q.bias": (4,)}
    settings = check_settings(tau="balanced", overrides=(), **OPTIONS)
    parameters = [Parameter(name, shape) for name, shape in shapes.items()]
    assert Thresholds(settings, Layout([], parameters=parameters), auto=True)._hidden == 2
