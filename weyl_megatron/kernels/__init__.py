"""The arithmetic of a step on flat buffers."""

from weyl_megatron.kernels.torch_adamw import adamw_direction, adamw_moments, adamw_update

__all__ = ["adamw_direction", "adamw_moments", "adamw_update"]
