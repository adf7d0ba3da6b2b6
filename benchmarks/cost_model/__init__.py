"""A step's time on a GPU that nobody has run it on: bounds, from the code that Triton compiles, the
tables that the kernels work on, and what is known of the GPU.

    python -m benchmarks.cost_model --gpu h200 a100 h100 [--models ...] [--widths 4 8 16]

Nothing of it is measured. For every state that docs/step_time.md measures on a CPU, and every
launch of a step in it:

* the grid comes from ``weyl_megatron.kernels.units``, asked for the model's shapes on a GPU with so
  many multiprocessors;
* the instructions of each loop come from the SASS of what :mod:`benchmarks.launches` notes, times
  the trips that its ``for`` statement makes on each unit (code.py);
* bytes are counted per unit: what has to cross DRAM, vectors that many programs read, what kernels
  hand to each other by way of L2 (step.py);
* the lower bound is the largest of what DRAM, L2, L1 and the pipes take at their peaks, the upper
  the same at what is assumed that they reach, what is not the longest not quite hidden, or, if that
  is longer, what programs take that wait for all that they load (bounds.py, gpus.py).

A step is the sum of its launches and of the gaps between them. Beside it stands fused AdamW,
bounded likewise: a pass over all parameters as AdamW²'s own, 28 bytes each, and the gaps between as
many launches as torch makes.
"""

from __future__ import annotations

from .model import STATES, adamw, bounds, estimate, muon

__all__ = ["STATES", "adamw", "bounds", "estimate", "muon"]
