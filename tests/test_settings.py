from __future__ import annotations

from typing import Any

import pytest
import torch

from weyl_megatron import AdamW2

BAD: list[tuple[dict[str, Any], str]] = [
    ({"tua": 0.01}, r"unknown key 'tua' got 0.01; it takes lr, betas"),
    ({"tau": -0.01}, r"tau got -0.01, it takes a number above 0"),
    ({"tau": float("nan")}, r"tau got nan, it takes"),
    ({"tau": "0.01"}, r"tau got '0.01', it takes"),
    ({"tau": True}, r"tau got True, it takes"),
    ({"power_iters": 0}, r"power_iters got 0, it takes a whole number from 1"),
    ({"power_iters": 1.5}, r"power_iters got 1.5"),
    ({"lr": "6e-4"}, r"lr got '6e-4', it takes a number from 0 on"),
    ({"lr": -1.0}, r"lr got -1.0"),
    ({"lr": float("nan")}, r"lr got nan"),
    ({"betas": (0.9,)}, r"betas got \(0.9,\), it takes two numbers"),
    ({"betas": (0.9, 1.0)}, r"betas got \(0.9, 1.0\)"),
    ({"eps": "x"}, r"eps got 'x'"),
    ({"weight_decay": None}, r"weight_decay got None"),
    ({"adam_w_mode": False}, r"adam_w_mode got False, it takes True"),
    ({"bias_correction": False}, r"bias_correction got False, it takes True"),
    ({"amsgrad": 1}, r"amsgrad got 1, it takes True or False"),
    ({"differentiable": True}, r"differentiable got True, it takes False"),
    (
        {"lr": torch.tensor([0.1, 0.2])},
        r"lr got tensor\(\[0.1000, 0.2000\]\), it takes a number from 0 on",
    ),
    ({"max_grad_norm": 1.0}, r"max_grad_norm got 1.0, .*'gradient_clipping'"),
    ({"floor_std": -1}, r"floor_std got -1"),
    ({"clip_vectors": 1}, r"clip_vectors got 1"),
    ({"io": "*embed*"}, r"io got '\*embed\*', it takes a list"),
    ({"overrides": {"match": "*"}}, r"overrides got .* it takes a list"),
    ({"overrides": [{"tau": 0.1}]}, r"overrides got .*'match'"),
    ({"overrides": [{"match": "*", "lr": 1}]}, r"overrides got the key 'lr'"),
    ({"overrides": [{"match": "*", "tau": 0}]}, r"overrides' tau got 0"),
    ({"overrides": [{"match": "*", "exempt": "no"}]}, r"overrides' exempt got 'no'"),
    ({"overrides": [{"match": "*", "fused": 0}]}, r"overrides' fused got 0"),
    ({"clip": "svd"}, r"clip got 'svd', it takes 'scale' or 'project'"),
    ({"clip": True}, r"clip got True, it takes"),
    ({"clip": None}, r"clip got None, it takes"),
    (
        {"clip": "project", "vectors": 0},
        r"vectors got 0, it takes a whole number from 1 to 64",
    ),
    ({"clip": "project", "vectors": 65}, r"vectors got 65, it takes"),
    ({"clip": "project", "vectors": 8.0}, r"vectors got 8.0, it takes"),
    ({"clip": "project", "vectors": True}, r"vectors got True, it takes"),
    ({"vectors": 8}, r"vectors got 8 beside clip 'scale', it takes clip 'project'"),
    ({"overrides": [{"match": "*", "clip": "both"}]}, r"overrides' clip got 'both'"),
    (
        {"overrides": [{"match": "*", "vectors": 8}]},
        r"overrides' vectors got 8 beside clip 'scale'",
    ),
    (
        {"overrides": [{"match": "*", "clip": "project", "vectors": 99}]},
        r"overrides' vectors got 99, it takes",
    ),
]


