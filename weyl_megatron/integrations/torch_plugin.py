"""The entry point of the group ``torch.backends`` that PyTorch calls at the end of ``import torch`` (2.5 and newer).

It puts AdamW2 on ``torch.optim``, where DeepSpeed looks up every optimizer name that it does not know itself.
Switched off, with all other plugins, by ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

from __future__ import annotations


def register() -> None:
    """Make ``torch.optim.AdamW2`` resolvable."""
    import torch

    from weyl_megatron.optimizer import AdamW2

    torch.optim.AdamW2 = AdamW2  # type: ignore[attr-defined]
