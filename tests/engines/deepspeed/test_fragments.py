"""DeepSpeed's tensor-fragment API gives and sets what AdamW2 steps, before and between steps, as it
does AdamW's.

After DeepSpeed's TestTensorFragmentSet, whose edits before the first step were refused once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("deepspeed")

from tests import net as nets
from tests import tolerances
from tests.engines.deepspeed import fragments_worker as worker
from tests.processes import run_ranks
from tests.selection import values_of
from weyl_megatron import AdamW2

WORLD = 2
QUICK = {(1, "fp32"), (2, "bf16"), (3, "fp32")}
CASES = [
    pytest.param(
        stage,
        dtype,
        id=f"zero{stage}-{dtype}",
        marks=() if (stage, dtype) in QUICK else pytest.mark.slow,
    )
    for stage, dtype in worker.cases()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every case that is tested in one launch: starting DeepSpeed costs more than training."""
    out = tmp_path_factory.mktemp("fragments")
    chosen = [
        f"{stage}-{dtype}"
        for stage, dtype in worker.cases()
        if dtype in values_of(request, "dtype", stage=stage)
    ]
    run_ranks("deepspeed", Path(worker.__file__), WORLD, str(out), *chosen)
    return out


@pytest.fixture
def ranks(folder: Path, stage: int, dtype: str) -> list[dict[str, Any]]:
    loaded = [
        torch.load(folder / f"{stage}-{dtype}-{rank}.pt", weights_only=False)
        for rank in range(WORLD)
    ]
    for one in loaded:
        assert "error" not in one, one["error"]
    return loaded


@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_without_a_bound_all_that_it_gives_is_adamw_s_bit_for_bit(
    ranks: list[dict[str, Any]],
) -> None:
    for one in ranks:
        assert (one["unbounded"]["stepped"], one["adamw"]["stepped"]) == ("AdamW2", "AdamW")
        for ours, theirs in zip(one["unbounded"]["seen"], one["adamw"]["seen"], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_a_run_with_edits_is_that_of_one_process_with_the_same_edits(
    ranks: list[dict[str, Any]], dtype: str
) -> None:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    expected, rates = one_process(kind)
    result = ranks[0]["clipped"]
    assert any(entry[3] for entry in result["stats"].values()), (
        "nothing was clipped: the case shows nothing"
    )
    assert ranks[1]["clipped"]["stats"] == result["stats"]
    if kind == torch.float32:
        assert {name: entry[2] for name, entry in result["stats"].items()} == pytest.approx(
            rates, rel=1e-4
        )
        # Sums are made in another order in every layout; Adam divides by √V, which keeps that near
        # float32's 6e-8.
        assert max(distance({n: w}, {n: expected[n]}) for n, w in result["weights"].items()) < 1e-5
    else:
        # DeepSpeed reduces in the low precision, too: that may move the run as far as the low
        # precision moved it.
        exact, _ = one_process(torch.float32)
        assert distance(result["weights"], expected) < distance(expected, exact)


def test_the_edits_matter() -> None:
    edited, _ = one_process(torch.float32)
    plain, _ = one_process(torch.float32, is_edited=False)
    assert all(distance({name: edited[name]}, {name: plain[name]}) > 0.01 for name in plain)


@tolerances.every_iteration()
def one_process(
    dtype: torch.dtype, is_edited: bool = True
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train masters of the whole network with AdamW2 on the global batches, with the worker's
    edits.
    """
    net = nets.make_net().to(dtype)
    masters = {
        name: p.detach().float().clone().requires_grad_() for name, p in net.named_parameters()
    }
    optimizer = AdamW2(masters.items(), **nets.OPTIONS)
    for step, batch in enumerate(nets.batches(WORLD)[: worker.STEPS, 0]):
        with torch.no_grad():
            for name, change in worker.edits(step).items() if is_edited else ():
                masters[name].copy_(change(masters[name]))
            for name, change in worker.state_edits(step).items() if is_edited else ():
                for key in worker.MOMENTS:
                    optimizer.state[masters[name]][key].copy_(
                        change(optimizer.state[masters[name]][key])
                    )
        for p in masters.values():
            p.grad = torch.zeros_like(p)
        for micro in batch:
            net.zero_grad()
            net(micro).backward()
            for name, p in net.named_parameters():
                masters[name].grad += p.grad.float() / WORLD
        for name, factor in worker.GRADIENTS.get(step, {}).items() if is_edited else ():
            masters[name].grad *= factor
        optimizer.step()
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(masters[name])
    return {name: p.detach() for name, p in masters.items()}, {
        n: entry.lr for n, entry in optimizer.stats().items()
    }


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    gap = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (gap / sum(float(other[name].square().sum()) for name in one)) ** 0.5