@pytest.mark.parametrize(
    ("options", "message"), BAD, ids=[next(iter(o)) + str(i) for i, (o, _) in enumerate(BAD)]
)
def test_an_impossible_setting_is_one_sentence_at_construction(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        AdamW2([torch.nn.Parameter(torch.ones(2, 2))], **options)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_keys_that_every_adamw_config_carries_are_accepted() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    AdamW2(
        [parameter],
        torch_adam=True,
        adam_w_mode=True,
        bias_correction=True,
        fused=False,
        foreach=None,
    )


def test_a_parameter_group_s_tau_is_checked_too() -> None:
    with pytest.raises(ValueError, match="a parameter group's tau got 0"):
        AdamW2([{"params": [torch.nn.Parameter(torch.ones(2, 2))], "tau": 0}])


@pytest.mark.parametrize(
    ("key", "value"),
    [("state_dtype", "bfloat16"), ("power_iters", 3), ("overrides", [{}]), ("nonfinite", "off")],
)
def test_a_parameter_group_s_key_that_would_do_nothing_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        AdamW2([{"params": [torch.nn.Parameter(torch.ones(2, 2))], key: value}])
    assert str(error.value) == (
        f"AdamW2: a parameter group got {key} {value!r}, which the optimizer takes for all of "
        "them; a group takes lr, betas, eps, weight_decay, amsgrad, maximize, tau, clip, vectors."
    )


#: What is said of clip and vectors wherever they are given; what is no number of vectors.
WORDS = "svd", True, None
NO_NUMBERS = 0, 65, 2.5, True, "8", -1, float("nan")
CLIPS: list[tuple[dict[str, Any], str]] = [
    *(({"clip": word}, f"clip got {word!r}, it takes 'scale' or 'project'.") for word in WORDS),
    *(
        (
            {"clip": "project", "vectors": number},
            f"vectors got {number!r}, it takes a whole number from 1 to 64.",
        )
        for number in NO_NUMBERS
    ),
    ({"vectors": "8"}, "vectors got '8', it takes a whole number from 1 to 64."),
    ({"vectors": 8}, "vectors got 8 beside clip 'scale', it takes clip 'project'."),
    (
        {"clip": "scale", "vectors": 8},
        "vectors got 8 beside clip 'scale', it takes clip 'project'.",
    ),
]
#: Only an argument has None for a default.
OWN = [*CLIPS, ({"clip": "project", "vectors": None}, "vectors got None, it takes a whole number")]
PLACES: dict[str, Any] = {
    "": lambda given: AdamW2([torch.nn.Parameter(torch.ones(2, 2))], **given),
    "a parameter group's ": lambda given: AdamW2(
        [{"params": [torch.nn.Parameter(torch.ones(2, 2))], **given}]
    ),
    "overrides' ": lambda given: AdamW2(
        [torch.nn.Parameter(torch.ones(2, 2))], overrides=[{"match": "*", **given}]
    ),
}


@pytest.mark.parametrize(
    ("place", "given", "message"),
    [(place, given, message) for place in PLACES for given, message in (OWN if place else CLIPS)],
)
def test_a_clip_is_checked_wherever_it_is_given(
    place: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        PLACES[place](given)
    assert str(error.value).startswith(f"AdamW2: {place}{message}")


@pytest.mark.parametrize("given", [given for given, _ in CLIPS[:-2]])
def test_a_clip_that_a_parameter_group_comes_to_have_is_checked_in_the_step(
    given: dict[str, Any],
) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    optimizer = AdamW2([parameter], clip="project", io=[])
    optimizer.param_groups[0].update(given)
    with pytest.raises(ValueError, match=r"AdamW2: a parameter group's \w+ got .*, it takes"):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(2, 2))


def test_an_override_that_matches_nothing_is_refused_at_the_first_step() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    optimizer = AdamW2([("w", parameter)], overrides=[{"match": "v*", "exempt": True}])
    with pytest.raises(ValueError, match="match 'v\\*', which matches no parameter's name"):
        optimizer.step()


@pytest.mark.parametrize("word", ["balanced", "auto"])
def test_both_spellings_of_the_budget_are_one_value_wherever_a_tau_is_given(word: str) -> None:
    def weight(name: str) -> tuple[str, torch.nn.Parameter]:
        return name, torch.nn.Parameter(
            torch.randn(6, 5, generator=torch.Generator().manual_seed(len(name)))
        )

    def stepped(**options: Any) -> dict[str, Any]:
        groups = options.pop(
            "groups", [{"params": [weight("embed.weight"), weight("up"), weight("down")]}]
        )
        optimizer = AdamW2(groups, lr=1.0, **options)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = param.detach().sin()
        optimizer.step()
        return optimizer.stats()

    expected = stepped(tau="auto")
    assert len({entry.tau for entry in expected.values()}) == 2, (
        "embeddings and hidden matrices have one τ"
    )
    assert stepped(tau=word) == expected
    assert stepped(overrides=[{"match": "*", "tau": word}]) == expected
    groups = [{"params": [weight("embed.weight"), weight("up"), weight("down")], "tau": word}]
    assert stepped(groups=groups) == expected


def test_a_tau_that_becomes_balanced_is_that_of_a_budget() -> None:
    named = [
        ("embed.weight", torch.nn.Parameter(torch.ones(4, 3))),
        ("up", torch.nn.Parameter(torch.eye(4))),
    ]
    optimizer = AdamW2(
        [{"params": named[:1]}, {"params": named[1:], "tau": 0.3}], lr=1.0, tau="balanced"
    )
    for _, param in named:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.stats()["up"].tau == pytest.approx(0.3)
    assert optimizer.param_groups[0]["tau"] == "balanced"
    optimizer.param_groups[1]["tau"] = "auto"
    optimizer.step()
    assert optimizer.stats()["up"].tau == pytest.approx(0.144)
    saved = optimizer.state_dict()
    saved["param_groups"][1]["tau"] = "well"
    with pytest.raises(
        ValueError, match="a parameter group's tau got 'well', it takes a number above 0"
    ):
        optimizer.load_state_dict(saved)
