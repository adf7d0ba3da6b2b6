"""Models, and the ways in which torch's tensor parallelism shares out their heads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from examples.collapse.model import GPT, GPTConfig
from tests.fsdp2 import fully_shard
from weyl_megatron.transformer.reparam import sigma_reparam

CONFIG = GPTConfig(norm="pre", vocabulary=50, context=16, layers=2, heads=4, width=24)


class SharedKeyAttention(nn.Module):
    """Attention whose heads share keys."""

    def __init__(self, heads: int, key_heads: int) -> None:
        super().__init__()
        width, self.head_dim = CONFIG.width, CONFIG.width // heads
        self.num_heads, self.num_kv_heads = heads, key_heads
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, key_heads * self.head_dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class StackedAttention(nn.Module):
    """Attention with q, k and v in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = CONFIG.heads
        self.qkv = nn.Linear(CONFIG.width, 3 * CONFIG.width, bias=False)
        self.proj = nn.Linear(CONFIG.width, CONFIG.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class AttentionByHand(nn.Module):
    """Attention that torch's function does not compute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = CONFIG.heads
        width = CONFIG.width
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def with_attention(make: Callable[[], nn.Module]) -> GPT:
    model = GPT(CONFIG)
    for block in model.blocks:
        block.attn = make()
    return model


def uneven() -> GPT:
    """Three heads, and an MLP that three ranks share out as 17, 17 and 16."""
    model = GPT(GPTConfig("pre", 50, 16, 2, 3, 24))
    for block in model.blocks:
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(24, 50), nn.Linear(50, 24)
    return model


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))


MODELS: dict[str, Callable[[], GPT]] = {
    "plain": lambda: GPT(CONFIG),
    "post": lambda: GPT(GPTConfig("post", 50, 16, 2, 4, 24)),
    "shared": lambda: with_attention(lambda: SharedKeyAttention(4, 2)),
    "single": lambda: with_attention(lambda: SharedKeyAttention(4, 1)),
    "stacked": lambda: with_attention(StackedAttention),
    "by hand": lambda: with_attention(AttentionByHand),
    "llama": llama,
    "uneven": uneven,
    "converted": lambda: GPT(CONFIG),  # by σReparam, once it is spread
}


def attention(before: ColwiseParallel | None = None, after: Any = None) -> dict[str, Any]:
    before, after = before or ColwiseParallel(), after or RowwiseParallel()
    return {"attn.q": before, "attn.k": before, "attn.v": before, "attn.o": after}


MLP = {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}


def each(model: GPT, mesh: DeviceMesh, plan: dict[str, Any], *, is_local: bool = True) -> None:
    """Follow a plan in every block; its attention has the heads of this rank."""
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
        if is_local and "attn.q" in plan:
            block.attn.num_heads //= mesh.size()


def usual(model: GPT, mesh: DeviceMesh) -> None:
    each(model, mesh, attention() | MLP)


def on_mesh_between(model: GPT, mesh: DeviceMesh) -> None:
    """What fc1 puts out stays a DTensor: torch takes no uneven shares of tensors."""
    plan = {"mlp.fc1": ColwiseParallel(use_local_output=False), "mlp.fc2": RowwiseParallel()}
    each(model, mesh, attention() | plan)


def mlp_alone(model: GPT, mesh: DeviceMesh) -> None:
    each(model, mesh, MLP)


def on_mesh(model: GPT, mesh: DeviceMesh) -> None:
    """Queries, keys and values are DTensors as attention gets them."""
    each(model, mesh, attention(ColwiseParallel(use_local_output=False)) | MLP, is_local=False)


def behind_gather(model: GPT, mesh: DeviceMesh) -> None:
    """Every rank computes the attention of all heads, from weights that ranks share out."""
    whole = {"before": ColwiseParallel(output_layouts=Replicate())}
    plan = attention(**whole, after=RowwiseParallel(input_layouts=Replicate()))
    each(model, mesh, plan | MLP, is_local=False)


def stack_behind_gather(model: GPT, mesh: DeviceMesh) -> None:
    stack = {
        "attn.qkv": ColwiseParallel(output_layouts=Replicate()),
        "attn.proj": RowwiseParallel(input_layouts=Replicate()),
    }
    each(model, mesh, stack | MLP)


def stack_of_rank(model: GPT, mesh: DeviceMesh) -> None:
    """Ranks take what they have of the stack for a stack of their own."""
    stack = {"attn.qkv": ColwiseParallel(), "attn.proj": RowwiseParallel()}
    each(model, mesh, stack | MLP)
    for block in model.blocks:
        block.attn.num_heads //= mesh.size()


class Whole(ParallelStyle):
    """Whole on every rank, whose gradients are of its heads alone."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def put(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

        def take(_: nn.Module, output: Any, __: DeviceMesh) -> Any:
            return output.to_local(grad_placements=[Partial()])

        return distribute_module(module, device_mesh, None, put, take)


def keys_whole(model: GPT, mesh: DeviceMesh) -> None:
    """Queries by rows; the keys and values that they share are whole on every rank."""
    plan = {"attn.k": Whole(), "attn.v": Whole()}
    each(model, mesh, attention() | MLP | plan)


def parts_of_heads(model: GPT, mesh: DeviceMesh) -> None:
    """Half of the only head's keys on each rank, and all of them behind a gather."""
    gathers = ColwiseParallel(output_layouts=Replicate())
    each(model, mesh, attention() | {"attn.k": gathers, "attn.v": gathers})


def values_by_rows(model: GPT, mesh: DeviceMesh) -> None:
    """Queries and values by rows; keys are whole."""
    each(model, mesh, attention() | {"attn.k": Whole()})


def around(model: GPT, mesh: DeviceMesh, head: ColwiseParallel) -> None:
    """Ranks share out the tokens from the first block to the head."""
    split = PrepareModuleInput(
        input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True
    )
    parallelize_module(model, mesh, {"blocks.0": split, "norm": SequenceParallel(), "head": head})


def sequence(model: GPT, mesh: DeviceMesh, *, is_local: bool = True) -> None:
    """SequenceParallel, as torch's page shows it."""
    gathers = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    cut = RowwiseParallel(output_layouts=Shard(1), use_local_output=is_local)
    plan = {
        "norm1": SequenceParallel(),
        "attn": gathers,
        **attention(after=cut),
        "norm2": SequenceParallel(),
        "mlp": gathers,
        "mlp.fc1": ColwiseParallel(),
        "mlp.fc2": cut,
    }
    each(model, mesh, plan)
    around(model, mesh, ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()))


