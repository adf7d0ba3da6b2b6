"""AdamW² for DeepSpeed and Megatron: train Transformers without learning-rate warmup.

Qi et al., "Taming Transformer Without Using Learning Rate Warmup".
"""

from weyl_megatron.optimizer import AdamW2, MatrixStats

__all__ = ["AdamW2", "MatrixStats"]
__version__ = "0.1.0"
