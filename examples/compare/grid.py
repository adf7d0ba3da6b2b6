"""Which runs there are to be made, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from examples.compare.methods import METHODS, TUNING_SEED, WARMUPS
from examples.compare.train import Run, badness


@dataclass(frozen=True)
class Grid:
    """Every method and seed in every cell: a run but for its method, seed and warmup."""

    cells: Sequence[Run]
    methods: Sequence[str]
    seeds: Sequence[int]

    def first(self) -> list[Run]:
        """All runs that wait for no other, in the cells' order, the tuning among them."""
        return [
            replace(cell, method=method, seed=seed, warmup=warmup)
            for cell in self.cells
            for method in self.methods
            for seed, warmup in self._seeds_and_warmups(METHODS[method].warmup)
        ]

    def tuned(self, done: Mapping[Run, dict[str, Any]] | None = None) -> list[Run]:
        """The reported runs with the warmup that ended best, or without one if none is done."""
        runs = []
        for method in (name for name in self.methods if METHODS[name].warmup is None):
            for cell in self.cells:
                best = 0.0
                if done is not None:
                    tuning = [
                        replace(cell, method=method, seed=TUNING_SEED, warmup=warmup)
                        for warmup in WARMUPS
                    ]
                    best = min(tuning, key=lambda run: badness(done[run])).warmup
                runs += [
                    replace(cell, method=method, seed=seed, warmup=best) for seed in self.seeds
                ]
        return runs

    def _seeds_and_warmups(self, warmup: float | None) -> Iterable[tuple[int, float]]:
        if warmup is None:
            return product([TUNING_SEED], WARMUPS)
        return product(self.seeds, [warmup])
