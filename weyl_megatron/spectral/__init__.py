"""σ₁ of matrices that no rank holds whole: tiles and block power iteration. Knows no engine and no optimizer."""

from weyl_megatron.spectral.blocks import MatrixSpec
from weyl_megatron.spectral.power import PowerIteration
from weyl_megatron.spectral.tiles import Block, Tile, tiles_of_range

__all__ = ["Block", "MatrixSpec", "PowerIteration", "Tile", "tiles_of_range"]
