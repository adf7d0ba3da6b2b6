"""Runs pretrain_gpt.py of a Megatron-LM checkout on CPU and gloo.

Usage: pretrain_worker.py adapter|plain CHECKOUT FLAGS…
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from tests import megatron_training_cpu

if __name__ == "__main__":
    _, way, checkout, *flags = sys.argv
    script = str(Path(checkout) / "pretrain_gpt.py")
    megatron_training_cpu.install(Path(checkout))
    # One write per line: both ranks print to the same pipe.
    register_optimizer_step_post_hook(
        lambda optimizer, *_: print(f"stepped {type(optimizer).__name__}\n", end="")
    )
    if way == "adapter":
        from weyl_megatron.engines.megatron.__main__ import main

        main([script, *flags])
    else:
        sys.argv = [script, *flags]
        runpy.run_path(script, run_name="__main__")
