"""The entry point of the group ``torch.backends`` that PyTorch calls at the end of ``import torch``
(2.5 and newer).

It makes ``torch.optim.AdamW2`` resolvable, which is where DeepSpeed looks up every optimizer name
that it does not know itself. Switched off, with all other plugins, by
``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Let ``torch.optim`` import AdamW2 when it is asked for: every ``import torch`` pays for what
    is done here.
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
