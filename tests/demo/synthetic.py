"""Writes the logs of a demo that was never run: small, and with the final losses that a test
wants.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from weyl_megatron.demo.model import GPT, GPTConfig, uniform_entropy
from weyl_megatron.demo.recipe import RUNS, Run, deepspeed_config, learning_rate
from weyl_megatron.demo.results import Results, load_results

UNIGRAM = 3.1
GOOD = {
    "adamw": 3.15,
    "adamw-warmup": 2.35,
    "adamw2": 2.41,
    "adamw2-auto": 2.33,
    "adamw2-project": 2.27,
}
STEPS = 12
SHAPE = GPTConfig(layers=2, heads=2, width=8)


def synthetic_results(out: Path, **losses: float) -> Results:
    """Results of a demo that ended with GOOD, but for `losses` (keys with _ for -)."""
    finals = {**GOOD, **{name.replace("_", "-"): loss for name, loss in losses.items()}}
    (out / "setting.json").write_text(json.dumps(setting()))
    for run in RUNS:
        (out / run.name).mkdir(exist_ok=True)
        lines = [json.dumps(record) for record in records(run, finals[run.name])]
        (out / run.name / "log.jsonl").write_text("\n".join(lines) + "\n")
    return load_results(out)


def setting() -> dict[str, Any]:
    text = {
        "files": 3,
        "train_bytes": 100,
        "validation_bytes": 10,
        "digest": "0123",
        "unigram_entropy": UNIGRAM,
    }
    return {
        "steps": STEPS,
        "seed": 0,
        "ranks": 2,
        "batch": 8,
        "device": "CPU",
        "precision": "fp32",
        "model": {"context": 64, "layers": 2, "heads": 2, "width": 8, "parameters": 1},
        "uniform_entropy": uniform_entropy(64),
        "text": text,
        "machine": dict.fromkeys(
            ["processor", "system", "python", "torch", "deepspeed", "weyl-megatron"], "0"
        ),
    }


def records(run: Run, final: float) -> list[dict[str, Any]]:
    matrices = [name for name, parameter in GPT(SHAPE).named_parameters() if parameter.ndim == 2]
    log: list[dict[str, Any]] = [
        {
            "event": "start",
            "run": run.name,
            "title": run.title,
            "steps": STEPS,
            "config": deepspeed_config(run, 2, bf16=False),
            "elapsed": 0,
        }
    ]
    for step in range(STEPS):
        lr = learning_rate(run, step, STEPS)
        record = {
            "event": "step",
            "step": step + 1,
            "loss": final + math.exp(-step),
            "lr": lr,
            "elapsed": step + 1,
        }
        if "tau" in run.optimizer["params"]:
            record |= {
                "clipped": 1,
                "matrices": len(matrices),
                "alpha": dict.fromkeys(matrices, lr / 2),
            }
        record["entropy"] = [[3.0, 2.5], [2.9, 2.0]]
        log.append(record)
    return [*log, {"event": "end", "validation_loss": final, "elapsed": STEPS + 1}]
