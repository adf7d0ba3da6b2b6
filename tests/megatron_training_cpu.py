"""Lets Megatron-LM's training scripts run on CPU and gloo: what megatron.training asks of CUDA
beyond megatron-core.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo

from tests import megatron_cpu


def install(checkout: Path) -> None:
    """Answer the calls of the Megatron-LM in ``checkout`` to CUDA from the CPU, in this process."""
    # Megatron asks for it on the GPUs that it believes to see, and Megatron-FSDP for more
    is_fsdp = "--use-megatron-fsdp" in sys.argv
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8" if is_fsdp else "1"
    torch._dynamo.config.disable = True  # its fused functions would be compiled for some minutes
    _dataset_helpers(checkout)
    sys.path.insert(0, str(checkout))
    megatron_cpu.install()
    _device()
    _kernels(checkout)
    torch.rand = megatron_cpu._on_cpu(torch.rand)


def _device() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="cpu", major=9, minor=0, total_memory=0
    )
    torch.cuda.set_stream = lambda stream: None
    for name in (
        "_accelerator_graph_capture_health_check",
        "_cuda_graph_capture_health_check",
    ):  # by torch's release
        setattr(torch.optim.Optimizer, name, lambda self: None)
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch.cuda.memory_stats = lambda device=None: dict.fromkeys(
        ["allocated_bytes.all.current", "allocated_bytes.all.peak", "allocation.all.current"], 0
    )
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    ):
        setattr(torch.cuda, name, lambda device=None: 0)


def _kernels(checkout: Path) -> None:
    """Neither compile the dataset helpers into the checkout nor, before 0.18, CUDA kernels."""
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None
    if (checkout / "megatron/legacy/fused_kernels").is_dir():
        from megatron.legacy import fused_kernels

        fused_kernels.load = lambda args: None


def _dataset_helpers(checkout: Path) -> None:
    """Take the compiled dataset helpers of the installed megatron-core, for a checkout has only
    their source.
    """
    if any((checkout / "megatron/core/datasets").glob("helpers_cpp*.so")):
        return
    name = "megatron.core.datasets.helpers_cpp"
    for folder in sys.path:
        for library in Path(folder or ".").glob("megatron/core/datasets/helpers_cpp*.so"):
            spec: Any = importlib.util.spec_from_file_location(name, library)
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return
