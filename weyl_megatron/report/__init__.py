"""Pages of what was measured: one library of charts, one style, for all of them."""
