"""torchrun worker: examples/deepspeed's GPT script on a machine that kills a rank while it writes a
checkpoint.

Usage: killed_worker.py RANK TAG, then the script's own arguments. RANK writes half of its first
file of TAG, no more.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from examples.deepspeed import pretrain_gpt

rank, tag = int(sys.argv[1]), sys.argv[2]
save = torch.save


def half(state: Any, path: Any, *args: Any, **kwargs: Any) -> None:
    if int(os.environ["RANK"]) != rank or Path(path).parent.name != tag:
        save(state, path, *args, **kwargs)
        return
    whole = io.BytesIO()
    save(state, whole, *args, **kwargs)
    with open(path, "wb") as file:
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


torch.save = half
sys.exit(pretrain_gpt.main(sys.argv[3:]))
