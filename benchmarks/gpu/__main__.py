"""The acceptance run for one GPU: at most 8 minutes, and what was measured is saved as it goes.

    python -m benchmarks.gpu                                everything, on a GPU
    python -m benchmarks.gpu --only train --train-seconds 75
    python -m benchmarks.gpu --device cpu --tiny            what a CPU can try of it

Each part runs in a process of its own under a limit of its own; one that fails does not stop the
others, but for kernels that do not compile, without which nothing that follows tells anything.
``--skip`` and ``--only`` take parts:

    env         versions, the GPU, its copy, `weyl-megatron doctor`
    warm        compiles every variant of every Triton kernel, side by side
    cuda        tests/kernels/test_cuda.py
    kernels     whole runs under Triton beside plain torch: odd shapes, ZeRO's cuts, dtypes
    profile     launches, device and host milliseconds of a step, in three states
    big         offsets and matrices beyond 2³¹ elements
    step124, step774, stepg     benchmarks.step_time, within 80 GB
    large       three real steps of GPT 774M and ViT-g, σ₁ beside exact ones
    zero        DeepSpeed 0 to 3 on NCCL
    two         two ranks on the one GPU, over gloo
    train       GPT-2 124M on Python sources: AdamW, AdamW with warmup, AdamW², Muon

Into $OUT, or out/gpu: results.json, written anew after each result; log.txt, all that was printed;
step_time.md; train.jsonl and train.svg. The status is 0 where every part passed or said why it
cannot run here, else 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu.part import STOP, Failed, NotRun, Stop, Task, not_run
from benchmarks.gpu.run import PARTS, function_of, run


def main() -> int:
    """Run all parts, or the one that this process was started for; return the exit status."""
    options = parser().parse_args()
    names = [part.name for part in PARTS]
    for key in ("only", "skip"):
        for name in getattr(options, key):
            if name not in names:
                parser().error(f"--{key} got {name!r}, it takes {', '.join(names)}")
    out = Path(os.environ.get("OUT") or "out/gpu").resolve()
    if options.part is None:
        return run(options, out)
    task = Task(
        options.device, options.tiny, options.until or time.time() + 600, out, options.train_seconds
    )
    try:
        function_of(options.part)(task)
    except NotRun as reason:
        not_run(str(reason))
    except Stop as error:
        print(f"{options.part}: {error}", flush=True)
        return STOP
    except Failed as error:
        print(f"{options.part}: {error}", flush=True)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to try this on a CPU")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts (%(default)s)")
    parser.add_argument(
        "--train-seconds", type=float, default=60, help="at most for each of train's (%(default)s)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PART")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the one that this process is for
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # when it is ended
    return parser


if __name__ == "__main__":
    sys.exit(main())
