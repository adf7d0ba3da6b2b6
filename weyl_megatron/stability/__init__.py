"""What people watch while a Transformer trains: the paper's terms, energy concentration, entropy, rank, sharpness.

``from weyl_megatron.stability import Watch`` measures a run; ``weyl-megatron report`` draws it.
"""

from weyl_megatron.stability.watch import Watch

__all__ = ["Watch"]
