"""A small model with everything that ranks cut, and the ways in which torch spreads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests import fsdp2
from tests.fsdp2 import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

VOCABULARY = 37

#: A net whose every dimension four ranks share out evenly.
EVEN = {"width": 12, "hidden": 8, "experts": 4}

#: Where FSDP2 of this torch shards no other over tensor parallelism, that; else one of odd shapes.
OVER_TENSOR_PARALLELISM = EVEN if fsdp2.lacking(uneven=True) else {}


class Block(nn.Module):
    """Fused q, k, v; fused gate and up; a convolution; a stack of experts."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.gate_up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(experts, width, width) * 0.2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj(q * torch.sigmoid(k) + v)
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        x = x + self.down(torch.sigmoid(gate) * up)
        x = x + self.conv(x.mT).mT
        return self.norm(x + torch.einsum("btd,edf->btf", x, self.experts) / len(self.experts))


class Net(nn.Module):
    """Odd shapes; the head is the embedding; one weight is frozen."""

    def __init__(self, depth: int = 1, width: int = 11, hidden: int = 7, experts: int = 3) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, width)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.h = nn.ModuleList(Block(width, hidden, experts) for _ in range(depth))
        self.lone = nn.Linear(width, 1)  # on most ranks nothing of it is left

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.frozen(self.wte(tokens))
        for block in self.h:
            x = block(x)
        x = x * torch.sigmoid(self.lone(x))
        return x @ self.wte.weight.T  # tied


def shard_blocks(net: Net, mesh: DeviceMesh, **options: Any) -> None:
    for block in net.h:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)


def fsdp(net: Net, world: int, **options: Any) -> None:
    shard_blocks(net, init_device_mesh("cpu", (world,)), **options)


def hsdp(net: Net, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    shard_blocks(net, mesh)


def hsdp_3x2(net: Net, world: int) -> None:
    shard_blocks(net, init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "s")))


