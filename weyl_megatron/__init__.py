"""AdamW² for DeepSpeed, Megatron and PyTorch: train Transformers without learning-rate warmup.

:class:`AdamW2` is the optimizer, :class:`MatrixStats` what it says of a matrix. Beside it lie
``weyl_megatron.watch.Watch`` (measure a run), ``weyl_megatron.transformer`` (σReparam, scaled
residuals) and ``weyl_megatron.engines.megatron.enable`` (the name ``"adamw2"`` in Megatron).

Qi et al., "Taming Transformer Without Using Learning Rate Warmup", arXiv 2505.21910.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optimizer import AdamW2, MatrixStats

__all__ = ["AdamW2", "MatrixStats"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch loads this package as a plugin at the end of its own import,
    # which must cost nothing.
    if name in __all__:
        from . import optimizer

        return getattr(optimizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
