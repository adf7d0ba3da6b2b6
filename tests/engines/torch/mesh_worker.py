"""torchrun worker: models that torch spreads over ranks train as one process trains them.

    torchrun --nproc_per_node=N tests/engines/torch/mesh_worker.py [FILE]

Every rank trains the whole model, too. Both see the same batches; what their gradients differ by is
what torch's AdamW differs by, which is trained beside them. A row that fails hides no other; with
FILE, what became of each is there as JSON.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from tests import tolerances
from tests.engines.torch.meshes import CASES, VOCABULARY, Case, Net, lacking, whole
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


def adamw_of(case: Case) -> Optimizer:
    amsgrad = case.options.get("amsgrad", False)
    return lambda net: torch.optim.AdamW(
        net.parameters(), lr=case.lr, weight_decay=0.1, amsgrad=amsgrad
    )


def check_lack(case: Case, sentence: str) -> None:
    """torch, with an AdamW of its own, says that it cannot spread a model so."""
    answer = "nothing"
    try:
        run(case, adamw_of(case))
    except (TypeError, NotImplementedError) as error:
        answer = str(error)
    assert sentence in answer, f"{case.name}: torch is to say {sentence}, and says {answer}"


def check(case: Case) -> str:
    """Return how far from one process it ends."""

    def adamw2(net: nn.Module) -> AdamW2:
        options = {"tau": 0.03, "io": ["wte*"], **case.options}
        return AdamW2(net.named_parameters(), lr=case.lr, weight_decay=0.1, **options)

    distance, (alone, spread) = run(case, adamw2)
    of_adamw, _ = run(case, adamw_of(case))
    entries, expected = spread.stats(), alone.stats()
    assert sorted(entries) == sorted(expected), (list(entries), list(expected))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, entries)
    assert all(other == gathered[0] for other in gathered), "ranks have other statistics"
    clipped = sum(entry.clipped for entry in entries.values())
    settled = sum(entry.certified for entry in entries.values())
    # Gradients of bf16 are rounded in other places; those of float32 are added in another order.
    most = 2 * of_adamw if case.is_half else TOLERANCE
    assert distance <= most, (case.name, distance, of_adamw)
    if case.lr < 1e-4:
        assert settled == len(entries)
    else:
        assert clipped > 1
    names = {name.partition("[")[0] for name in entries}
    assert "frozen.weight" not in names and "wte.weight" in names
    assert {f"h.0.experts[{number}]" for number in range(3)} <= set(entries)
    assert {"h.0.qkv.weight[q]", "h.0.gate_up_proj.weight[up]"} <= set(entries)
    return (
        f"{distance:.1e} from one process, AdamW {of_adamw:.1e}; of {len(entries)} matrices "
        f"{clipped} clipped, {settled} settled"
    )


def row(number: int, case: Case) -> dict[str, str]:
    """Return what became of a case, the same on all ranks: "agrees", "lacks" or "failed", and what
    is to be said of it.

    Raises:
        RuntimeError: some ranks failed and others did not: they no longer wait for the same.
    """
    sentence = lacking(case)
    failure, said = "", ""
    try:
        if sentence is None:
            said = check(case)
        else:
            check_lack(case, sentence)
    except Exception:
        failure = traceback.format_exc()
    store = dist.distributed_c10d._get_default_store()
    store.set(f"rows/{number}/{dist.get_rank()}", failure)
    keys = [f"rows/{number}/{rank}" for rank in range(dist.get_world_size())]
    try:
        store.wait(keys, timedelta(seconds=60))
    except Exception as error:
        raise RuntimeError(f"{case.name}: {failure or 'another rank hangs'}") from error
    failures = [store.get(key).decode() for key in keys]
    if any(failures):
        if not all(failures):
            raise RuntimeError(f"{case.name}: some ranks say:\n{max(failures)}")
        return {"failed": failures[0]}
    return {"agrees": said} if sentence is None else {"lacks": sentence}


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rows: dict[str, dict[str, str]] = {}
    with tolerances.every_iteration():
        for number, case in enumerate(CASES[dist.get_world_size()]):
            rows[case.name] = row(number, case)
            if dist.get_rank() == 0:
                ((outcome, said),) = rows[case.name].items()
                print(f"{case.name}: {outcome}: {said}", flush=True)
    if sys.argv[1:] and dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(rows))
    has_failed = any("failed" in outcome for outcome in rows.values())
    shutdown(int(has_failed and not sys.argv[1:]))  # with FILE the reader tells


if __name__ == "__main__":
    main()
