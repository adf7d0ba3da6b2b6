"""The entry point of the group ``torch.backends`` that PyTorch calls at the end of ``import torch``
(2.5 and newer).

It makes ``torch.optim.AdamW2`` resolvable, which is where DeepSpeed looks up every optimizer name
that it does not know itself, gives timm and Hugging Face's Trainer the name ``adamw2`` once they
are imported, and has Megatron looked at as it is, for the variable WEYL_MEGATRON. Switched off,
with all other plugins, by ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from ...environment import IN_MEGATRON, LOG
from ..on_import import when_imported

#: Where Megatron builds optimizers, and where Megatron-LM reads its command line.
_OF_MEGATRON = ("megatron.core.optimizer", "megatron.training.arguments")

#: What trainers' modules are given as they are imported: functions of :mod:`.by_name`.
_JOINED = {
    "timm.optim._optim_factory": "join_timm",
    "transformers.training_args": "join_arguments",
    "transformers.trainer": "join_trainer",
}


def register() -> None:
    """Let ``torch.optim`` import AdamW2 when it is asked for, and trainers find its name: every
    ``import torch`` pays for what is done here.
    """
    import torch.optim

    known = getattr(torch.optim, "__getattr__", None)

    def resolve(name: str) -> Any:
        if name == "AdamW2":
            from ...optimizer import AdamW2

            torch.optim.AdamW2 = AdamW2  # type: ignore[attr-defined]
            return AdamW2
        if known is not None:
            return known(name)
        raise AttributeError(f"module 'torch.optim' has no attribute {name!r}")

    torch.optim.__getattr__ = resolve  # type: ignore[method-assign]
    for name in _OF_MEGATRON:
        when_imported(name, _look_at_megatron)
    for name, function in _JOINED.items():
        when_imported(name, partial(_join, function))


def _look_at_megatron(module: ModuleType) -> None:
    """Act on the variable as it is now: a script may set it after ``import torch``."""
    if os.environ.get(IN_MEGATRON):
        import_module("weyl_megatron.engines.megatron.variable").act(module)


def _join(function: str, module: ModuleType) -> None:
    try:
        getattr(import_module(".by_name", __package__), function)(module)
    except (AttributeError, TypeError) as error:
        # A release that has other names says itself that it does not know this one; to import it
        # has to work for everybody.
        LOG.info("AdamW2: %s does not take the name 'adamw2' (%s).", module.__name__, error)
