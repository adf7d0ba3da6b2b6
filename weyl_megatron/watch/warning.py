"""The early warning: a head whose attention narrows while its W_qᵀW_k grows is on the paper's way
to collapse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

#: A head is warned of when its entropy is below this share of what it was when first measured, …
ENTROPY_FELL = 0.5

#: … and σ₁(W_qᵀW_k) is above so many times what it was.
SIGMA_CLIMBED = 4.0


class Warnings:
    """Remembers how every head began, and warns of each once."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, float]] = {}
        self._warned: set[str] = set()

    def look(self, values: Mapping[str, float]) -> list[tuple[int, int, str]]:
        """Return (block, head, sentence) of the heads that have crossed both thresholds since the
        last look.
        """
        found = []
        for tag, entropy in values.items():
            named = re.fullmatch(r"(block/(\d+)/head/(\d+))/entropy", tag)
            if named is None or f"{named[1]}/sigma_qk" not in values:
                continue
            head, sigma = named[1], values[f"{named[1]}/sigma_qk"]
            if head not in self._began:
                self._began[head] = entropy, sigma
                continue
            first_entropy, first_sigma = self._began[head]
            fell, climbed = (
                entropy < ENTROPY_FELL * first_entropy,
                sigma > SIGMA_CLIMBED * first_sigma,
            )
            if fell and climbed and head not in self._warned:
                self._warned.add(head)
                text = (
                    f"block {named[2]}, head {named[3]}: attention entropy fell from "
                    f"{first_entropy:.3g} to {entropy:.3g} nats and σ₁(W_qᵀW_k) climbed from "
                    f"{first_sigma:.3g} to {sigma:.3g}; its energy concentrates."
                )
                found.append((int(named[2]), int(named[3]), text))
        return found
