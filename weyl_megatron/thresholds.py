"""Which τ and which floor under σ₁(W) hold for each matrix, and which parameters hold matrices at all."""

from __future__ import annotations

from weyl_megatron.layouts.buffers import Layout, Parameter
from weyl_megatron.layouts.grid import Grid, grid_of, known_fused, told_fused
from weyl_megatron.roles import io_parameters
from weyl_megatron.rule import HIDDEN_BUDGET, IO_TAU, SLOW_TAU, random_sigma, xavier_std
from weyl_megatron.settings import Settings, read_tau


class Thresholds:
    """What the settings mean for the parameters of one model.

    Collective over the ranks that ``layout.gather`` asks, where there are such ranks.

    Args:
        settings: what the optimizer was told.
        layout: every parameter of the model, on this tensor-parallel rank whole.
        auto: whether any parameter group or override uses tau="balanced".

    Raises:
        ValueError: an override matches nothing; or tau="balanced", and nothing tells which parameters are embeddings
            and head, or how many matrices the other ranks have.
    """

    def __init__(self, settings: Settings, layout: Layout, auto: bool) -> None:
        if layout.is_part and auto:
            raise ValueError(
                "AdamW2: tau got 'balanced', but a pipeline stage or a rank of experts does not know how many matrices "
                "the others have; it takes a number under DeepSpeed's pipeline engine and MoE, and under Megatron's "
                "overlap_param_gather_with_optimizer_step."
            )
        self._settings = settings
        taus = [settings.tau, *(override.get("tau", 0.0) for override in settings.overrides)]
        #: Whether a matrix somewhere may have a τ above SLOW_TAU; the same on all ranks, whatever these have of it.
        self.has_fast = auto or any(tau > SLOW_TAU for tau in taus)
        self._io: set[str] | None = None
        parameters = layout.parameters or [shard.parameter for buffer in layout.buffers for shard in buffer.shards]
        counts = {parameter.name: self._count(parameter) for parameter in parameters}
        if layout.gather is not None and (auto or settings.overrides):
            counts = {name: count for theirs in layout.gather(counts) for name, count in theirs.items()}
        if not layout.is_part:  # else a pattern may be meant for parameters that other ranks have
            settings.check_matches(list(counts))
        if auto:
            self._io = io_parameters(counts, layout.module, settings.io)
            self._hidden = sum(count for name, count in counts.items() if name not in self._io)

    def _count(self, parameter: Parameter) -> int:
        grid = self.grid(parameter)
        return 0 if grid is None else len(grid.matrices)

    def grid(self, parameter: Parameter) -> Grid | None:
        """Return which matrices a parameter holds, or None where it takes the scheduled rate."""
        if self._settings.override(parameter.name, "exempt", False):
            return None
        if parameter.is_vector and not (self._settings.clip_vectors and len(parameter.shape) == 1):
            return None
        told = self._settings.override(parameter.name, "fused")
        if told is None:
            fused = parameter.fused or known_fused(parameter.name, parameter.whole_shape)
        else:
            fused = None if told == 1 else told_fused(parameter.name, parameter.whole_shape, told)
        try:
            grid = grid_of(parameter.shape, sharding=parameter.sharding, fused=fused)
        except ValueError as error:
            raise ValueError(f"AdamW2: parameter '{parameter.name}': {error}.") from None
        return grid if any(matrix.rows * matrix.cols for matrix in grid.matrices) else None

    def floor_and_tau(self, parameter: Parameter, rows: int, cols: int, tau: float | str) -> tuple[float, float]:
        """Return (floor under σ₁(W), τ) of a (rows, cols) matrix whose parameter group says ``tau``."""
        tau = read_tau("a parameter group's tau", self._settings.override(parameter.name, "tau", tau))
        if tau != "auto":
            return random_sigma(rows, cols, self._settings.floor_std), float(tau)
        if self._io is None:
            raise ValueError(
                "AdamW2: a parameter group's tau became 'balanced' after construction, it takes a number now."
            )
        share = IO_TAU if parameter.name in self._io else HIDDEN_BUDGET / self._hidden
        return random_sigma(rows, cols, xavier_std(rows, cols)), share
