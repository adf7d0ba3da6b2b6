"""torchrun worker: models that Accelerate and the Trainer spread by FSDP2 train as one process
trains them, and go on from checkpoints bit for bit; the launches are in fsdp2_cases.py.

    torchrun --nproc_per_node=N tests/engines/huggingface/fsdp2_worker.py LAUNCH OUT_DIR

Accelerate shards on accelerators alone: a launch on CPUs it would take for DDP, without a word. It
is told another kind of ranks; all else, its devices and process groups among it, is as it makes it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, set_seed
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from tests import tolerances
from tests.engines.huggingface import tiny
from tests.engines.huggingface.fsdp2_cases import FULL, LAUNCHES, Case
from tests.engines.said import Said
from tests.processes import ROOT
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

SAID = Said()

#: Relative, of weights after 10 steps: sums in another order, in float32.
TOLERANCE = 1e-5

HALF = tiny.STEPS // 2


def take_cpus_for_accelerators() -> None:
    prepare = PartialState.__init__

    def prepare_and_name(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = prepare_and_name  # type: ignore[method-assign]


def options_of(case: Case, *, is_adamw: bool) -> dict[str, Any]:
    options = {"lr": tiny.LR, "betas": tiny.BETAS, "eps": tiny.EPS, "weight_decay": tiny.DECAY}
    return options if is_adamw else {**options, "tau": tiny.TAU, **case.options}


def with_accelerate(
    case: Case, out: Path, *, is_adamw: bool, resumes: bool
) -> tuple[Any, torch.optim.Optimizer]:
    """Return the trained model and its optimizer; save both in the middle, or go on from there."""
    plugin: dict[str, Any] = {"cpu_ram_efficient_loading": False, **case.plugin}
    if case.layers is not None:
        plugin["transformer_cls_names_to_wrap"] = [case.layers]
    fsdp = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type=case.saved,
        **plugin,
    )
    mesh = None if case.mesh is None else ParallelismConfig(**case.mesh)
    accelerator = Accelerator(
        fsdp_plugin=fsdp,
        parallelism_config=mesh,
        gradient_accumulation_steps=tiny.ACCUMULATION * 2 // dist.get_world_size(),
    )
    model = tiny.make(case.model)
    if "cpu_ram_efficient_loading" in case.plugin:  # the other ranks have memory without weights
        start = out.parent / "start"
        if accelerator.is_main_process:
            model.save_pretrained(start)
        accelerator.wait_for_everyone()
        model = type(model).from_pretrained(start)
    options = options_of(case, is_adamw=is_adamw)
    params = model.named_parameters() if case.named else model.parameters()
    if is_adamw:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(params, **options)
    else:
        optimizer = AdamW2(params, **options, model=None if case.named else model)
    loader = DataLoader(tiny.samples(case.model), tiny.MICRO, collate_fn=tiny.collate)
    model, stepped, loader = accelerator.prepare(model, optimizer, loader)
    batches = len(loader)
    if resumes:
        accelerator.load_state(str(out))
        loader = accelerator.skip_first_batches(loader, batches // 2)
    for number, batch in enumerate(loader, batches // 2 * resumes):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), tiny.CLIP)
            stepped.step()
            stepped.zero_grad()
        if number == batches // 2 - 1:
            accelerator.save_state(str(out))
    return accelerator.unwrap_model(model), optimizer


def with_trainer(
    case: Case, out: Path, *, is_adamw: bool, resumes: bool
) -> tuple[Any, torch.optim.Optimizer]:
    """See :func:`with_accelerate`."""
    trainer = trainer_of(case, out, is_adamw=is_adamw)
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{HALF}") if resumes else None)
    return trainer.model, getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def trainer_of(case: Case, out: Path, *, is_adamw: bool = False, **given: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(out),
        fsdp=True,
        fsdp_config={"version": 2, "state_dict_type": case.saved},
        per_device_train_batch_size=tiny.MICRO,
        gradient_accumulation_steps=tiny.ACCUMULATION,
        num_train_epochs=1,
        learning_rate=tiny.LR,
        weight_decay=tiny.DECAY,
        max_grad_norm=tiny.CLIP,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        save_steps=HALF,
        report_to="none",
        disable_tqdm=True,
    )
    model = tiny.make(case.model)
    options = options_of(case, is_adamw=is_adamw)
    made: Any = None
    if case.optim is not None:
        name = "adamw_torch" if is_adamw else case.optim
        own = [f"{key}={value}" for key, value in {"tau": tiny.TAU, **case.options}.items()]
        given_args = None if is_adamw else ",".join(own)
        args.set_optimizer(name, tiny.LR, tiny.DECAY, *tiny.BETAS, tiny.EPS, given_args)
    elif case.named:
        params = list(model.named_parameters())
        made = torch.optim.AdamW if is_adamw else AdamW2, {**options, "params": params}
    else:
        made = lambda: partial(of_model, is_adamw=is_adamw), options
    given = given or {"optimizer_cls_and_kwargs": made}
    rows = tiny.samples(case.model)
    return Trainer(model, args, tiny.collate, train_dataset=rows, **given)


def of_model(model: Any, *, is_adamw: bool, **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer as the Trainer has factories make it, from the model."""
    if is_adamw:
        return torch.optim.AdamW(model.parameters(), **options)
    return AdamW2(model.parameters(), **options, model=model)


