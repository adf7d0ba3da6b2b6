"""The early warning of the paper's way to collapse.

It is of a head whose attention narrows while its W_qᵀW_k grows.
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
        """Return (block, head, sentence) of the heads that crossed both thresholds since last."""
        warnings = []
        for tag, entropy in values.items():
            place = re.fullmatch(r"(block/(\d+)/head/(\d+))/entropy", tag)
            if place is None or f"{place[1]}/sigma_qk" not in values:
                continue
            head, sigma = place[1], values[f"{place[1]}/sigma_qk"]
            if head not in self._began:
                self._began[head] = entropy, sigma
                continue
            first_entropy, first_sigma = self._began[head]
            fell = entropy < ENTROPY_FELL * first_entropy
            climbed = sigma > SIGMA_CLIMBED * first_sigma
            if fell and climbed and head not in self._warned:
                self._warned.add(head)
                text = (
                    f"block {place[2]}, head {place[3]}: attention entropy fell from "
                    f"{first_entropy:.3g} to {entropy:.3g} nats and σ₁(W_qᵀW_k) climbed from "
                    f"{first_sigma:.3g} to {sigma:.3g}; its energy concentrates."
                )
                warnings.append((int(place[2]), int(place[3]), text))
        return warnings
