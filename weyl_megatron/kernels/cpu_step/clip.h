// What Rule 1 leaves of an update whose singular values are clipped (rule.py: project): M from the
// Gram matrices, and C = M Z.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "algebra.h"
#include "tables.h"

namespace {

// As torch.minimum and maximum: what is not a number stays so.
inline double least(double a, double b) { return std::isnan(a) || a < b ? a : b; }
inline double most(double a, double b) { return std::isnan(a) || a > b ? a : b; }

// rule.py: UNSEEN, ROUNDING (times the smallest share that is a direction), NOTHING, SUMS.
struct Constants {
    double unseen, independent, nothing, sums;
};

struct Clipped {
    double rate, share;
    int64_t count;
};

// rule.py: _unseen. theta: the kept singular values, 0 where one is not seen.
double unseen_of(int kept, const double *theta, const bool *is_seen, double norm, double rest,
                 const Constants &constants) {
    double smallest = INFINITY;
    for (int p = 0; p < kept; p++)
        if (is_seen[p]) smallest = std::min(smallest, theta[p]);
    return least(constants.unseen * smallest, std::sqrt(rest + constants.sums * norm * norm));
}

// rule.py: project. gram_y is destroyed; `factor` becomes M, (b, b).
Clipped clip(int b, double *gram_y, const double *gram_z, double lr, double bound, double norm,
             bool is_whole, const Constants &constants, double *factor) {
    double basis[MOST][MOST], inner[MOST * MOST], vectors[MOST * MOST];
    double theta[MOST], factors[MOST], axes[MOST][MOST];
    bool is_seen[MOST];
    const int kept = are_finite(b, gram_y, gram_z)
                         ? basis_of(b, gram_y, constants.independent, basis)
                         : 0;
    inner_of(b, kept, basis, gram_z, inner);
    if (kept) eigen(kept, inner, vectors);
    double largest = 0, seen = 0;
    for (int p = 0; p < kept; p++) largest = std::max(largest, inner[p * kept + p]);
    bool are_all = kept == b;
    for (int p = 0; p < kept; p++) {
        const double square = inner[p * kept + p];
        is_seen[p] = square > constants.nothing * largest && square > 0;
        are_all = are_all && is_seen[p];
        theta[p] = is_seen[p] ? std::sqrt(square) : 0;
        seen += theta[p] * theta[p];
    }
    const double rest = most(norm * norm - seen, 0);
    const double unseen =
        is_whole && are_all ? 0 : unseen_of(kept, theta, is_seen, norm, rest, constants);
    const double rate = least(lr, bound / unseen);
    double after = rate * rate * rest;
    int64_t count = 0;
    for (int p = 0; p < kept; p++) {
        const double left = least(lr * theta[p], bound);
        factors[p] = is_seen[p] ? left / theta[p] - rate : 0;
        after += left * left;
        count += lr * theta[p] > bound;
        for (int i = 0; i < b; i++) {
            double total = 0;
            for (int q = 0; q < kept; q++) total += basis[q][i] * vectors[q * kept + p];
            axes[p][i] = total;
        }
    }
    for (int i = 0; i < b; i++)
        for (int j = 0; j < b; j++) {
            double total = 0;
            for (int p = 0; p < kept; p++) total += axes[p][i] * factors[p] * axes[p][j];
            factor[i * b + j] = total;
        }
    return {rate, std::sqrt(after) / (lr * norm), count};
}

// Z Zᵀ in double, whose small singular values count; and Z ← M Z.
void exact_gram(int b, const float *z, int64_t n, double *gram) {
    for (int i = 0; i < b; i++)
        for (int j = 0; j <= i; j++)
            gram[i * b + j] = gram[j * b + i] = dot(z + i * n, z + j * n, n);
}
void multiply_by(int b, const double *factor, float *z, int64_t n) {
    constexpr int64_t PART = 64;  // columns at a time
    double made[MOST][PART];
    for (int64_t c = 0; c < n; c += PART) {
        const int64_t count = std::min(PART, n - c);
        for (int i = 0; i < b; i++) {
            std::fill(made[i], made[i] + count, 0.0);
            for (int j = 0; j < b; j++) {
                const double scale = factor[i * b + j];
                const float *row = z + j * n + c;
#pragma omp simd
                for (int64_t k = 0; k < count; k++) made[i][k] += scale * row[k];
            }
        }
        for (int i = 0; i < b; i++)
            for (int64_t k = 0; k < count; k++) z[i * n + c + k] = float(made[i][k]);
    }
}

// What the vectors saw of an update becomes C, and the results those of matrix k.
void clip_seen(const Clipping &clipping, int64_t k, double lr, double bound, double norm) {
    const Shape &shape = clipping.shapes[k];
    const int b = int(shape.width);
    float *z = clipping.z + shape.z;
    double gram_y[MOST * MOST], gram_z[MOST * MOST], factor[MOST * MOST];
    for (int p = 0; p < b * b; p++) gram_y[p] = clipping.z[shape.gram + p];
    exact_gram(b, z, shape.n, gram_z);
    const double *given = clipping.constants;
    const Constants constants{given[0], given[1], given[2], given[3]};
    const Clipped clipped =
        clip(b, gram_y, gram_z, lr, bound, norm, clipping.is_whole[k], constants, factor);
    multiply_by(b, factor, z, shape.n);
    clipping.rate[k] = clipped.rate, clipping.decay[k] = lr;  // rule.py: decay_rates
    clipping.unseen[k] = clipped.rate / lr, clipping.share[k] = clipped.share;
    clipping.clipped[k] = clipped.count;
}

}  // namespace
