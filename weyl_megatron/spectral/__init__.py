"""σ₁ of matrices that no rank holds whole: tiles and block power iteration. Knows no engine and no
optimizer.
"""

from .blocks import MatrixSpec
from .power import PowerIteration
from .tiles import Block, Tile, tiles_of_range

__all__ = ["Block", "MatrixSpec", "PowerIteration", "Tile", "tiles_of_range"]
