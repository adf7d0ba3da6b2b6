"""A temperature below 1 lowers attention's entropy while it lasts, as Watch sees it, and nothing
else does.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from examples.collapse.model import GPT, GPTConfig
from examples.temperature.__main__ import RUNS, Intervention, Story, main, mean, softened, train
from weyl_megatron import AdamW2
from weyl_megatron.watch.watch import Watch

CHANGE = Intervention(0.1, 20, 30)
STEPS = 40


@pytest.fixture(scope="module")
def stories() -> dict[str, Story]:
    torch.set_num_threads(1)
    return {run.name: train(run, CHANGE, STEPS, seed=0, every=5) for run in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adamw2"])
def test_entropy_falls_at_once_and_comes_back(name: str, stories: dict[str, Story]) -> None:
    usual, changed = stories[name], stories[f"{name}-changed"]
    before, during, after = (
        mean(changed.entropies, *span) for span in ((10, 20), (20, 30), (30, 40))
    )
    assert during < 0.5 * before and after > 0.75 * before
    assert mean(usual.entropies, 20, 30) > 0.75 * before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adamw2"])
def test_without_it_nothing_changes(name: str, stories: dict[str, Story]) -> None:
    usual, changed = stories[name], stories[f"{name}-changed"]
    assert [usual.losses[step] for step in range(20)] == [
        changed.losses[step] for step in range(20)
    ]
    assert {step: value for step, value in usual.entropies.items() if step < 20} == {
        step: value for step, value in changed.entropies.items() if step < 20
    }
    assert all(usual.losses[step] != changed.losses[step] for step in range(20, STEPS))


def tokens() -> torch.Tensor:
    return torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(1))


def test_a_temperature_is_queries_that_are_divided() -> None:
    torch.manual_seed(0)
    model, x = GPT(GPTConfig(norm="pre", layers=2)), tokens()[:, :-1]
    usual = model(x)
    with softened(model, 0.25):
        found = model(x)
    assert torch.equal(model(x), usual) and not torch.allclose(found, usual)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight /= 0.25  # a power of 2: nothing is rounded
    torch.testing.assert_close(found, model(x))


def test_watch_measures_the_attention_that_there_is() -> None:
    measured = []
    for is_softened in (True, False):
        torch.manual_seed(0)
        model, x = GPT(GPTConfig(norm="pre", layers=2)), tokens()
        optimizer = AdamW2(model.named_parameters(), lr=1e-6, tau=math.inf)
        watch = Watch(model, optimizer, every=1)
        if is_softened:
            with softened(model, 0.25):
                loss = model(x[:, :-1], x[:, 1:])
        else:
            with torch.no_grad():
                for block in model.blocks:
                    block.attn.q.weight /= 0.25
            loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step()
        measured.append(watch.step(loss))
        watch.close()
    compared = [
        tag for tag in measured[0] if tag.endswith(("/entropy", "/entropy_bound", "/map_rank"))
    ]
    assert len(compared) == 3 * 8
    for tag in compared:
        assert measured[0][tag] == pytest.approx(measured[1][tag], rel=1e-4), tag


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = GPT(GPTConfig(norm="pre", layers=1))
    with pytest.raises(KeyError), softened(model, 0.5):
        raise KeyError
    assert "forward" not in vars(model.blocks[0].attn)
    q = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        F.scaled_dot_product_attention(q, q, q),
        F.scaled_dot_product_attention(q, q, q, scale=8**-0.5),
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--temperature", "0"], "temperature: temperature got 0.0, it takes a number above 0."),
        (["--temperature", "nan"], "temperature: temperature got nan, it takes a number above 0."),
        (
            ["--at", "5", "--until", "5"],
            "temperature: at, until got 5, 5, they take steps, until behind at.",
        ),
        (["--steps", "120"], "temperature: steps got 120, it takes 150 (until) or more."),
    ],
)
def test_an_impossible_option_is_said(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.strip() == sentence