def whole(model: Any) -> dict[str, Tensor]:
    """Return all weights, by the names that they have in one process. Collective."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): getattr(
            param, "full_tensor", lambda param=param: param
        )()
        .detach()
        .clone()
        for name, param in model.named_parameters()
    }


def farthest(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    # The gradient of the bias of all keys is 0 but for rounding, and so is what it becomes.
    names = [name for name in expected if not name.endswith("k_proj.bias")]
    return max(
        float((weights[name] - expected[name]).norm() / (expected[name].norm() + 1e-12))
        for name in names
    )


def run(case: Case, out: Path, *, is_adamw: bool = False, resumes: bool = False) -> Any:
    """Return all weights and the optimizer."""
    AcceleratorState._reset_state(True)
    set_seed(0)
    train = with_accelerate if case.by == "accelerate" else with_trainer
    model, optimizer = train(case, out, is_adamw=is_adamw, resumes=resumes)
    assert hasattr(optimizer.param_groups[0]["params"][0], "full_tensor"), "nothing was spread"
    return whole(model), optimizer


def reference(case: Case, tau: float | str | None, **options: Any) -> Any:
    rates = [tiny.LR] * tiny.STEPS
    return tiny.one_process(case.model, rates, case.optim is not None, tau, **options)


def check(case: Case, out: Path) -> None:
    weights, optimizer = run(case, out)
    expected, stats = reference(case, **{"tau": tiny.TAU, **case.options})
    distance = farthest(weights, expected)
    of_adamw = None
    if distance > TOLERANCE:
        of_adamw = farthest(run(case, out / "adamw", is_adamw=True)[0], reference(case, None)[0])
    seen = optimizer.stats()
    clipped = sum(entry.clipped for entry in seen.values())
    again, resumed = run(case, out, resumes=True)
    differ = [name for name, weight in weights.items() if not torch.equal(weight, again[name])]
    if dist.get_rank() == 0:
        beside = "" if of_adamw is None else f", AdamW {of_adamw:.1e}"
        print(
            f"{case.name}: {distance:.1e} from one process{beside}; {clipped} of {len(seen)} "
            f"matrices clipped; resumed: {len(differ)} of {len(weights)} differ",
            flush=True,
        )
    assert distance <= max(TOLERANCE, 2 * (of_adamw or 0)), (case.name, distance, of_adamw)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, seen)
    assert all(other == seen for other in gathered), "ranks have other statistics"
    assert set(seen) == set(stats), (case.name, set(seen) ^ set(stats))
    assert clipped, "nothing was clipped: the case shows nothing"
    assert not differ and resumed.stats() == seen, (case.name, differ)
    assert SAID.take() == []


def check_adamw(out: Path) -> None:
    """At τ = ∞ AdamW2 goes on from what AdamW saved as AdamW does; in files in shards torch misses
    the vectors.
    """
    case = Case("accelerate", "gpt2", FULL, {"tau": inf})
    expected, _ = run(case, out, is_adamw=True)
    distance = farthest(run(case, out, resumes=True)[0], expected)
    if dist.get_rank() == 0:
        print(f"AdamW2 at τ = ∞ on AdamW's full checkpoint: {distance:.1e} from it", flush=True)
    assert distance <= 1e-6
    case, out = Case("accelerate", "gpt2"), out / "shards"
    run(case, out, is_adamw=True)
    with pytest.raises(CheckpointException, match=r"Missing key .*adamw2_vectors"):
        run(case, out, resumes=True)


def check_recipes(out: Path) -> None:
    """What the page shows runs, with a model and data put in."""
    page = (ROOT / "docs/fsdp2_accelerate.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    blocks = [block for block in blocks if "Lightning" not in block]
    for block in blocks:
        AcceleratorState._reset_state(True)
        model, rows = tiny.make("gpt2"), tiny.samples("gpt2")[:32]
        loader = DataLoader(rows, tiny.MICRO, collate_fn=tiny.collate)
        given = {"model": model, "rows": rows, "loader": loader, "out": str(out)}
        exec(block, {**globals(), **given})
    print(f"{len(blocks)} recipes ran", flush=True)


def check_refusals(out: Path) -> None:
    """The Trainer takes no optimizer under FSDP, and takes options' model for the parameters."""
    AcceleratorState._reset_state(True)
    case = Case("trainer", "gpt2")
    optimizer = AdamW2(tiny.make("gpt2").named_parameters())
    with pytest.raises(
        RuntimeError, match="Passing `optimizers` is not allowed if PyTorch FSDP is enabled"
    ):
        trainer_of(case, out, optimizers=(optimizer, None))
    made = AdamW2, {"model": tiny.make("gpt2")}
    trainer = trainer_of(case, out, optimizer_cls_and_kwargs=made)
    with pytest.raises(TypeError, match="object is not iterable"):
        trainer.train()


def main() -> None:
    warnings.simplefilter("ignore")
    tolerances.make_every_iteration()  # so that no rounding decides on one
    take_cpus_for_accelerators()
    logging.getLogger("weyl_megatron").addHandler(SAID)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    PartialState()
    launch, out = sys.argv[1], Path(sys.argv[2])
    for case in LAUNCHES[launch][1]:
        check(case, out / case.name)
    if launch == "quick":
        check_adamw(out / "adamw")
        check_refusals(out / "refused")
        check_recipes(out / "recipes")
    print("all agree", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
