"""torchrun worker, 2 ranks: what is wrong with spread parameters is said; or, with the argument
"depth", collectives are counted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard

from tests import tolerances
from tests.engines.torch.mesh_worker import batch
from tests.engines.torch.meshes import PROJECT, Net, fsdp, tp
from tests.fsdp2 import fully_shard
from tests.wrapped import Wrapped
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.environment import LOG


def backward(net: Any) -> None:
    net(batch(dist.get_rank(), 2)).square().mean().backward()


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, FloatingPointError) as error:
        return str(error)
    return "nothing"


def made_too_early() -> None:
    for spread in (fsdp, tp):
        net = Net()
        optimizer = AdamW2(net.named_parameters(), io=["wte*"])
        spread(net, 2)
        backward(net)
        sentence = said(optimizer.step)
        assert "make AdamW2 after them" in sentence, sentence
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = Net()
        fsdp(net, 2)
        optimizer = AdamW2(net.named_parameters(), io=["wte*"])
        others = {
            name: torch.zeros_like(param, device="cpu") for name, param in net.state_dict().items()
        }
        net.load_state_dict(others, assign=True)
        backward(net)
        logged: list[str] = []
        with patch.object(LOG, "warning", logged.append):
            sentence = said(optimizer.step)
        told = sentence if device == "meta" else "".join(logged)  # these may be another optimizer's
        assert "make AdamW2 after them" in told, (device, sentence, logged)
    net = Net()
    tp(net, 2)
    optimizer = AdamW2(net.named_parameters(), io=["wte*"])
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    backward(nn.parallel.DistributedDataParallel(net, device_mesh=mesh["dp"]))
    sentence = said(optimizer.step)
    assert "make AdamW2 after them" in sentence, sentence


def partial() -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    optimizer = AdamW2([("w", weight)])
    weight.grad = torch.zeros_like(weight)
    assert "takes Shard and Replicate" in said(optimizer.step), said(optimizer.step)


def pieces_that_do_not_add_up() -> None:
    mesh = init_device_mesh("cpu", (2,))
    local = torch.ones(3, 4)
    held = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size((5, 4)), stride=(4, 1))
    weight = nn.Parameter(held)
    optimizer = AdamW2([("w", weight)])
    weight.grad = torch.zeros_like(weight)
    assert "add up to (6, 4)" in said(optimizer.step), said(optimizer.step)


def moments_elsewhere() -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = AdamW2([("w", weight)])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    moment = torch.zeros(2, 4)  # of another placement and the same local shape
    state = optimizer.state[weight]
    state["exp_avg"] = DTensor.from_local(moment, mesh, [Replicate()])
    assert "placements" in said(optimizer.step), said(optimizer.step)
    del state["exp_avg"]
    assert "holds step, exp_avg_sq, it takes exp_avg" in said(optimizer.step)


def gradients_elsewhere() -> None:
    """A gradient that is spread otherwise is the parameter's, as torch leaves an embedding's."""
    mesh = init_device_mesh("cpu", (2,))
    whole, grad = torch.randn(6, 4), torch.randn(6, 4)
    dist.broadcast(whole, 0)
    dist.broadcast(grad, 0)
    alone = nn.Parameter(whole.clone())
    weight = nn.Parameter(distribute_tensor(whole.clone(), mesh, [Shard(0)]))
    optimizers = [AdamW2([("w", alone)]), AdamW2([("w", weight)])]
    alone.grad = grad.clone()
    weight.grad = distribute_tensor(grad, mesh, [Replicate()])
    for optimizer in optimizers:
        optimizer.step()
    assert torch.allclose(weight.full_tensor(), alone, rtol=1e-5)


def wrapped() -> None:
    """What a rank has may be in a wrapper, as with weights that FSDP2 gathers in float8."""
    mesh = init_device_mesh("cpu", (2,))
    whole, grad = torch.randn(6, 4), torch.randn(6, 4)
    dist.broadcast(whole, 0)
    dist.broadcast(grad, 0)
    weights = []
    for wrap in (Wrapped, torch.Tensor.clone):
        piece = wrap(whole.chunk(2)[dist.get_rank()].clone())
        weight = nn.Parameter(DTensor.from_local(piece, mesh, [Shard(0)]))
        optimizer = AdamW2([("w", weight)], lr=1.0)
        for _ in range(2):
            weight.grad = distribute_tensor(grad, mesh, [Shard(0)])
            optimizer.step()
        weights.append(piece)
    assert torch.equal(weights[0].content, weights[1])
    assert not torch.equal(weights[1], whole.chunk(2)[dist.get_rank()])


def packed() -> None:
    """Hugging Face's packed plans: each rank has its shares of gate and of up, stacked."""
    mesh = init_device_mesh("cpu", (2,))
    for shape, dim, name in (((12, 5), 0, "mlp.gate_up_proj.weight"), ((3, 8, 5), 1, "experts")):
        whole, grad = torch.randn(shape), torch.randn(shape)
        dist.broadcast(whole, 0)
        dist.broadcast(grad, 0)
        overrides = [{"match": "experts", "fused": 2, "kind": "experts"}] if dim else []
        alone = nn.Parameter(whole.clone())
        placements = [_StridedShard(dim - len(shape), split_factor=2)]
        weight = nn.Parameter(distribute_tensor(whole.clone(), mesh, placements))
        optimizers = [
            AdamW2([(name, param)], lr=0.1, overrides=overrides) for param in (alone, weight)
        ]
        alone.grad, weight.grad = grad.clone(), distribute_tensor(grad, mesh, placements)
        for optimizer in optimizers:
            optimizer.step()
        entries, expected = (optimizer.stats() for optimizer in reversed(optimizers))
        assert list(entries) == list(expected) and len(expected) == 2 + 4 * dim, entries
        for key, entry in expected.items():
            assert abs(entries[key].sigma_update / entry.sigma_update - 1) < 1e-4, key
            assert entry.clipped
        expected_piece = distribute_tensor(alone.detach(), mesh, placements)
        # torch 2.11 joins no such pieces: every rank compares its own.
        assert torch.allclose(weight.to_local(), expected_piece.to_local(), rtol=1e-4)


