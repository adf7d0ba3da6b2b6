"""`weyl-megatron doctor`: what is installed, which engines' adapters are ready, which kernel steps
here, and what mends the rest.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch.cuda import nccl

from .engines.megatron.variable import read
from .environment import IN_MEGATRON
from .kernels.choice import VARIABLE, pick_name, why_no_launcher, why_not

#: The oldest release that works and the newest that the tests ran, as in setup.py and the README.
_SUPPORTED = {
    "torch": ("2.5", "2.15"),
    "deepspeed": ("0.16.9", "0.19"),
    "megatron-core": ("0.14", "0.19"),
}

#: What nothing requires, and how to get it; PyPI's "apex" is another package.
_OPTIONAL = {
    "triton": "the kernel on GPUs: pip install triton",
    "transformer-engine": (
        "Megatron's fp8: pip install --no-build-isolation 'transformer-engine[pytorch]'"
    ),
    "apex": (
        "Megatron's fused kernels: pip install --no-build-isolation "
        "git+https://github.com/NVIDIA/apex"
    ),
}


class Line(NamedTuple):
    """A line of the report; ``fits``: whether what is installed can work as it is."""

    label: str
    text: str
    fits: bool = True


def examine() -> list[Line]:
    """Return the report. No engine is imported: their metadata say enough."""
    lines = [Line("weyl-megatron", _version("weyl-megatron") or "not installed")]
    lines += [Line("Python", platform.python_version()), _package("torch"), _nccl(), _gpus()]
    lines += [_package(name) for name in ("deepspeed", "megatron-core", *_OPTIONAL)]
    lines += [_meshes(), _deepspeed_adapter(), _deepspeed_device(), _megatron_adapter()]
    lines += _in_megatron()
    lines.append(_kernel("cpu", "cpu"))
    if torch.cuda.is_available():
        lines.append(_kernel("cuda", "triton"))
    elif _version("triton"):  # where there will be a GPU
        lines.append(_launcher())
    lines.append(Line("other dtypes", "torch, as for τ = ∞; the kernels above take float32"))
    unfit = [line.label for line in lines if not line.fits]
    return [*lines, Line("to mend", "; ".join(unfit) or "nothing", not unfit)]


def _package(name: str) -> Line:
    installed = _version(name)
    if name in _OPTIONAL:
        return Line(name, installed or f"not installed; for {_OPTIONAL[name]}")
    oldest, newest = _SUPPORTED[name]
    if installed is None:
        return Line(name, f"not installed; pip install '{name}>={oldest}'")
    if _numbers(installed) < _numbers(oldest):
        mend = f"pip install --upgrade '{name}>={oldest}'"
        return Line(name, f"takes {oldest} or newer, got {installed}; {mend}", False)
    if _numbers(installed)[:2] > _numbers(newest):
        return Line(name, f"{installed}, newer than {newest}, the newest that was tested")
    return Line(name, installed)


def _nccl() -> Line:
    if torch.version.cuda is None:
        return Line("NCCL", "not in this build of torch")
    return Line("NCCL", ".".join(map(str, nccl.version())))  # type: ignore[no-untyped-call]


def _gpus() -> Line:
    names = Counter(
        torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
    )
    if names:
        return Line("GPUs", ", ".join(f"{count} × {name}" for name, count in names.items()))
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        mend = "pip install --force-reinstall torch"
        return Line("GPUs", f"none: this torch is built without CUDA; {mend}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Line("GPUs", "none" if hidden is None else f"none; CUDA_VISIBLE_DEVICES is {hidden!r}")


def _meshes() -> Line:
    label = "FSDP2, HSDP, TP"
    if not torch.distributed.is_available():
        return Line(label, "not ready: this torch is built without torch.distributed")
    return Line(label, "ready (make AdamW2 after fully_shard and parallelize_module)")


def _deepspeed_adapter() -> Line:
    label = "DeepSpeed adapter"
    if hasattr(torch.optim, "AdamW2"):
        return Line(label, 'ready ("type": "AdamW2")')
    mend = "no entry point of this package; pip install it again"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        mend = "TORCH_DEVICE_BACKEND_AUTOLOAD is 0; unset TORCH_DEVICE_BACKEND_AUTOLOAD"
    return Line(label, f"not ready: {mend}", _version("deepspeed") is None)


def _deepspeed_device() -> Line:
    label = "DS_ACCELERATOR"
    name = os.environ.get(label)
    if name == "" or (name == "cuda" and not torch.cuda.is_available()):
        text = f"takes cpu where torch sees no GPU, got {name!r}; export DS_ACCELERATOR=cpu"
        return Line(label, text, _version("deepspeed") is None)
    return Line(
        label, name or "not set: DeepSpeed takes the GPUs, or the CPU where torch sees none"
    )


def _megatron_adapter() -> Line:
    label = "Megatron adapter"
    if _version("megatron-core") is None or not _package("megatron-core").fits:
        return Line(label, "not ready: see megatron-core")
    text = "ready (python -m weyl_megatron.engines.megatron SCRIPT); megatron.training "
    if find_spec("megatron") is not None and find_spec("megatron.training") is not None:
        text += "is installed"
    else:
        text += "comes with a checkout of Megatron-LM, where SCRIPT is"
    if not torch.cuda.is_available():
        text += "; Megatron itself asks for a GPU"
    return Line(label, text)


def _in_megatron() -> list[Line]:
    """Say what the variable for Megatron asks for, where it is set."""
    text = os.environ.get(IN_MEGATRON)
    if not text:
        return []
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return [Line(IN_MEGATRON, "not read where TORCH_DEVICE_BACKEND_AUTOLOAD=0", False)]
    try:
        given = "".join(f", {key}={value!r}" for key, value in read(text).items())
    except ValueError as error:
        return [Line(IN_MEGATRON, str(error), False)]
    return [Line(IN_MEGATRON, f"Megatron's adam is AdamW2{given}")]


def _kernel(device: str, fused: str) -> Line:
    label = f"kernel, {device}"
    try:
        kernel = pick_name(device, {torch.float32})
    except ValueError as error:  # the variable may suit the GPUs alone, if there are any
        fits = device == "cpu" and torch.cuda.is_available()
        return Line(label, f"{error} Try: unset {VARIABLE}", fits)
    if kernel == fused:
        return Line(label, kernel)
    reason = why_not(fused, device, {torch.float32})
    if reason is None:
        return Line(label, f"{kernel}, because {VARIABLE} says so")
    return Line(label, f"{kernel}, because {reason}; {_mend(fused, reason)}")


def _launcher() -> Line:
    reason = why_no_launcher()
    text = "can be built" if reason is None else f"{reason}; {_mend('triton', reason)}"
    return Line("Triton's launcher", text)


def _mend(fused: str, reason: str) -> str:
    """Return what makes a fused kernel run that does not, for a reason of ``why_not``."""
    if fused == "cpu":
        return "apt-get install g++, or name your C++ compiler in CXX"
    if "no C compiler" in reason:
        return "apt-get install gcc, or name your C compiler in CC"
    if "Python.h" in reason:
        return "apt-get install python3-dev"
    if "cannot build" in reason:
        return "name another C compiler in CC"
    return "pip install --upgrade triton"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", text)[0])))
