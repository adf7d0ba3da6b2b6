"""What DeepSpeed, and Accelerate before it, do to an AdamW2 while they build an engine around it.

Both have optimizers of their own for some configurations, which they put in the place of any other,
or beside it. An AdamW2 is kept where it can do the same, and refused in one sentence where it
cannot.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch.optim import Optimizer

from .. import unstepped
from ..engine import register
from ..on_import import when_imported, wrap
from .adapter import DeepSpeed, allow_under_zero, check_swapped, read_layout
from .swapping import is_swapping, restore

#: AdamW2, and what users derive from it, once one was made.
_classes: set[type] = set()

#: How many were made, and how many had been made as an engine began to configure its own.
_made = 0
_made_before: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def prepare(optimizer: Optimizer) -> None:
    """Make ready for the engine that ``optimizer``, which was just made, may be given to, or is
    made by.
    """
    global _made
    _made += 1
    _classes.add(type(optimizer))
    when_imported("deepspeed.runtime.engine", _install)
    when_imported("accelerate.accelerator", _keep_in_accelerate)


def _install(module: ModuleType) -> None:
    for kind in _classes:
        allow_under_zero(kind)
    engine = module.DeepSpeedEngine
    wrap(engine, "_configure_optimizer", _counting)
    wrap(engine, "zero_force_ds_cpu_optimizer", _forcing)
    wrap(engine, "_do_optimizer_sanity_check", _checking)
    wrap(engine, "_configure_lr_scheduler", _reading)
    wrap(engine, "_take_model_step", _looking)
    wrap(engine, "_load_checkpoint", _restoring)


def _is_adamw2(optimizer: object) -> bool:
    return isinstance(optimizer, tuple(_classes))


def _counting(configure: Callable[..., Any]) -> Callable[..., Any]:
    def _configure_optimizer(engine: Any, *args: Any, **kwargs: Any) -> Any:
        _made_before[engine] = _made
        return configure(engine, *args, **kwargs)

    return _configure_optimizer


def _forcing(force: Callable[..., bool]) -> Callable[..., bool]:
    def zero_force_ds_cpu_optimizer(engine: Any) -> bool:
        """Whether DeepSpeed insists on its own Adam under offload: not for AdamW2, which has a CPU
        kernel.
        """
        if not (_is_adamw2(engine.client_optimizer) or _has_made_one(engine)):
            return force(engine)
        if getattr(engine._config, "_param_dict", {}).get("zero_force_ds_cpu_optimizer"):
            raise ValueError(
                "AdamW2: zero_force_ds_cpu_optimizer got True, it takes False, or nothing."
            )
        return False

    return zero_force_ds_cpu_optimizer


def _has_made_one(engine: Any) -> bool:
    """Whether the caller's function has just made the engine an AdamW2, which it does not keep."""
    is_function = not isinstance(engine.client_optimizer, Optimizer)
    # An engine that is not known began before the first was made.
    return is_function and _made > _made_before.get(engine, 0)


def _checking(check: Callable[..., Any]) -> Callable[..., Any]:
    def _do_optimizer_sanity_check(engine: Any, basic_optimizer: Any) -> Any:
        if _is_adamw2(basic_optimizer):
            for sentence in _refusals(engine._config):
                raise ValueError(sentence)
            basic_optimizer.engine = DeepSpeed(engine)  # its wrapper may call step() as it is built
        return check(engine, basic_optimizer)

    return _do_optimizer_sanity_check


