"""What people watch while a Transformer trains.

The paper's terms, energy concentration, entropy, rank, sharpness.
``from weyl_megatron.watch import Watch`` measures a run; ``weyl-megatron report`` draws it.
"""

from .watch import Watch

__all__ = ["Watch"]
