"""`weyl-megatron doctor`: what is installed, which doors are open, which kernel steps here, and
what mends the rest.
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
    """A line of the report; ``fits`` is False where something that is installed cannot work as it
    is.
    """

    label: str
    text: str
    fits: bool = True


def examine() -> list[Line]:
    """Return the report. No engine is imported: their metadata say enough."""
    lines = [Line("weyl-megatron", _version("weyl-megatron") or "not installed")]
    lines += [Line("Python", platform.python_version()), _package("torch"), _nccl(), _gpus()]
    lines += [_package(name) for name in ("deepspeed", "megatron-core", *_OPTIONAL)]
    lines += [_deepspeed_door(), _deepspeed_device(), _megatron_door(), _kernel("cpu", "cpu")]
    if torch.cuda.is_available():
        lines.append(_kernel("cuda", "triton"))
    elif _version("triton"):  # where there will be a GPU
        lines.append(_launcher())
    lines.append(Line("", "float32 tensors; other dtypes, and τ = ∞, are stepped in plain torch"))
    unfit = [line.label for line in lines if not line.fits]
    return [*lines, Line("to mend", "; ".join(unfit) or "nothing", not unfit)]


def _package(name: str) -> Line:
    found = _version(name)
    if name in _OPTIONAL:
        return Line(name, found or f"not installed; for {_OPTIONAL[name]}")
    oldest, newest = _SUPPORTED[name]
    if found is None:
        return Line(name, f"not installed; pip install '{name}>={oldest}'")
    if _numbers(found) < _numbers(oldest):
        return Line(
            name,
            f"takes {oldest} or newer, got {found}; pip install --upgrade '{name}>={oldest}'",
            False,
        )
    untested = _numbers(found)[:2] > _numbers(newest)
    return Line(
        name, f"{found}, newer than {newest}, the newest that was tested" if untested else found
    )


def _nccl() -> Line:
    if torch.version.cuda is None:
        return Line("NCCL", "not in this build of torch")
    return Line("NCCL", ".".join(map(str, nccl.version())))  # type: ignore[no-untyped-call]


def _gpus() -> Line:
    names = Counter(
        torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
    )
    seen = ", ".join(f"{count} × {name}" for name, count in names.items())
    if not seen and torch.version.cuda is None and shutil.which("nvidia-smi"):
        return Line(
            "GPUs", "none: this torch is built without CUDA; pip install --force-reinstall torch"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Line(
        "GPUs", seen or ("none" if hidden is None else f"none; CUDA_VISIBLE_DEVICES is {hidden!r}")
    )


def _deepspeed_door() -> Line:
    if hasattr(torch.optim, "AdamW2"):
        return Line("DeepSpeed's door", 'open ("type": "AdamW2")')
    mend = "no entry point of this package; pip install it again"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        mend = "TORCH_DEVICE_BACKEND_AUTOLOAD is 0; unset TORCH_DEVICE_BACKEND_AUTOLOAD"
    return Line("DeepSpeed's door", f"shut: {mend}", _version("deepspeed") is None)


def _deepspeed_device() -> Line:
    name = os.environ.get("DS_ACCELERATOR")
    if name == "" or (name == "cuda" and not torch.cuda.is_available()):
        text = f"takes cpu where torch sees no GPU, got {name!r}; export DS_ACCELERATOR=cpu"
        return Line("DS_ACCELERATOR", text, _version("deepspeed") is None)
    return Line(
        "DS_ACCELERATOR",
        name or "not set: DeepSpeed takes the GPUs, or the CPU where torch sees none",
    )


def _megatron_door() -> Line:
    if _version("megatron-core") is None or not _package("megatron-core").fits:
        return Line("Megatron's door", "shut: see megatron-core")
    has_training = find_spec("megatron") is not None and find_spec("megatron.training") is not None
    training = (
        "is installed" if has_training else "comes with a checkout of Megatron-LM, where SCRIPT is"
    )
    text = f"open (python -m weyl_megatron.engines.megatron SCRIPT); megatron.training {training}"
    return Line(
        "Megatron's door",
        text + ("" if torch.cuda.is_available() else "; Megatron itself asks for a GPU"),
    )


def _kernel(device: str, fused: str) -> Line:
    label = f"kernel, {device}"
    try:
        kernel = pick_name(device, {torch.float32})
    except ValueError as error:  # what the environment asks for suits GPUs alone, if there are any
        return Line(
            label, f"{error} Try: unset {VARIABLE}", device == "cpu" and torch.cuda.is_available()
        )
    if kernel == fused:
        return Line(label, kernel)
    reason = why_not(fused, device, {torch.float32})
    if reason is None:
        return Line(label, f"{kernel}, because {VARIABLE} says so")
    return Line(label, f"{kernel}, because {reason}; {_mend(fused, reason)}")


def _launcher() -> Line:
    reason = why_no_launcher()
    told = "can be built" if reason is None else f"{reason}; {_mend('triton', reason)}"
    return Line("Triton's launcher", told)


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