def _refusals(config: Any) -> Iterator[str]:
    """Yield one sentence for each option of DeepSpeed's configuration that would step weights
    without AdamW2.
    """
    zero = config.zero_config
    offload = getattr(zero, "offload_optimizer", None)
    device = str(getattr(offload, "device", None) or "none").split(".")[-1]
    if getattr(zero, "zenflow", None) is not None:
        yield (
            "AdamW2: zero_optimization.zenflow got a configuration, it takes none: ZenFlow "
            "has its own Adam."
        )
    if zero.stage == 3 and getattr(offload, "super_offload", False):
        yield (
            "AdamW2: offload_optimizer.super_offload got True, it takes False: SuperOffload "
            "has its own Adam."
        )
    if zero.stage == 3 and device != "none":
        if getattr(offload, "ratio", 1.0) != 1.0:
            yield (
                f"AdamW2: offload_optimizer.ratio got {getattr(offload, 'ratio', 1.0)}, it takes "
                f"1.0: what is not offloaded has its own AdamW."
            )
        if device == "nvme" and _release() < (0, 19):
            yield (
                "AdamW2: offload_optimizer.device got 'nvme', it takes 'cpu' or 'none' before "
                "DeepSpeed 0.19."
            )
    if getattr(getattr(config, "float16_config", None), "fp16_master_weights_and_grads", False):
        yield (
            "AdamW2: fp16.fp16_master_weights_and_grads got True, it takes False: AdamW2 "
            "steps float32 masters."
        )
    bf16 = getattr(config, "bfloat16_config", None)
    are_both = getattr(bf16, "bf16_optimizer_states", False) and device == "none"
    if getattr(bf16, "bf16_master_weights_and_grads", False) and not are_both:
        yield (
            "AdamW2: bf16.bf16_master_weights_and_grads got True, it takes False, or True with "
            "bf16_optimizer_states and without offload_optimizer."
        )


def _release() -> tuple[int, ...]:
    """Return the first two numbers of DeepSpeed's version."""
    version = str(sys.modules["deepspeed"].__version__)
    return tuple(int(number) for number in version.split(".")[:2])


def _reading(configure: Callable[..., Any]) -> Callable[..., Any]:
    def _configure_lr_scheduler(engine: Any, *args: Any, **kwargs: Any) -> Any:
        """Follow the construction of the engine's optimizer: what it holds is known from the
        weights still.
        """
        if _is_adamw2(engine.basic_optimizer):
            read_layout(engine)
            check_swapped(engine, is_new=True)
        return configure(engine, *args, **kwargs)

    return _configure_lr_scheduler


def _looking(take: Callable[..., Any]) -> Callable[..., Any]:
    def _take_model_step(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_adamw2(engine.basic_optimizer) and not engine.global_steps:
            check_swapped(engine, is_new=False)
        taken = take(engine, *args, **kwargs)
        if getattr(engine, "_step_applied", True) and not _has_scaler(engine):
            unstepped.look(engine, engine.module.parameters(), engine.basic_optimizer)
        return taken

    return _take_model_step


def _restoring(load: Callable[..., Any]) -> Callable[..., Any]:
    def _load_checkpoint(engine: Any, load_dir: str, tag: str, *args: Any, **options: Any) -> Any:
        """Read of a checkpoint, too, what DeepSpeed does not read where it offloads to NVMe."""
        loaded = load(engine, load_dir, tag, *args, **options)
        is_swapped = _is_adamw2(engine.basic_optimizer) and is_swapping(engine.optimizer)
        has_states = options.get("load_optimizer_states", True)
        if is_swapped and has_states and not options.get("load_module_only") and loaded[0]:
            restore(engine, load_dir, tag)
        return loaded

    return _load_checkpoint


def _has_scaler(engine: Any) -> bool:
    """Whether torch's gradient scaler decides if the optimizer is stepped, which it does not
    tell.
    """
    scalers = (
        (engine, "torch_autocast_z0_gradscaler"),
        (engine.optimizer, "torch_autocast_gradscaler"),
    )
    return any(getattr(owner, name, None) is not None for owner, name in scalers)


def _keep_in_accelerate(module: ModuleType) -> None:
    """Let Accelerate keep an AdamW2, where for offload it puts DeepSpeed's Adam in the place of any
    AdamW.
    """

    def keeping(replace: Callable[..., Any]) -> Callable[..., Any]:
        return lambda optimizer: optimizer if _is_adamw2(optimizer) else replace(optimizer)

    wrap(module, "map_pytorch_optim_to_deepspeed", keeping)


register(prepare=prepare)
