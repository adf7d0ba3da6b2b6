"""The entry point of the group ``torch.backends`` that PyTorch calls at the end of ``import torch``
(2.5 and newer).

It makes ``torch.optim.AdamW2`` resolvable, which is where DeepSpeed looks up every optimizer name
that it does not know itself, and gives timm and Hugging Face's Trainer the name ``adamw2`` once
they are imported. Switched off, with all other plugins, by ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from ...environment import LOG
from ..on_import import when_imported

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
    for name, function in _JOINED.items():
        when_imported(name, partial(_join, function))


def _join(function: str, module: ModuleType) -> None:
    try:
        getattr(import_module(".by_name", __package__), function)(module)
    except (AttributeError, TypeError) as error:
        # A release that has other names says itself that it does not know this one; to import it
        # has to work for everybody.
        LOG.info("AdamW2: %s does not take the name 'adamw2' (%s).", module.__name__, error)
