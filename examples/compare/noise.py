"""Whether a few seeds can tell two scores apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

#: Student's t, two-sided at 5 %, by degrees of freedom from 1 on.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

#: How noise is judged, for the page.
RULE = (
    "Runs of one seed start from the same weights and see the same batches, so the differences "
    "seed by seed are looked at: what a paired t-test, two-sided at 5 %, does not tell apart is "
    f"within noise. With three seeds that is less than {QUANTILES[1]} standard errors of the "
    "difference: a strict test, that leaves much undecided. It is corrected neither for the "
    "choice of the best rate nor for the number of comparisons."
)


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of two scores or more."""
    return math.sqrt(variance(scores) / len(scores))


@dataclass(frozen=True)
class Difference:
    """How much larger the first score is, over the seeds that both have."""

    mean: float
    error: float  # of the mean; not a number for one seed
    is_noise: bool  # of one seed nothing is known, and nothing is called noise

    @property
    def text(self) -> str:
        spread = "" if math.isnan(self.error) else f" ± {self.error:.3f}"
        return f"{self.mean:+.3f}{spread}{', noise' if self.is_noise else ''}"


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """Two methods' scores by seed; of no seed in common it is not a number."""
    apart = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if len(apart) < 2:
        return Difference(apart[0] if apart else math.nan, math.nan, is_noise=False)
    mean, error = fmean(apart), standard_error(apart)
    quantile = QUANTILES[min(len(apart) - 1, len(QUANTILES)) - 1]
    return Difference(mean, error, is_noise=abs(mean) <= quantile * error)
