"""AdamW² for DeepSpeed and PyTorch: train Transformers without learning-rate warmup.

Qi et al., "Taming Transformer Without Using Learning Rate Warmup".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optimizer import AdamW2, MatrixStats

__all__ = ["AdamW2", "MatrixStats"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch loads this package at the end of its own import, and that must
    # cost nothing.
    if name in __all__:
        from . import optimizer

        return getattr(optimizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
