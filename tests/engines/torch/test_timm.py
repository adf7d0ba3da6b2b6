"""timm: one registration, and its factory and training script know the name."""

from __future__ import annotations

import pytest
import torch

from weyl_megatron import AdamW2

timm = pytest.importorskip("timm")


def test_a_registration_lets_timm_make_it_by_name() -> None:
    """timm loads no plugins; its layer decay makes a group of unnamed parameters per layer."""
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    info = OptimInfo(
        name="adamw2",
        opt_class="weyl_megatron.AdamW2",
        description="AdamW without warmup",
        has_betas=True,
    )
    default_registry.register(info)
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, depth=2, img_size=32, patch_size=16
    )
    optimizer = create_optimizer_v2(
        model, opt="adamw2", lr=1.0, weight_decay=0.05, layer_decay=0.75, tau=0.02, model=model
    )
    assert type(optimizer) is AdamW2
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    stats = optimizer.stats()
    assert {f"blocks.1.attn.qkv.weight[{part}]" for part in "qkv"} < set(stats)
    assert all(
        entry.tau == 0.02 and entry.clipped for name, entry in stats.items() if "qkv" in name
    )