def sequence_on_mesh(model: GPT, mesh: DeviceMesh) -> None:
    """Likewise, with DTensors between the blocks."""
    sequence(model, mesh, is_local=False)
    split = PrepareModuleInput(
        input_layouts=Shard(1), desired_input_layouts=Shard(1), use_local_output=False
    )
    parallelize_module(model, mesh, {"blocks.0": split})


def sequence_by_layer(model: GPT, mesh: DeviceMesh) -> None:
    """Likewise, with tensors of this rank's tokens wherever ranks share them out."""
    cut = RowwiseParallel(output_layouts=Shard(1))
    gathers = ColwiseParallel(input_layouts=Shard(1))
    plan = {
        "norm1": SequenceParallel(use_local_output=True),
        **attention(gathers, cut),
        "norm2": SequenceParallel(use_local_output=True),
        "mlp.fc1": gathers,
        "mlp.fc2": cut,
    }
    each(model, mesh, plan)
    around(model, mesh, ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()))


def by_columns(model: GPT, mesh: DeviceMesh) -> None:
    """Keys by columns, queries by rows."""
    plan = attention()
    plan["attn.k"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(-1))
    each(model, mesh, plan)


def two_meshes(model: GPT, mesh: DeviceMesh) -> None:
    """Two dimensions of tensor parallelism."""
    square = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("a", "b"))
    weight = model.blocks[0].mlp.fc1.weight
    model.blocks[0].mlp.fc1.weight = nn.Parameter(
        distribute_tensor(weight, square, [Replicate(), Shard(0)])
    )


