"""torchrun worker: trains tiny Hugging Face models with the Trainer or Accelerate, for every case
of a list.

Usage: worker.py CASES.json OUT_DIR. Imports nothing to train with AdamW2: DeepSpeed finds it by its
    name.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, set_seed
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests import tolerances
from tests.engines.huggingface import tiny
from tests.engines.said import Said
from weyl_megatron.engines.shutdown import shutdown

JSON = Path(__file__).parents[3] / "examples/deepspeed"

SAID = Said()


class Rates(TrainerCallback):
    """Notes the rate of every step before it is made."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.trainer: Any = None

    def note(self, engine: Any) -> None:
        self.seen.append(float(engine.basic_optimizer.param_groups[0]["lr"]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note(self.trainer.model_wrapped)


def with_trainer(case: dict[str, Any], start: Path, out: Path) -> dict[str, Any]:
    """Train, then go on from the checkpoint in the middle as another process would."""
    half = tiny.STEPS // 2
    result = train(case, start, out, "trained", half)
    AcceleratorState._reset_state(False)
    result["resumed"] = train(case, start, out, "resumed", half, str(out / f"checkpoint-{half}"))
    return result


def train(
    case: dict[str, Any],
    start: Path,
    out: Path,
    name: str,
    save_steps: int,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    config: Any = str(JSON / f"zero{case['stage']}.json")
    if case["config"] != "file":
        config = changed(json.loads(Path(config).read_text()), case)
    args = TrainingArguments(
        output_dir=str(out),
        deepspeed=config,
        use_cpu=True,
        per_device_train_batch_size=tiny.MICRO,
        gradient_accumulation_steps=tiny.ACCUMULATION,
        num_train_epochs=1,
        learning_rate=tiny.LR,
        adam_beta1=tiny.BETAS[0],
        adam_beta2=tiny.BETAS[1],
        adam_epsilon=tiny.EPS,
        weight_decay=tiny.DECAY,
        max_grad_norm=tiny.CLIP,
        lr_scheduler_type="constant",  # the Trainer's own, where the JSON has none
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        logging_steps=1,
        save_steps=save_steps,
        report_to="none",
        disable_tqdm=True,
        **({"optim": case["optim"], "optim_args": f"tau={tiny.TAU}"} if "optim" in case else {}),
    )
    model = type(tiny.make(case["model"])).from_pretrained(start)  # within zero.Init at stage 3
    options: dict[str, Any] = {}
    kwargs = {"lr": tiny.LR, "betas": tiny.BETAS, "eps": tiny.EPS, "tau": case.get("tau", tiny.TAU)}
    if case["config"] == "no optimizer" and "optim" not in case:
        options["optimizer_cls_and_kwargs"] = (torch.optim.AdamW2, kwargs)
    if case["config"] == "ignored optimizer":
        options["optimizers"] = (torch.optim.AdamW2(model.named_parameters(), **kwargs), None)
    rates = Rates()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tiny.samples(case["model"]),
        data_collator=tiny.collate,
        callbacks=[rates],
        **options,
    )
    rates.trainer = trainer
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(out / name))
    filled = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return facts(trainer.model_wrapped, filled, rates.seen, losses)


def changed(config: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    if "optimizer" in case.get("config", ""):  # there is another one, or none
        del config["optimizer"], config["scheduler"]
    elif "tau" in case:
        config["optimizer"]["params"]["tau"] = case["tau"]
    if case.get("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def with_accelerate(case: dict[str, Any], start: Path, out: Path) -> dict[str, Any]:
    plugin = DeepSpeedPlugin(hf_ds_config=str(JSON / f"zero{case['stage']}.json"))
    config = changed(plugin.deepspeed_config, case)
    options = {"betas": tiny.BETAS, "eps": tiny.EPS}
    accelerator = Accelerator(
        deepspeed_plugin=plugin, gradient_accumulation_steps=tiny.ACCUMULATION
    )
    model = type(tiny.make(case["model"])).from_pretrained(start)
    loader = DataLoader(tiny.samples(case["model"]), tiny.MICRO, collate_fn=tiny.collate)
    scheduler = None
    if case.get("config") == "no optimizer":
        options |= {"lr": tiny.LR, "weight_decay": tiny.DECAY, "tau": case.get("tau", tiny.TAU)}
        own = torch.optim.AdamW2(model.named_parameters(), **options)
        engine, optimizer, loader = accelerator.prepare(model, own, loader)
    else:
        config["optimizer"]["params"] |= options
        optimizer = DummyOptim(model.parameters(), lr=tiny.LR, weight_decay=tiny.DECAY)
        scheduler = DummyScheduler(optimizer, total_num_steps=len(loader) // tiny.ACCUMULATION)
        engine, optimizer, loader, scheduler = accelerator.prepare(
            model, optimizer, loader, scheduler
        )
    rates, losses = Rates(), []
    for number, batch in enumerate(loader):
        if number % tiny.ACCUMULATION == 0:
            rates.note(engine)
        with accelerator.accumulate(engine):
            loss = engine(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    state = accelerator.get_state_dict(engine)
    if accelerator.is_main_process:
        accelerator.unwrap_model(engine).save_pretrained(out / "trained", state_dict=state)
    return facts(engine, config, rates.seen, losses)


def facts(
    engine: Any, filled: dict[str, Any], rates: list[float], losses: list[float]
) -> dict[str, Any]:
    optimizer = engine.basic_optimizer
    everyone: list[Any] = [None] * dist.get_world_size()
    stats = getattr(optimizer, "stats", dict)()
    dist.all_gather_object(everyone, {name: tuple(entry) for name, entry in stats.items()})
    return {
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "groups": [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ],
        "batch": [engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()],
        "accumulation": engine.gradient_accumulation_steps(),
        "clipping": engine.gradient_clipping(),
        "stage": engine.zero_optimization_stage(),
        "filled": filled,
        "rates": rates,
        "losses": losses,
        "stats": everyone,
        "said": SAID.take(),
    }


def main() -> None:
    tolerances.make_every_iteration()  # so that no rounding decides on one
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    state = PartialState(cpu=True)
    for kind in ("gpt2", "vit", "mla", "mamba"):
        if state.is_main_process:
            tiny.make(kind).save_pretrained(out / kind)
    state.wait_for_everyone()
    logging.getLogger("weyl_megatron").addHandler(SAID)
    for case in cases:
        set_seed(0)
        try:
            run = with_trainer if case["by"] == "trainer" else with_accelerate
            result = run(case, out / case["model"], out / case["name"])
        except Exception:
            result = {"error": traceback.format_exc()}
            print(f"case {case['name']}, rank {state.process_index}: {result['error']}", flush=True)
        if state.is_main_process:
            torch.save(result, out / f"{case['name']}.pt")
        state.wait_for_everyone()
        AcceleratorState._reset_state(False)
    shutdown()


if __name__ == "__main__":
    main()
