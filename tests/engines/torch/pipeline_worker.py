"""torchrun worker: stages of ``torch.distributed.pipelining`` with an AdamW2 each train as one
process trains the whole model; on 2 ranks two stages, on 4 each of them sharded by FSDP2.

    torchrun --nproc_per_node=N tests/engines/torch/pipeline_worker.py
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, schedules
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.nn import functional

from tests import tolerances
from tests.engines.torch.meshes import VOCABULARY, whole
from tests.fsdp2 import fully_shard
from weyl_megatron import AdamW2, MatrixStats
from weyl_megatron.engines.shutdown import shutdown

STEPS, ROWS, TOKENS, STAGES, MICROBATCHES = 10, 8, 6, 2, 4
TOLERANCE = 1e-5  # relative, of weights after 10 steps: sums in another order, in float32
#: torch 2.5 adds up the gradients of microbatches, from 2.6 on it takes their mean.
SCALES = "scale_grads" in inspect.signature(ScheduleGPipe).parameters

WIDTH, LAYERS = 11, 3  # the stages have other numbers of matrices


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.norm(x + self.proj(q * torch.sigmoid(k) + v))


class Model(nn.Module):
    """A stage keeps the names of the whole model: it is one, less what other stages have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleDict({str(number): Layer() for number in range(LAYERS)})
        self.lm_head: nn.Module | None = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        # torch 2.6 detaches what the last stage returns in place, and says that no view takes that.
        return x if self.lm_head is None else self.lm_head(x).clone()


def stage_of(model: Model, stage: int) -> Model:
    model = copy.deepcopy(model)
    kept = ("0",) if stage == 0 else ("1", "2")
    for name in list(model.layers):
        if name not in kept:
            del model.layers[name]
    if stage == 0:
        model.lm_head = None
    else:
        model.embed = None
    return model


def batch(number: int, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, VOCABULARY, (rows, TOKENS), generator=generator)


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class _All:
    """Several transfers, as one."""

    def __init__(self, ops: list[Any]) -> None:
        self.works = dist.batch_isend_irecv(ops)

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def mend_transfers() -> None:
    """Let schedules of older torch run on gloo.

    Those of torch 2.5 to 2.7 wait for the last alone of the transfers that they start together;
    gloo loses what is dropped, and 1F1B hangs. Those of torch 2.9 begin with an integer of 8 bytes
    that is received as a float of 4, which ends the process; gloo does without this greeting.
    """
    if not hasattr(schedules, "_wait_batch_p2p"):
        schedules._batch_p2p = lambda ops, desc=None: _All(ops) if ops else None
    greeting = getattr(PipelineStage, "_get_init_p2p_neighbors_ops", None)
    if greeting is not None:

        def fitting(stage: PipelineStage) -> list[Any]:
            ops = greeting(stage)
            return ops if len({op.tensor.dtype for op in ops}) == 1 else []

        PipelineStage._get_init_p2p_neighbors_ops = fitting


@dataclass(frozen=True)
class Case:
    name: str
    schedule: type[PipelineScheduleSingle]
    options: dict[str, Any] = field(default_factory=dict)  # of AdamW2
    shares: bool = False  # the stages are given the pipeline's group
    frozen: str = "-"  # what the names of weights that are not trained begin with


CASES = (
    Case("GPipe, a number", ScheduleGPipe),
    Case("1F1B, a number", Schedule1F1B),
    Case("GPipe, balanced", ScheduleGPipe, {"tau": "balanced"}, shares=True),
    Case("1F1B, balanced", Schedule1F1B, {"tau": "balanced"}, shares=True),
    Case("auto, one layer frozen", Schedule1F1B, {"tau": "auto"}, shares=True, frozen="layers.1"),
    Case("projected", Schedule1F1B, {"clip": "project"}, shares=True),
    Case(
        "overrides",
        ScheduleGPipe,
        {"overrides": [{"match": "lm_head*", "tau": 0.2}, {"match": "embed*", "tau": 0.1}]},
        shares=True,
    ),
)