def by_its_own_plan(model: Any, _: DeviceMesh) -> Any:
    """As Hugging Face spreads what it loads."""
    from transformers import AutoModelForCausalLM

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        model.save_pretrained(folder[0])
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(folder[0], tp_plan="auto", dtype=torch.float32)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    return loaded.train()


Spread = Callable[[Any, DeviceMesh], Any]


@dataclass(frozen=True)
class Case:
    """A model, and how it is spread."""

    name: str
    model: str
    spread: Spread | None
    data: str = ""  # how there are ranks with other data: "" (not), "fsdp", "hsdp", …

    def __str__(self) -> str:
        return self.name


CASES: dict[int, tuple[Case, ...]] = {
    1: tuple(Case(f"whole {model}", model, None) for model in MODELS if model != "by hand"),
    2: (
        Case("usual", "plain", usual),
        Case("post", "post", usual),
        Case("shared", "shared", usual),
        Case("single", "single", keys_whole),
        Case("on mesh", "plain", on_mesh),
        Case("behind gather", "plain", behind_gather),
        Case("mlp alone", "plain", mlp_alone),
        Case("stacked", "stacked", stack_behind_gather),
        Case("sequence", "plain", sequence),
        Case("sequence on mesh", "plain", sequence_on_mesh),
        Case("sequence by layer", "plain", sequence_by_layer),
        Case("llama", "llama", by_its_own_plan),
        Case("converted", "converted", usual),
    ),
    3: (Case("uneven", "uneven", on_mesh_between),),
    4: (
        Case("fsdp usual", "plain", usual, "fsdp"),
        Case("fsdp sequence", "plain", sequence, "fsdp"),
        Case("fsdp shared", "shared", usual, "fsdp"),
        Case("fsdp single", "single", keys_whole, "fsdp"),
        Case("fsdp stacked", "stacked", stack_behind_gather, "fsdp"),
        Case("fsdp converted", "converted", sequence, "fsdp"),
    ),
    8: (Case("hsdp sequence", "plain", sequence, "hsdp"),),
}

#: Those that torch's AdamW trains, too.
ADAMW = (
    *(f"whole {model}" for model in ("plain", "shared", "single", "stacked", "llama")),
    *("usual", "shared", "single", "stacked", "sequence", "llama", "fsdp usual", "fsdp sequence"),
)

REFUSED: dict[int, tuple[Case, ...]] = {
    1: (),
    2: (
        Case("values by rows", "shared", values_by_rows),
        Case("parts of heads", "single", parts_of_heads),
        Case("stack of rank", "stacked", stack_of_rank),
        Case("by columns", "plain", by_columns),
        Case("by hand", "by hand", usual),
        Case("two meshes", "plain", two_meshes),
    ),
    3: (),
    4: (Case("ddp", "plain", usual, "ddp"), Case("part of ranks", "plain", usual, "nothing")),
    8: (),
}


def made(case: Case, ranks: int) -> nn.Module:
    """Return the model, spread over all ranks."""
    torch.manual_seed(3)
    model: Any = MODELS[case.model]()
    if case.spread is None:
        return converted(model) if case.model == "converted" else model
    if not case.data:
        model = case.spread(model, init_device_mesh("cpu", (ranks,))) or model
        return converted(model) if case.model == "converted" else model
    shape = (2, ranks // 4, 2) if case.data == "hsdp" else (1, ranks // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "dp", "tp"))
    case.spread(model, mesh["tp"])
    if case.data == "ddp":
        return DistributedDataParallel(model, device_mesh=mesh["dp"])
    if case.model == "converted":
        converted(model)
    if case.data in ("fsdp", "hsdp"):
        shared = mesh["copies", "dp"] if case.data == "hsdp" else mesh["dp"]
        for block in model.blocks:
            fully_shard(block, mesh=shared)
        fully_shard(model, mesh=shared)
    return model


def converted(model: GPT) -> GPT:
    sigma_reparam(model, exclude=("head",))
    return model
