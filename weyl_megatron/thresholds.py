"""Which τ and which floor under σ₁(W) hold for each matrix, and which parameters hold matrices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist

from .environment import LOG
from .layouts.adapters import low_rank_pairs
from .layouts.buffers import Layout, Parameter
from .layouts.fused import (
    Fused,
    explicit_fused,
    known_fused,
    looks_fused,
    stacked_in_bands,
    stacked_parts,
)
from .layouts.grid import Grid, grid_of
from .layouts.kinds import Kind, guessed_form, matrix_axis
from .layouts.modules import kind_by_name
from .rule import (
    ADAPTER_TAU,
    HIDDEN_BUDGET,
    IO_TAU,
    SLOW_TAU,
    balanced_floor,
    random_sigma,
    xavier_std,
)
from .settings import BALANCED, PROJECT, SCALE, Settings, clip_of, read_tau
from .transformer.roles import io_parameters, is_io_name

#: What :class:`weyl_megatron.names.ParameterNames` calls parameters that have no name.
_PLACE = re.compile(r"group\d+\.param\d+\+*$")

#: How many parameters a notice names.
_NAMED = 4

#: What a notice says that weights were taken for.
_READINGS = {
    "experts": "stacks of experts, one matrix (m, n) each, by their shapes",
    "convolution": "convolutions, one matrix (out, in·kernel) each, by their shapes",
    "doubtful experts": (
        "stacks of experts in spite of their shapes, as their modules are no convolutions"
    ),
}


class _Known(NamedTuple):
    """What all ranks tell each other of a parameter."""

    matrices: int | None  # how many, where it is stepped
    kind: Kind | None
    is_frozen: bool = False


class Thresholds:
    """What the settings mean for the parameters of one model.

    Collective over the ranks that ``layout.gather`` asks, where there are such ranks.

    Args:
        settings: the optimizer's.
        layout: every parameter of the model, on this tensor-parallel rank whole.
        auto: whether any parameter group or override uses tau="balanced".
        projects: whether any of them uses clip="project", which hidden matrices take.

    Raises:
        ValueError: an override matches nothing; or tau="balanced", and nothing says which
            parameters are embeddings and head, or how many matrices the other ranks have.
    """

    def __init__(
        self, settings: Settings, layout: Layout, auto: bool, projects: bool = False
    ) -> None:
        if layout.is_part and auto:
            raise ValueError(
                "AdamW2: tau got 'balanced', but a pipeline stage does not know how many matrices "
                "the others have; it takes a number under Megatron's "
                "overlap_param_gather_with_optimizer_step."
            )
        self._settings = settings
        self._is_part = layout.is_part or layout.gather is not None
        taus = [settings.tau, *(override.get("tau", 0.0) for override in settings.overrides)]
        #: Whether a matrix somewhere may have a τ above SLOW_TAU; the same on all ranks, whatever
        #: these have of it.
        self.has_fast = auto or any(tau > SLOW_TAU for tau in taus)
        self._io: set[str] | None = None
        parameters = layout.parameters or [
            shard.parameter for buffer in layout.buffers for shard in buffer.shards
        ]
        #: Weights whose form was guessed, by name: their shapes and what they were taken for.
        self._guesses: dict[str, tuple[tuple[int, ...], str]] = {}
        #: Weights without a name that are kept whole and may be q, k and v: their shapes.
        self._unsplit: dict[str, tuple[int, ...]] = {}
        # Ranks that have other parameters would see other pairs.
        sees_all = not layout.kinds and not self._is_part
        self._pairs = _pairs_by_shape(layout) if sees_all else {}
        self._paired = {p.name: p.shape for p in parameters if p.name in self._pairs}
        known = {name: _Known(None, kind) for name, kind in (layout.kinds or {}).items()}
        known |= {
            parameter.name: _Known(self._count(parameter), parameter.kind, parameter.is_frozen)
            for parameter in parameters
        }
        if layout.gather is not None and (auto or projects or settings.overrides):
            ranks = layout.gather(known)
            known = {name: entry for of_rank in ranks for name, entry in of_rank.items()}
            # A rank may see modules whose parameters another one steps.
            known |= {
                name: entry
                for of_rank in ranks
                for name, entry in of_rank.items()
                if entry.matrices is not None
            }
        stepped = ((name, entry.matrices) for name, entry in known.items())
        counts = {name: matrices for name, matrices in stepped if matrices is not None}
        if not layout.is_part:  # else a pattern may be meant for parameters that other ranks have
            settings.check_matches(list(counts))
        self._shares_budget = auto
        if auto or projects:
            kinds = {name: Kind("vector") for name, count in counts.items() if count == 0}
            kinds |= {name: entry.kind for name, entry in known.items() if entry.kind is not None}
            option = f"tau got '{BALANCED}'" if auto else f"clip got '{PROJECT}'"
            is_part = layout.is_part and not auto
            self._io = io_parameters(counts, kinds, settings.io, option, is_part=is_part)
            frozen = {name for name, entry in known.items() if entry.is_frozen}
            self._hidden = sum(
                count for name, count in counts.items() if name not in self._io | frozen
            )

    def notice(self) -> bool:
        """Log what was guessed; return whether anything was."""
        sentences = list(self.notices())
        for sentence in sentences:
            LOG.warning(sentence)
        return bool(sentences)

    def notices(self) -> Iterator[str]:
        """Yield a sentence for each thing that was guessed, and what would say it.

        On one rank where all have the same.
        """
        if not self._is_part and dist.is_initialized() and dist.get_rank() > 0:
            return
        for reading, text in _READINGS.items():
            guesses = self._guesses.items()
            shapes = {name: shape for name, (shape, guess) in guesses if guess == reading}
            if shapes:
                # A doubtful stack's module is known.
                other_way = "" if reading == "doubtful experts" else "model=model or "
                yield (
                    f"AdamW2: taken for {text}: {_listed(shapes)}; {other_way}overrides="
                    "[{'match': pattern, 'kind': 'convolution' or 'experts'}] tells what they are."
                )
        if self._pairs:
            yield (
                f"AdamW2: taken for an adapter's factors, by shape: {_listed(self._paired)}; "
                "model=model tells what they are."
            )
        if self._unsplit:
            yield (
                f"AdamW2: {_listed(self._unsplit)} may be q, k and v in one weight, but without "
                "names nothing is split, and each is one matrix; model.named_parameters() in "
                "place of model.parameters() or model=model gives names."
            )

    def _count(self, parameter: Parameter) -> int:
        """Return how many matrices share a budget: a convolution's groups are blocks of one."""
        grid = self.grid(parameter)
        if grid is None:
            return 0
        kind = self._kind(parameter)
        is_split = self._settings.override(parameter.name, "fused") is not None
        is_grouped = kind is not None and kind.groups > 1 and not is_split
        return 1 if is_grouped else len(grid.matrices)

    def _kind(self, parameter: Parameter) -> Kind | None:
        """Return what a parameter is: as overrides say, else to its module, else by its name."""
        kind = parameter.kind or kind_by_name(parameter.name, parameter.shape)
        if kind is None and parameter.name in self._pairs:
            kind = Kind("matrix", role="adapter", partner=self._pairs[parameter.name])
        form = self._settings.override(parameter.name, "kind")
        if form is None or len(parameter.shape) < 3 or (kind is not None and kind.form == form):
            return kind
        return Kind(form) if kind is None else kind._replace(form=form, groups=1, parts=())

    def grid(self, parameter: Parameter) -> Grid | None:
        """Return which matrices a parameter holds, or None where it takes the scheduled rate."""
        if self._settings.override(parameter.name, "exempt", False):
            return None
        kind = self._kind(parameter)
        is_vector = parameter.is_vector or (kind is not None and kind.form == "vector")
        if is_vector and not (self._settings.clip_vectors and len(parameter.shape) == 1):
            return None
        split = self._settings.override(parameter.name, "fused")
        fused = self._fused(parameter, kind, split)
        if split == 1 and kind is not None:
            kind = kind._replace(groups=1)
        grid = grid_of(
            parameter.shape, box=parameter.box, fused=fused, kind=kind, order=parameter.order
        )
        if not any(matrix.rows * matrix.cols for matrix in grid.matrices):
            return None
        self._note(parameter, is_split_explicit=split is not None)
        return grid

    def _fused(self, parameter: Parameter, kind: Kind | None, split: object) -> Fused | None:
        """Return the parts of a parameter's matrices; ``split`` is what overrides say of them."""
        shape, bands = parameter.shape, parameter.bands
        if split == 1:
            return None
        fused: Fused | None
        if split is not None:
            fused = explicit_fused(parameter.name, shape, split, kind, parameter.order)
        elif parameter.fused is not None:
            return parameter.fused
        else:
            parts = None if kind is None else stacked_parts(kind, shape)
            fused = parts or known_fused(parameter.name, shape)
        if fused and bands and fused.axis == matrix_axis(shape, kind, bands.dim):
            return stacked_in_bands(fused, bands.extents)
        return fused

    def _note(self, parameter: Parameter, *, is_split_explicit: bool) -> None:
        """Remember what was guessed of a parameter."""
        shape = parameter.shape
        is_known = parameter.kind is not None or is_split_explicit
        if _PLACE.search(parameter.name) and looks_fused(shape) and not is_known:
            self._unsplit[parameter.name] = shape
        if len(shape) != 3 or self._settings.override(parameter.name, "kind") is not None:
            return
        guess = guessed_form(shape)
        if parameter.kind is None and not is_io_name(parameter.name):
            self._guesses[parameter.name] = shape, guess
        elif parameter.kind is not None and parameter.kind.form == "experts" != guess:
            self._guesses[parameter.name] = shape, "doubtful experts"

    def vectors(self, parameter: Parameter, group: Mapping[str, Any]) -> int:
        """Return how many vectors see the updates of a parameter's matrices, if their singular
        values are clipped, else 0.

        Hidden matrices are projected, and what an override says is. A vector has one singular
        value, so that scaling it is the same.

        Args:
            parameter: one that has matrices.
            group: its parameter group.

        Raises:
            ValueError: ``group`` came to ask for it after construction.
        """
        of_group, vectors = clip_of(group, self._settings)
        of_override = self._settings.override(parameter.name, "clip")
        is_vector = parameter.is_vector or (of_override or of_group) != PROJECT
        if is_vector:
            return 0
        if of_override is None and self._io is None:
            raise ValueError(
                f"AdamW2: a parameter group's clip became '{PROJECT}' after construction, it takes "
                f"'{SCALE}' now."
            )
        if of_override is None and self._io is not None and parameter.name in self._io:
            return 0
        return int(self._settings.override(parameter.name, "vectors", vectors))

    def floor_and_tau(
        self, parameter: Parameter, rows: int, cols: int, tau: float | str
    ) -> tuple[float, float]:
        """Return (floor under σ₁(W), τ) of a matrix (rows, cols).

        Args:
            tau: its parameter group's.

        Raises:
            ValueError: ``tau`` is none, or became "balanced" after construction.
        """
        tau = read_tau(
            "a parameter group's tau", self._settings.override(parameter.name, "tau", tau)
        )
        if tau != BALANCED:
            return self._floor(parameter, rows, cols), float(tau)
        if self._io is None or not self._shares_budget:
            raise ValueError(
                "AdamW2: a parameter group's tau became 'balanced' after construction, it takes a "
                "number now."
            )
        share = IO_TAU if parameter.name in self._io else HIDDEN_BUDGET / self._hidden
        floor = balanced_floor(rows, cols)
        if self._is_adapter(parameter):
            xavier = random_sigma(rows, cols, xavier_std(rows, cols))  # see _floor
            return max(floor, xavier), max(share, ADAPTER_TAU)
        return floor, share

    def _floor(self, parameter: Parameter, rows: int, cols: int) -> float:
        """Return the floor where τ is a number: low, but for an adapter's factors.

        One of these is 0 at the start, and Rule 1 would have it grow by τ of itself. Xavier's σ₁
        stands for the frozen weight's, which quantisation and engines hide: benchmarks/adapters.py
        has the others that were tried.
        """
        std = self._settings.floor_std
        if std > 0 and self._is_adapter(parameter):
            std = max(std, xavier_std(rows, cols))
        return random_sigma(rows, cols, std)

    def _is_adapter(self, parameter: Parameter) -> bool:
        kind = self._kind(parameter)
        return kind is not None and kind.role == "adapter"


def _pairs_by_shape(layout: Layout) -> dict[str, str]:
    """Return the factors among whole parameters of which nothing is known but shapes."""
    parameters = [shard.parameter for buffer in layout.buffers for shard in buffer.shards]
    trained = {p.name: p.shape for p in parameters if not p.is_frozen}
    is_partly_frozen = any(p.is_frozen and len(p.shape) > 1 for p in parameters)
    io = {name for name in trained if is_io_name(name)}
    known = io | {name for name, shape in trained.items() if kind_by_name(name, shape) is not None}
    return low_rank_pairs(trained, known, is_partly_frozen=is_partly_frozen)


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    first = [f"'{name}' {shape}" for name, shape in list(shapes.items())[:_NAMED]]
    more = len(shapes) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
