"""What is projected and what is scaled, and how a run goes on that changes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from weyl_megatron import AdamW2
from weyl_megatron.kernels.choice import VARIABLE
from weyl_megatron.saved import KEY

SHAPES = {
    "embed.weight": (40, 16),
    "up": (30, 16),
    "down": (16, 30),
    "gain": (16,),
    "head": (9, 16),
}


@pytest.fixture(autouse=True, params=["torch", "cpu"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, request.param)


class Run:
    """A model whose matrices are moved at a rate far above their bound."""

    def __init__(self, names: dict[str, dict[str, Any]] | None = None, **options: Any) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.params = {
            name: nn.Parameter(torch.randn(shape, generator=self.generator) * 0.05)
            for name, shape in SHAPES.items()
        }
        groups: Any = list(self.params.items())
        if names is not None:
            groups = [
                {"params": [(name, param)], **names.get(name, {})}
                for name, param in self.params.items()
            ]
        self.optimizer = AdamW2(groups, lr=0.05, **options)

    def step(self, count: int = 1) -> dict[str, int | None]:
        """Return how many directions of each matrix were clipped in the last step."""
        for _ in range(count):
            for param in self.params.values():
                param.grad = torch.randn(param.shape, generator=self.generator)
            self.optimizer.step()
        return {name: entry.directions for name, entry in self.optimizer.stats().items()}

    def widths(self) -> dict[str, list[int]]:
        (group,) = self.optimizer._matrix_groups
        operands = group._power.blocks.operands
        return {name: [o.widths[k] for o in operands] for k, name in enumerate(group.names)}


def projected(directions: dict[str, int | None]) -> set[str]:
    return {name for name, number in directions.items() if number is not None}


def test_hidden_matrices_are_projected_and_others_scaled() -> None:
    run = Run(clip="project")
    assert projected(run.step()) == {"up", "down"}
    assert run.widths() == {
        "embed.weight": [4, 4],
        "up": [4, 8],
        "down": [4, 8],
        "head": [4, 4],
    }


def test_vectors_are_scaled_which_of_one_singular_value_is_the_same() -> None:
    said = [{"match": "gain", "clip": "project"}]
    run, explicit, twin, alone = (
        Run(weight_decay=0.1, **options)
        for options in (
            {"clip": "project", "clip_vectors": True},
            {"clip": "project", "clip_vectors": True, "overrides": said},
            {"clip": "scale", "clip_vectors": True},
            {"clip": "project"},
        )
    )
    for each in (run, explicit):
        assert projected(each.step()) == {"up", "down"}
        entry = each.optimizer.stats()["gain"]
        assert entry.clipped and entry.lr < 0.05 and entry.directions is None
    for other in (twin, alone):
        other.step()
    assert "gain" not in alone.optimizer.stats()
    # λ w, too, is multiplied by its rate, and not by α, as a projected matrix's is.
    for each in (run, explicit):
        assert torch.equal(each.params["gain"], twin.params["gain"])
    for name in ("up", "down"):  # in other stacks, whose roundings are others
        torch.testing.assert_close(run.params[name], alone.params[name])


def test_overrides_and_parameter_groups_say_what_is_projected() -> None:
    overrides = [
        {"match": "up", "clip": "scale"},
        {"match": "head", "clip": "project", "vectors": 3},
    ]
    run = Run(clip="project", overrides=overrides)
    assert projected(run.step()) == {"down", "head"} and run.widths()["head"] == [4, 3]
    run = Run({"up": {"vectors": 12}}, clip="project", overrides=[{"match": "down", "vectors": 3}])
    assert projected(run.step()) == {"up", "down"}
    assert (run.widths()["up"], run.widths()["down"]) == ([4, 12], [4, 3])
    run = Run({"up": {"clip": "project", "vectors": 12}})
    assert projected(run.step()) == {"up"} and run.widths()["up"] == [4, 12]
    assert run.optimizer.param_groups[1]["clip"] == "project"
    exempt = Run(clip="project", overrides=[{"match": "up", "exempt": True}])
    assert projected(exempt.step()) == {"down"}


def test_embeddings_that_nothing_tells_are_asked_for() -> None:
    params = [nn.Parameter(torch.ones(4, 4))]
    optimizer = AdamW2(params, clip="project")
    params[0].grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match="clip got 'project', but nothing tells which of the 1"):
        optimizer.step()


def test_a_clip_that_is_changed_in_a_running_optimizer_holds_from_the_next_step() -> None:
    run = Run({"up": {"clip": "project"}})
    assert projected(run.step()) == {"up"}
    run.optimizer.param_groups[1]["clip"] = "scale"
    assert projected(run.step()) == set()
    run.optimizer.param_groups[2]["clip"] = "project"
    assert projected(run.step()) == {"down"}
    run.optimizer.param_groups[2]["clip"] = "none"
    with pytest.raises(ValueError, match="a parameter group's clip got 'none'"):
        run.step()
    late = Run()
    late.step()
    late.optimizer.param_groups[0]["clip"] = "project"
    with pytest.raises(ValueError, match="clip became 'project' after construction"):
        late.step()


def resumed(first: dict[str, Any], then: dict[str, Any]) -> tuple[Run, Run]:
    """Return a run of five steps, and one that goes on from its state with other options."""
    run, other = Run(**first), Run(**then)
    run.step(5)
    other.step(1)
    for name, param in other.params.items():
        param.data.copy_(run.params[name].data)
    state = copy.deepcopy(run.optimizer.state_dict())
    assert KEY in state["param_groups"][0]
    other.optimizer.load_state_dict(state)
    other.generator.set_state(run.generator.get_state())
    return run, other


@pytest.mark.parametrize("options", [{}, {"vectors": 3}, {"vectors": 16}], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(options: dict[str, Any]) -> None:
    run, other = resumed(*[{"clip": "project", **options}] * 2)
    for _ in range(3):
        assert run.step() == other.step() and run.optimizer.stats() == other.optimizer.stats()
    for name, param in run.params.items():
        assert torch.equal(param, other.params[name]), name


SCALED, NARROW, WIDE = (
    {},
    {"clip": "project", "vectors": 3},
    {"clip": "project", "vectors": 12},
)


@pytest.mark.parametrize(
    ("first", "then"),
    [(SCALED, WIDE), (WIDE, SCALED), (NARROW, WIDE), (WIDE, NARROW), (SCALED, NARROW)],
    ids=str,
)
def test_clip_and_vectors_may_change_at_a_resume(
    first: dict[str, Any], then: dict[str, Any]
) -> None:
    """The vectors that both have are kept, and those that are missing found at once."""
    run, other = resumed(first, then)
    (group,) = run.optimizer._matrix_groups
    saved = dict(
        zip(
            group.names,
            [[b.clone() for b in each] for each in group._power.blocks.kept()],
            strict=True,
        )
    )
    other.optimizer._matrix_groups._saved.give(
        next(iter(other.optimizer._matrix_groups)),
        other.optimizer._steps_done(other.params.values()),
    )
    (group,) = other.optimizer._matrix_groups
    assert not group._cold
    for name, blocks in zip(group.names, group._power.blocks.kept(), strict=True):
        cols = SHAPES[name][-1]
        for block, old in zip(blocks, saved[name], strict=True):
            shared = min(len(block), len(old))
            assert torch.equal(block[:shared], old[:shared]), name
            rows = block.view(-1, cols)
            assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5), name
    assert projected(other.step()) == (set() if then is SCALED else {"up", "down"})
    for name, entry in other.optimizer.stats().items():
        param, state = other.params[name], other.optimizer.state[other.params[name]]
        root = (state["exp_avg_sq"] / (1 - 0.999**6)).sqrt() + 1e-8
        update = state["exp_avg"] / (1 - 0.9**6) / root
        exact = float(torch.linalg.matrix_norm(update, 2))
        assert entry.sigma_update == pytest.approx(exact, rel=0.02), (name, param.shape)


def test_a_copy_goes_on_as_the_original() -> None:
    run = Run(clip="project")
    run.step(3)
    twin = copy.deepcopy(run)
    assert run.step(2) == twin.step(2)
    assert all(torch.equal(param, twin.params[name]) for name, param in run.params.items())


def test_forgotten_vectors_are_found_again() -> None:
    run = Run(clip="project")
    before = run.step(3)
    run.optimizer.forget()
    assert projected(run.step()) == projected(before)


def test_kernels_that_have_no_room_for_so_many_vectors_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("weyl_megatron.matrices.pick", lambda *_, **__: "triton")
    with pytest.raises(ValueError, match="vectors got 17, the kernels for a GPU take at most 16"):
        Run(clip="project", vectors=17).step()
