"""torchrun worker: the plan of a model that torch spreads over ranks is that of the whole model, on
all of them.

    torchrun --nproc_per_node=N tests/plan/mesh_worker.py
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.engines.torch.meshes import Net, by_columns, fsdp, fsdp_tp, hsdp, tp
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.plan.plan import Row, plan

LR, TAUS = 0.01, (0.003, 0.03)

CASES: dict[int, dict[str, Callable[[Net, int], None]]] = {
    2: {"fsdp": fsdp, "tensor parallel": tp, "columns": by_columns},
    3: {"fsdp": fsdp, "tensor parallel": tp},
    4: {"hsdp": hsdp, "fsdp and tensor parallel": fsdp_tp},
}


def numbers(rows: list[Row]) -> Iterator[tuple[str, Any]]:
    for row in rows:
        for key, value in asdict(row).items():
            yield f"{row.kind} {row.rows} x {row.cols}, {row.asked}: {key}", value


def are_close(got: Any, wanted: Any) -> bool:
    """Floats to 1e-5: sums in another order, in float32; steps may be rounded to the next one."""
    if isinstance(wanted, tuple):
        return all(are_close(*pair) for pair in zip(got, wanted, strict=True))
    if isinstance(wanted, float):
        return bool(abs(got - wanted) <= 1e-5 * abs(wanted))
    if type(wanted) is int:
        return type(got) is int and abs(got - wanted) <= 1
    return bool(got == wanted)


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    for name, spread in CASES[world].items():
        torch.manual_seed(5)
        whole = Net(width=12, hidden=10)
        net = copy.deepcopy(whole)
        spread(net, world)

        def planned(model: Net) -> list[Row]:
            named: Any = ((key, value) for key, value in model.named_parameters())
            return plan(named, LR, taus=TAUS, steps=500, module=model)

        expected, rows = planned(whole), planned(net)
        assert len(rows) == len(expected) > 8, (name, len(rows))
        for (label, got), (_, wanted) in zip(numbers(rows), numbers(expected), strict=True):
            assert are_close(got, wanted), (name, label, got, wanted)
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, rows)
        assert all(other == rows for other in gathered), (name, "ranks have other rows")
        held: list[Tensor] = [param for param in net.parameters() if hasattr(param, "to_local")]
        assert held and any(param.to_local().numel() < param.numel() for param in held)
    print("all agree", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
