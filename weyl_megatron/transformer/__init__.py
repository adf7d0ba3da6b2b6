"""A Transformer's blocks, what their layers are to them, and the cures that change the model.

``sigma_reparam`` and ``fold`` (Zhai et al. 2023), ``scale_residuals`` (Noci et al. 2022).
"""

from .reparam import fold, sigma_reparam
from .residual import scale_residuals

__all__ = ["fold", "scale_residuals", "sigma_reparam"]
