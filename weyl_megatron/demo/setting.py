"""What all runs have in common, for the report: the model, the text, the training, the machine."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Corpus, unigram_entropy
from .model import GPT, uniform_entropy
from .recipe import sequences_per_rank


def training_facts(steps: int, seed: int, ranks: int, device: torch.device) -> dict[str, Any]:
    """How the runs are trained."""
    on_gpu = device.type == "cuda"
    return {
        "steps": steps,
        "seed": seed,
        "ranks": ranks,
        "batch": sequences_per_rank(ranks) * ranks,
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "precision": "bf16" if on_gpu else "fp32",
    }


def model_facts(model: GPT) -> dict[str, Any]:
    """The model's shape, and the attention entropy that it starts near."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "model": {**asdict(model.config), "parameters": parameters},
        "uniform_entropy": uniform_entropy(model.config.context),
    }


def text_facts(corpus: Corpus, targets: Tensor) -> dict[str, Any]:
    """The text, and its unigram entropy on the validation `targets`."""
    return {
        "files": corpus.files,
        "train_bytes": corpus.train.numel(),
        "validation_bytes": corpus.validation.numel(),
        "digest": corpus.digest,
        "unigram_entropy": unigram_entropy(targets),
    }


def machine_facts() -> dict[str, str]:
    """The processor, the system and the versions."""
    packages = ("torch", "deepspeed", "weyl-megatron")
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def processor() -> str:
    """The processor's name where the system has it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