def run(case: Case, mesh: DeviceMesh, make: Callable[..., torch.optim.Optimizer]) -> Any:
    """Return how far this rank's stage ends from one process, and both optimizers."""
    torch.manual_seed(0)
    alone = Model()
    for name, param in alone.named_parameters():
        param.requires_grad_(not name.startswith(case.frozen))
    stage = mesh.get_coordinate()[0]
    model = stage_of(alone, stage)
    shards = mesh.size(1)
    if shards > 1:
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    group = mesh.get_group(0)
    first = batch(0, ROWS // MICROBATCHES)
    inner = torch.zeros(*first.shape, WIDTH, requires_grad=True)
    logits = torch.zeros(*first.shape, VOCABULARY, requires_grad=True)
    piped = PipelineStage(
        model,
        stage,
        STAGES,
        torch.device("cpu"),
        input_args=(first if stage == 0 else inner,),
        output_args=(logits if stage == 1 else inner,),
        group=group,
    )
    schedule = case.schedule(piped, n_microbatches=MICROBATCHES, loss_fn=loss_of)
    optimizers = [make(alone, None), make(model, group if case.shares else None)]
    for step in range(STEPS):
        tokens = batch(step, ROWS * shards)
        loss_of(alone(tokens), tokens).backward()
        piece = tokens.chunk(shards)[mesh.get_coordinate()[1]]
        if stage == 0:
            schedule.step(piece)
        else:
            schedule.step(target=piece)
        if not SCALES:
            for param in model.parameters():
                if param.grad is not None:
                    param.grad /= MICROBATCHES
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    expected = dict(alone.named_parameters())
    distances = [
        float((whole(param) - expected[name]).norm() / expected[name].norm())
        for name, param in model.named_parameters()
    ]
    return max(distances), optimizers


def of_stages(entries: dict[str, MatrixStats]) -> dict[str, MatrixStats]:
    """Return what all ranks list."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, entries)
    return {name: entry for of_rank in gathered for name, entry in of_rank.items()}


def check(case: Case, mesh: DeviceMesh) -> None:
    def adamw2(model: Model, group: Any) -> AdamW2:
        options: dict[str, Any] = {"tau": 0.03, **case.options}
        named = model.named_parameters()
        return AdamW2(named, lr=1e-2, weight_decay=0.1, budget_group=group, **options)

    def adamw(model: Model, _: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    distance, (alone, spread) = run(case, mesh, adamw2)
    of_adamw, _ = run(case, mesh, adamw)
    entries, expected = of_stages(spread.stats()), alone.stats()
    assert set(entries) == set(expected), set(entries) ^ set(expected)
    for name, entry in entries.items():
        assert entry.tau == expected[name].tau, (case.name, name, entry.tau, expected[name].tau)
    both = torch.tensor([distance, of_adamw])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    distance, of_adamw = both.tolist()
    clipped = sum(entry.clipped for entry in entries.values())
    if dist.get_rank() == 0:
        print(
            f"{case.name}: {distance:.1e} from one process, AdamW {of_adamw:.1e}; "
            f"of {len(entries)} matrices {clipped} clipped",
            flush=True,
        )
    assert distance <= TOLERANCE, (case.name, distance)
    assert clipped > 1


def said(make: Callable[[], Any]) -> str:
    try:
        make()
    except ValueError as error:
        return str(error)
    return "nothing"


def check_refusals(mesh: DeviceMesh) -> None:
    group = mesh.get_group(0)

    def names_of_a_stage() -> None:
        """Both stages call their first layer '0.weight'."""
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].weight.grad = torch.ones(4, 4)
        AdamW2(model.named_parameters(), tau="balanced", io=[], budget_group=group).step()

    sentence = said(names_of_a_stage)
    assert sentence == (
        "AdamW2: budget_group got ranks that have a matrix '0.weight' each, it takes ranks whose "
        "parameters have other names, those of the whole model."
    ), sentence


def main() -> None:
    warnings.simplefilter("ignore")
    mend_transfers()
    dist.init_process_group("gloo")
    shards = dist.get_world_size() // STAGES
    mesh = init_device_mesh("cpu", (STAGES, shards), mesh_dim_names=("pp", "dp"))
    with tolerances.every_iteration():
        for case in CASES:
            check(case, mesh)
    check_refusals(mesh)
    print("all agree", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
