"""Megatron-core and Megatron-LM: ``enable()`` once, then ``OptimizerConfig(optimizer="adamw2",
…)``.
"""

from .adapter import adamw2, attach, enable, stats

__all__ = ["adamw2", "attach", "enable", "stats"]