def hsdp_tp(net: Net, world: int) -> None:
    shape = (2, world // 4, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards", "tp"))
    tensor_parallel(net, mesh["tp"])
    shard_blocks(net, mesh["replicas", "shards"])


def tensor_parallel(net: Net, mesh: DeviceMesh) -> None:
    for block in net.h:
        plan = {
            "qkv": ColwiseParallel(output_layouts=Replicate()),
            "proj": RowwiseParallel(input_layouts=Replicate()),
            "gate_up_proj": ColwiseParallel(output_layouts=Replicate()),
            "down": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(block, mesh, plan)


def tp(net: Net, world: int) -> None:
    tensor_parallel(net, init_device_mesh("cpu", (world,)))


def fsdp_tp(net: Net, world: int) -> None:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel(net, mesh["tp"])
    shard_blocks(net, mesh["dp"])


def by_columns(net: Net, world: int) -> None:
    """Shard(1) wherever that divides; FSDP2 takes no other."""

    def placement(param: nn.Parameter) -> Shard | None:
        return Shard(1) if param.dim() > 1 and param.shape[1] % world == 0 else None

    fsdp(net, world, shard_placement_fn=placement)


def offloaded(net: Net, world: int) -> None:
    fsdp(net, world, offload_policy=CPUOffloadPolicy(pin_memory=False))


def half(net: Net, world: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fsdp(net, world, mp_policy=policy)


def with_ignored(net: Net, world: int) -> None:
    ignored = {net.lone.weight, net.lone.bias, *net.frozen.parameters()}
    shard_blocks(net, init_device_mesh("cpu", (world,)), ignored_params=ignored)


def replicated(net: Net, world: int) -> None:
    del world
    replicate(net)


def tp_ddp(net: Net, world: int) -> nn.Module:
    """DDP over a mesh's dimension: the pieces of tensor-parallel DTensors become parameters."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel(net, mesh["tp"])
    return nn.parallel.DistributedDataParallel(net, device_mesh=mesh["dp"])


@dataclass(frozen=True)
class Case:
    """How a model is spread and trained."""

    name: str
    spread: Callable[[Net, int], nn.Module | None]  # returns what is called in its place, if any
    options: dict[str, Any] = field(default_factory=dict)  # of AdamW2
    net: dict[str, Any] = field(default_factory=dict)
    tensor: int = 1  # so many ranks in a row have the same rows of a batch; 0: all of them
    batches: int = 1  # accumulated before a step
    clip_norm: float | None = None
    lr: float = 1e-2
    is_half: bool = False  # forward and backward round to bf16


PROJECT = {"clip": "project"}
EVEN = {"width": 12, "hidden": 10, "experts": 4}
NARROW = {"state_dtype": "bfloat16", "betas": (0.9, 0.95)}

#: By the number of ranks; one launch of so many runs all of them.
CASES: dict[int, Sequence[Case]] = {
    2: (
        Case("fsdp", fsdp),
        Case("fsdp, projected", fsdp, PROJECT),
        Case("fsdp, all settled", fsdp, lr=1e-5),
        Case("fsdp, balanced", fsdp, {"tau": "balanced"}),
        Case("fsdp, M and V in bfloat16", fsdp, NARROW),
        Case("fsdp, amsgrad", fsdp, {"amsgrad": True, "clip_vectors": True}),
        Case("bf16", half, is_half=True),
        Case("bf16, projected", half, PROJECT, is_half=True),
        Case("tensor parallel", tp, tensor=0),
        Case("tensor parallel, projected", tp, PROJECT, tensor=0),
        Case("columns", by_columns, net=EVEN),
        Case("columns, projected", by_columns, PROJECT, net=EVEN),
        Case("offloaded", offloaded),
        Case("offloaded, projected", offloaded, PROJECT),
        Case("ignored", with_ignored, tensor=0),
        Case("ignored, projected", with_ignored, PROJECT, tensor=0),
        Case("replicated", replicated),
        Case("replicated, projected", replicated, PROJECT),
        Case("accumulated", fsdp, batches=2),
        Case("accumulated, projected", fsdp, PROJECT, batches=2),
        Case("gradients clipped", fsdp, clip_norm=0.1),
    ),
    3: (
        Case("fsdp", fsdp),
        Case("fsdp, projected", fsdp, PROJECT),
        Case("tensor parallel", tp, tensor=0),
        Case("tensor parallel, projected", tp, PROJECT, tensor=0),
        Case("deep", fsdp, net={"depth": 3}),
    ),
    4: (
        Case("hsdp", hsdp),
        Case("hsdp, projected", hsdp, PROJECT),
        Case("hsdp, settled", hsdp, lr=1e-5),
        Case("even fsdp and tensor parallel", fsdp_tp, tensor=2, net=EVEN),
        Case("even fsdp and tensor parallel, projected", fsdp_tp, PROJECT, EVEN, tensor=2),
        Case("uneven fsdp and tensor parallel", fsdp_tp, tensor=2),
        Case("uneven fsdp and tensor parallel, projected", fsdp_tp, PROJECT, tensor=2),
        Case("DDP and tensor parallel", tp_ddp, tensor=2),
        Case("DDP and tensor parallel, projected", tp_ddp, PROJECT, tensor=2),
    ),
    5: (
        Case("fsdp", fsdp, net={"width": 13}),
        Case("fsdp, projected", fsdp, PROJECT, net={"width": 13}),
    ),
    6: (
        Case("uneven fsdp and tensor parallel", fsdp_tp, tensor=2, net={"width": 13}),
        Case(
            "uneven fsdp and tensor parallel, projected", fsdp_tp, PROJECT, {"width": 13}, tensor=2
        ),
        Case("hsdp, 2 x 3", hsdp),
        Case("hsdp, 3 x 2, projected", hsdp_3x2, PROJECT),
    ),
    8: (
        Case("hsdp and tensor parallel", hsdp_tp, tensor=2),
        Case("hsdp and tensor parallel, projected", hsdp_tp, PROJECT, tensor=2),
    ),
}


def lacking(case: Case) -> str | None:
    """Return what this torch says where it cannot spread a model so, or None where it can."""
    if case.spread is by_columns:
        return fsdp2.lacking("shard_placement_fn")
    if case.spread is with_ignored:
        return fsdp2.lacking("ignored_params")
    return fsdp2.lacking(uneven=case.spread in (fsdp_tp, hsdp_tp) and case.net != EVEN)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a parameter. Collective over its mesh.

    It is put together from the ranks' pieces: ``full_tensor()`` of torch 2.8 has rows in another
    order where FSDP2 shards uneven bands.
    """
    spec = getattr(tensor, "_st_info", None)  # of a piece that DDP put into the model
    if spec is not None:
        tensor = DTensor.from_local(
            tensor.detach(), spec.mesh, spec.placements, shape=spec.shape, stride=spec.stride
        )
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    held, mesh, placements = (
        tensor.to_local().detach().clone(),
        tensor.device_mesh,
        tensor.placements,
    )
    # What is cut last is joined first: FSDP2 cuts the bands of tensor parallelism, to its right.
    is_inner = [getattr(placement, "split_factor", 1) > 1 for placement in placements]
    for mesh_dim in sorted(range(mesh.ndim), key=lambda dim: (is_inner[dim], dim), reverse=True):
        dim = getattr(placements[mesh_dim], "dim", None)
        if dim is not None:
            pieces: list[Any] = [None] * mesh.size(mesh_dim)
            dist.all_gather_object(pieces, held, group=mesh.get_group(mesh_dim))
            held = torch.cat(pieces, dim)
    return held
