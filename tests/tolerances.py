"""How near a run is to one that sums in another order, and why no nearer.

Two layouts, or two machines, add the same numbers in another order, and differ by roundings. Most
of what is computed moves with a rounding by about as much. Two decisions do not: they compare a
measured number with a threshold, and then do another amount of work.

**One iteration more** (``spectral/iterations.py``). Of the iterations of a matrix the last
``power_iters // 2`` are made only where the one before gained more than s = ``ritz.SETTLED``. A
gain that is s but for a rounding makes one iteration more in one run than in the other. What does
that one gain? An iteration is two half steps, Y = W X and Z = Wᵀ Y. Each makes the estimate larger,
never above σ₁. The gain is what the second half step added: it took the estimate from (1 − s) σ to
σ. Of one vector with the weights cᵢ² on the singular directions the estimates are √(m₁ / m₀),
√(m₂ / m₁) and so on, with mⱼ = Σ cᵢ² σᵢ²ʲ. Once the largest direction has half of the weight, each
half step multiplies the estimate by less than the one before: it converges. So the two half steps
of one iteration more multiply it by at most (1 − s)⁻², and σ₁ of the two runs differs by at most

    (1 − s)⁻² − 1 = 2.03 % at s = 1 %,

as does a rate α_W = τ σ₁(W) / σ₁(U) of ``power_iters`` 2 and 3, where only σ₁(U) is decided on. Of
vectors that do not know the largest direction yet nothing bounds what comes. The demo's GPT (150
steps, its 33 matrices, 3,409 iterations that gained no more than s): one more gained 0.15 % at the
99th percentile and 0.36 % at most. tests/spectral/test_decisions.py makes both decisions out of one
planted rounding.

**The certificate** (``spectral/certificate.py``). It expects, and then proves or does not prove,
that a matrix is not clipped. Either way the rate is α, for what is proved holds of what is
measured, too, but for the error of an estimate of σ₁(W). Where a rounding decides, the runs differ
in ``MatrixStats.certified``, in σ₁, which is a bound in one of them, and in vectors that are a step
older.

A step at another rate leaves other weights. One decision is worth at most 2.03 % of a step, which
is τ σ₁(W) of the matrix, and runs do not come together again: see :func:`weights`.

Ranks that share a matrix decide alike, whatever the roundings are. They decide on what a collective
gave them all, the same bits, in kernels that round alike, which ``MatrixGroup`` checks. (A matrix
that is spread over several groups in turn is summed in each of them: ranks of different first
groups have the same bits if the second groups' sums round alike, as two numbers' do in any order.)
Runs that resume on the layout that saved them make the same sums, so
they go on bit for bit as far as the engine's own sums are the same from run to run.

Decisions are rare. Of the demo's gains 214 of 4,950 lie between 0.8 and 1 %, 22 per unit of gain:
of runs whose gains differ by 1e-6 one matrix in 45,000 steps decides otherwise. So
:func:`check_rates` lets any rate differ by what a decision is worth, and not most of them. A test
that has to be nearer than that makes every iteration: :func:`every_iteration`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf
from unittest.mock import patch

from weyl_megatron.spectral import ritz

#: What rates of two runs that made the same iterations differ by, relative, in float32: sums in
#: another order, and Adam's division by √V, carried on for ten steps.
ROUNDING = 1e-4


def one_more(settled: float = ritz.SETTLED, optional: int = 1) -> float:
    """Return by what share σ₁ may differ where one run made up to ``optional`` iterations more.

    Args:
        settled: the gain that ends the iterations.
        optional: how many hang on it: ``power_iters // 2``.
    """
    return float((1 - settled) ** (-2 * optional) - 1)


def rates(power_iters: int = 2) -> float:
    """Return by what share the rates of two runs may differ that sum in another order."""
    of_update = one_more(optional=power_iters // 2)
    # A slow W makes half of U's iterations, so that one hangs on its gain from 4 on.
    of_weight = one_more(optional=power_iters // 2) if power_iters >= 4 else 0.0
    return (1 + of_update) * (1 + of_weight) - 1 + ROUNDING


def check_rates(
    actual: Mapping[str, float],
    expected: Mapping[str, float],
    rounding: float = ROUNDING,
    power_iters: int = 2,
) -> None:
    """Assert that rates, by matrix, are those of a run that sums in another order.

    Args:
        actual, expected: the rates, of the same matrices.
        rounding: what at least half of them are within, relative.
        power_iters: as the optimizer was given it.
    """
    assert actual.keys() == expected.keys()
    apart = {name: abs(rate / expected[name] - 1) for name, rate in actual.items()}
    far = {name: share for name, share in apart.items() if share > rates(power_iters)}
    assert not far, f"more than one iteration more gains: {far}"
    rounded = [share <= rounding for share in apart.values()]
    assert sum(rounded) >= len(rounded) / 2, f"more than a decision now and then: {apart}"


def weights(tau: float, steps: int, power_iters: int = 2) -> float:
    """Return by what share of σ₁(W), in spectral norm, a matrix of two such runs may differ.

    A step moves a clipped matrix by τ σ₁(W); in each the rates may differ. Roundings come on top.
    """
    return float((1 + tau) ** steps - 1) * rates(power_iters)


def make_every_iteration() -> None:
    """Leave no iteration out from now on, in this process: its rates move with roundings alone."""
    ritz.SETTLED = -inf


@contextmanager
def every_iteration() -> Iterator[None]:
    """Leave no iteration out meanwhile, see :func:`make_every_iteration`."""
    with patch.object(ritz, "SETTLED", -inf):
        yield
