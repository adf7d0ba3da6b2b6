"""What a step knows of every matrix, as rows of one float64 tensor ``(rows, matrices)`` and of one
of bytes: kernels decide by it, the host does not look.
"""

from __future__ import annotations

import triton.language as tl

#: Rows of the numbers. What the host sends in every step: α, λ, τ, the floor under σ₁(W), whether
#: there is a gradient, and whether the certificate is sure to settle the matrix.
LR = tl.constexpr(0)
DECAY = tl.constexpr(1)
TAU = tl.constexpr(2)
FLOOR = tl.constexpr(3)
PRESENT = tl.constexpr(4)
SURE = tl.constexpr(5)
SENT = 6

#: What does not change: whether a step can be taken back, and the share of σ₁(W) that rounding
#: leaves.
CAN_UNDO = tl.constexpr(6)
KEPT = tl.constexpr(7)

#: The certificate's, see spectral/certificate.py: the bound of σ₁(W), ‖U‖_F, the age, Σ w².
LOWER = tl.constexpr(8)
NORM = tl.constexpr(9)
AGE = tl.constexpr(10)
SQUARES = tl.constexpr(11)

#: Of this step: Σ u²; σ₁ and the gain of W and of U; iterations at most and at least of each.
OF_UPDATE = tl.constexpr(12)
SIGMA = tl.constexpr(13)
GAIN = tl.constexpr(15)
MOST = tl.constexpr(17)
LEAST = tl.constexpr(19)

#: And what statistics say: α_W, what stands for σ₁(W) and for σ₁(U).
RATE = tl.constexpr(21)
STOOD_W = tl.constexpr(22)
STOOD_U = tl.constexpr(23)

#: Of projection: whether a matrix is projected, and has no more singular values than vectors, which
#: does not change; the bound of σ₁(α U); the share of the update that is left, the factor on what
#: vectors do not see, how many singular values were clipped.
PROJECTS = tl.constexpr(24)
WHOLE = tl.constexpr(25)
BOUND = tl.constexpr(26)
SHARE = tl.constexpr(27)
UNSEEN = tl.constexpr(28)
CLIPPED = tl.constexpr(29)
ROWS = 30

#: Rows of the bytes: what is expected to be settled, has no moments of this step yet, was not
#: settled after all, waits for its rate; what makes the next iteration of W and of U; what is
#: projected in this step.
EXPECTED = tl.constexpr(0)
FRESH = tl.constexpr(1)
FAILED = tl.constexpr(2)
WAITS = tl.constexpr(3)
MAKING = tl.constexpr(4)
CLIPS = tl.constexpr(6)
MASKS = 7