def moved_between_steps() -> None:
    """Trainers that take turns with a generator move the model away and back: the run is the one
    that was left alone, bit for bit, and matrices keep their names.
    """
    ended = []
    for is_moved in (False, True):
        torch.manual_seed(0)
        net = Net()
        fsdp(net, 2)
        optimizer = AdamW2(net.named_parameters(), lr=1e-2, tau=0.03, io=["wte*"])
        for step in range(4):
            if is_moved and step != 1:  # before the first, and between two
                net.to(torch.float64).to(torch.float32)
            net(batch(step, 2)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ended.append(([param.to_local() for param in net.parameters()], optimizer.stats()))
    (stayed, entries), (moved, entries_moved) = ended
    assert all(map(torch.equal, stayed, moved)) and entries == entries_moved


def nan_on_one_rank() -> None:
    for mode in ("skip", "raise"):
        net = Net()
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        optimizer = AdamW2(net.named_parameters(), io=["wte*"], nonfinite=mode)
        before = [param.to_local().clone() for param in net.parameters()]
        backward(net)
        if dist.get_rank() == 1:
            net.h[0].down.weight.grad.to_local()[0, 0] = float("nan")
        sentence = said(optimizer.step)
        assert (mode == "raise") == ("is not finite" in sentence), sentence
        after = [param.to_local() for param in net.parameters()]
        assert all(map(torch.equal, before, after))
        assert optimizer.skipped_steps == (1 if mode == "skip" else 0)
        optimizer.zero_grad()
        backward(net)
        optimizer.step()
        counts = {float(entry["step"]) for entry in optimizer.state.values()}
        assert counts == {1.0}, counts


def collectives(depth: int, options: dict[str, Any]) -> int:
    net = Net(depth)
    fsdp(net, 2)
    optimizer = AdamW2(net.named_parameters(), lr=1.0, io=["wte*"], **options)
    count = 0
    reduce = dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return reduce(*args, **kwargs)

    for _ in range(2):
        backward(net)
        count = 0
        dist.all_reduce = counting
        optimizer.step()
        dist.all_reduce = reduce
        optimizer.zero_grad()
    return count


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    if sys.argv[1:] == ["depth"]:
        with tolerances.every_iteration():
            counts = {collectives(depth, options) for depth in (1, 4) for options in ({}, PROJECT)}
        assert len(counts) == 1 and min(counts) > 0, counts
        print("as many collectives", counts, flush=True)
    else:
        made_too_early()
        partial()
        pieces_that_do_not_add_up()
        moments_elsewhere()
        gradients_elsewhere()
        packed()
        wrapped()
        moved_between_steps()
        nan_on_one_rank()
        print("all said", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
