"""torchrun worker: models that torch spreads over ranks train as one process trains them.

    torchrun --nproc_per_node=N tests/engines/torch/mesh_worker.py

Every rank trains the whole model, too. Both see the same batches; what their gradients differ by is
what torch's AdamW differs by, which is trained beside them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from tests import tolerances
from tests.engines.torch.meshes import CASES, VOCABULARY, Case, Net, runs, whole
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

STEPS, ROWS = 10, 2  # rows of a batch on each rank

#: Relative, of weights after 10 steps: sums in another order, in float32.
TOLERANCE = 1e-5

Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


def batch(number: int, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, VOCABULARY, (rows, 6), generator=generator)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, case: Case, *, is_spread: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        for part in range(case.batches):
            tokens = batch(step * case.batches + part, ROWS * world)
            if is_spread and case.tensor:
                tokens = tokens.chunk(world // case.tensor)[rank // case.tensor]
            is_last = part == case.batches - 1
            syncs = getattr(net, "set_requires_gradient_sync", None)
            if syncs is not None:
                syncs(is_last)
            halved = case.is_half and not is_spread
            context: Any = torch.autocast("cpu", torch.bfloat16) if halved else nullcontext()
            with context:
                logits = net(tokens)
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
            (loss / case.batches).backward()
        if case.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), case.clip_norm)
        optimizer.step()
        optimizer.zero_grad()


def run(case: Case, make: Optimizer) -> tuple[float, list[Any]]:
    """Return how far the spread model ends from the whole one, and both optimizers."""
    torch.manual_seed(0)
    alone = Net(**case.net)
    spread: nn.Module = copy.deepcopy(alone)
    spread = case.spread(spread, dist.get_world_size()) or spread
    # DDP puts others into the model as it computes.
    pieces = {name.removeprefix("module."): piece for name, piece in spread.named_parameters()}
    optimizers = [make(alone), make(spread)]
    train(alone, optimizers[0], case, is_spread=False)
    train(spread, optimizers[1], case, is_spread=True)
    distances = [
        float((whole(pieces[name]) - expected).norm() / expected.norm())
        for name, expected in alone.named_parameters()
    ]
    check_copies(pieces)
    return max(distances), optimizers


def check_copies(pieces: Mapping[str, Tensor]) -> None:
    """Ranks that have the same piece of a parameter have the same bits."""
    placed = []
    for name, param in pieces.items():
        spec: Any = getattr(param, "_st_info", param)
        mesh = getattr(spec, "device_mesh", None)
        places = []
        for dim, placement in enumerate(getattr(spec, "placements", ())):
            if not placement.is_replicate():
                places.append((dim, mesh.get_coordinate()[dim]))
        held = param.to_local() if isinstance(param, DTensor) else param
        placed.append((name, tuple(places), held.detach().clone()))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, placed)
    first: dict[Any, Tensor] = {}
    for of_rank in gathered:
        for name, places, held in of_rank:
            expected = first.setdefault((name, places), held)
            assert torch.equal(expected, held), f"copies of {name} differ"


def check(case: Case) -> None:
    def adamw2(net: nn.Module) -> AdamW2:
        options = {"tau": 0.03, "io": ["wte*"], **case.options}
        return AdamW2(net.named_parameters(), lr=case.lr, weight_decay=0.1, **options)

    def adamw(net: nn.Module) -> torch.optim.Optimizer:
        amsgrad = case.options.get("amsgrad", False)
        return torch.optim.AdamW(net.parameters(), lr=case.lr, weight_decay=0.1, amsgrad=amsgrad)

    distance, (alone, spread) = run(case, adamw2)
    of_adamw, _ = run(case, adamw)
    entries, expected = spread.stats(), alone.stats()
    assert sorted(entries) == sorted(expected), (list(entries), list(expected))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, entries)
    assert all(other == gathered[0] for other in gathered), "ranks have other statistics"
    clipped = sum(entry.clipped for entry in entries.values())
    settled = sum(entry.certified for entry in entries.values())
    if dist.get_rank() == 0:
        print(
            f"{case.name}: {distance:.1e} from one process, AdamW {of_adamw:.1e}; of "
            f"{len(entries)} matrices {clipped} clipped, {settled} settled",
            flush=True,
        )
    assert distance <= max(TOLERANCE, 2 * of_adamw), (case.name, distance, of_adamw)
    if case.lr < 1e-4:
        assert settled == len(entries)
    else:
        assert clipped > 1
    names = {name.partition("[")[0] for name in entries}
    assert "frozen.weight" not in names and "wte.weight" in names
    assert {f"h.0.experts[{number}]" for number in range(3)} <= set(entries)
    assert {"h.0.qkv.weight[q]", "h.0.gate_up_proj.weight[up]"} <= set(entries)


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    with tolerances.every_iteration():
        for case in filter(runs, CASES[dist.get_world_size()]):
            check(case)
    print("all agree", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
