"""How much a step computes, and how much of the device's peak that is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets.
PEAK = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def training_flops(build: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> float:
    """Return the FLOPs that training on `inputs` takes.

    torch counts those of one forward pass; a backward pass takes twice as many. Model and inputs
    are built on the meta device, which computes nothing. A recomputed forward pass does not count,
    which is what makes the quotient the model's utilisation (MFU) and not the hardware's.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        build()(inputs())
    return 3.0 * counter.get_total_flops()


def peak_flops() -> float | None:
    """Return this GPU's peak in FLOP/s; None for a CPU or a GPU that is not in the table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    models = sorted((model for model in PEAK if model in name), key=len)
    return PEAK[models[-1]] if models else None  # "H100 PCIe" before "H100"
