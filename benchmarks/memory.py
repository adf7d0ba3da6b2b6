"""How much memory AdamW² takes beyond AdamW's, at its peak, as a share of the parameters' bytes.

    python -m benchmarks.memory MODEL BLOCKS DEVICE [CLIP [STATE_DTYPE]]     as gpt2-124m 0 cpu

MODEL is one of benchmarks/models.py, BLOCKS how many of its blocks (0: all), CLIP "scale" (the
default) or "project", at the default number of vectors, STATE_DTYPE "float32" or "bfloat16", for M
and V each where a comma is between them.

The process holds weights, gradients and both moments and nothing else that grows; then it steps in
every state, and what the kernel (or CUDA) says was its most is what the steps took.
"""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import MODELS, is_of_a_block
from weyl_megatron import AdamW2
from weyl_megatron.settings import SCALE


def main(
    name: str, blocks: str, device: str, clip: str = SCALE, state_dtype: str = "float32"
) -> None:
    first, _, second = state_dtype.partition(",")
    kept: dict[str, Any] = {"state_dtype": (first, second or first), "betas": (0.9, 0.95)}
    named = MODELS[name].parameters(int(blocks) or None)
    # What is loaded and allocated once, at any size.
    warm = nn.Parameter(torch.randn(256, 512, device=device))
    warm.grad = torch.randn_like(warm)
    for lr in (1.0, 1e-9):
        optimizer = AdamW2([("w", warm)], lr=lr, clip=clip, io=[], **kept)
        for _ in range(3):
            optimizer.step()
    weights = {n: nn.Parameter(torch.randn(size, device=device) * 0.02) for n, size in named}
    for parameter in weights.values():
        parameter.grad = torch.randn_like(parameter)
    io = [n for n in weights if not is_of_a_block(n)]
    optimizer = AdamW2(weights.items(), lr=1e-2, clip=clip, io=io, **kept)
    optimizer.allocate_state()
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].fill_(1e-3)  # pages of zeros are no memory yet
    gc.collect()
    before = now(device)
    forget_peak(device)
    clipped, settled = 1e-2, 1e-7
    for lr in (clipped, clipped, settled, settled, settled, clipped):  # the last is taken back
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    extra = peak(device) - before
    total = sum(4 * parameter.numel() for parameter in weights.values())
    moments = sum(
        state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    )
    print(
        f"M and V {4 * moments / total:.2f} bytes a parameter, beyond them at the peak "
        f"{4 * extra / total:.2f}"
    )
    print(
        f"{extra / 1e6:.2f} MB beyond AdamW's, of {total / 1e6:.0f} MB of parameters: share "
        f"{extra / total}"
    )


def now(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    size = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert size is not None
    return int(size[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
