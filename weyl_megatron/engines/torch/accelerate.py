"""Hugging Face's Accelerate around plain torch: it may step another optimizer than it was given."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch.optim import Optimizer

from .. import unstepped
from ..engine import register
from ..on_import import when_imported, wrap


def prepare(_: Optimizer) -> None:
    """Have the first step of every AcceleratedOptimizer looked at."""
    when_imported("accelerate.optimizer", _look_at_steps)


def _look_at_steps(module: ModuleType) -> None:
    def looking(step: Callable[..., Any]) -> Callable[..., Any]:
        def step_and_look(accelerated: Any, *args: Any, **kwargs: Any) -> Any:
            result = step(accelerated, *args, **kwargs)
            if accelerated.gradient_state.sync_gradients and not accelerated.step_was_skipped:
                params = (param for group in accelerated.param_groups for param in group["params"])
                unstepped.look(accelerated, params, accelerated.optimizer)
            return result

        return step_and_look

    wrap(module.AcceleratedOptimizer, "step", looking)


register(prepare=prepare)
