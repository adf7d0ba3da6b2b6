"""`weyl-megatron doctor`: what is installed, and which kernel will step which tensors here, and why."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from weyl_megatron.kernels.choice import VARIABLE, pick_name, why_not

_PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "transformer-engine", "apex")

#: What mends a kernel that cannot run, by its name.
_REMEDIES = {
    "cpu": "install a C++ compiler (apt-get install g++), or name yours in CXX",
    "triton": "pip install triton",
}


def report() -> str:
    """Return the report, a line each."""
    lines = [f"{name:<19}{_version(name)}" for name in ("weyl-megatron", *_PACKAGES)]
    door = "open" if hasattr(torch.optim, "AdamW2") else "shut: TORCH_DEVICE_BACKEND_AUTOLOAD=0, or not installed"
    name = "DeepSpeed's door"
    lines.append(f'{name:<19}{door} ("type": "AdamW2")')
    devices = [("cpu", "cpu")]
    if torch.cuda.is_available():
        devices.append(("cuda", "triton"))
    for device, fused in devices:
        try:
            kernel = pick_name(device, {torch.float32})
        except ValueError as error:
            lines.append(f"{'kernel, ' + device:<19}{error}")
            continue
        reason = why_not(fused, device, {torch.float32})
        if kernel != fused:
            forced = reason is None
            kernel += f", because {VARIABLE} says so" if forced else f", because {reason}; {_REMEDIES[fused]}"
        lines.append(f"{'kernel, ' + device:<19}{kernel}")
    lines.append(f"{'':<19}float32 tensors; other dtypes, and τ = ∞, are stepped in plain torch")
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
