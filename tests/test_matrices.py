from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from tests.faults.threads import Group, on_ranks, summing_groups
from weyl_megatron import AdamW2, matrices
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.kernels import make
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard


def what_a_rank_says(rank: int, group: Any, **options: Any) -> str:
    """Step a rank's half of a matrix; return what it is refused with."""
    weight = nn.Parameter(torch.ones(20))
    weight.grad = torch.ones(20)
    shard = Shard(Parameter("w", (8, 5), None), 20 * rank, 20 * rank + 20, 0)
    optimizer = AdamW2([weight], lr=0.1, **options)
    optimizer.engine = GivenLayout(lambda: Layout([Buffer(weight, (shard,), (group,))]))
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "kernels",
    [("cpu", "cpu"), ("cpu", "torch"), ("torch", "cpu"), ("cpu", "narrow"), ("narrow", "narrow")],
)
def test_ranks_that_share_a_matrix_step_in_one_kernel(
    kernels: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a host without a compiler, or with a processor whose registers are narrower."""
    group: Any = Group([0, 1])  # it stands in for a ProcessGroup
    picked: dict[int, str] = {}  # by rank, which is a thread

    def pick_other(*_: Any, **__: Any) -> str:
        name = picked[threading.get_ident()] = kernels[len(picked)]
        return name.replace("narrow", "cpu")

    def make_other(name: str, blocks: Any) -> Any:
        kernel: Any = make(name, blocks)
        if picked[threading.get_ident()] == "narrow":
            kernel.arithmetic += 1
        return kernel

    monkeypatch.setattr(matrices, "pick", pick_other)
    monkeypatch.setattr(matrices, "make", make_other)

    with summing_groups():
        said = on_ranks(2, [group], lambda rank: what_a_rank_says(rank, group))
    if kernels[0] == kernels[1]:
        assert said == ["", ""]
    else:
        assert all(
            "matrix 'w' got a rank that steps in another kernel than" in each for each in said
        )


@pytest.mark.parametrize("other", ["vectors", "clip", "refused"])
def test_ranks_that_share_a_matrix_project_it_alike(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where one of them refuses to, the others do not wait for it."""
    group: Any = Group([0, 1])
    options: list[dict[str, Any]] = [{"clip": "project", "vectors": 4, "io": []} for _ in range(2)]
    if other == "vectors":
        options[1]["vectors"] = 5
    elif other == "clip":
        options[1] = {}

    refusing: set[int] = set()  # threads
    made = matrices.Projector

    def make_projector(*args: Any) -> Any:
        if threading.get_ident() in refusing:
            raise ValueError("AdamW2: it is refused.")
        return made(*args)

    monkeypatch.setattr(matrices, "Projector", make_projector)

    def step(rank: int) -> str:
        if other == "refused" and rank == 0:
            refusing.add(threading.get_ident())
        return what_a_rank_says(rank, group, **options[rank])

    with summing_groups():
        said = on_ranks(2, [group], step)
    if other == "refused":
        assert said[0] == "AdamW2: it is refused."
        assert "matrix 'w' got a rank that refuses it" in said[1]
    else:
        assert all("got other 'clip' or 'vectors' on another rank" in each for each in said)
