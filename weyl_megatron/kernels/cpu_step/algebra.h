// The small algebra of an iteration (spectral/ritz.py): σ₁ from the Gram matrices, and the next
// block.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "eigen.h"
#include "tables.h"

namespace {

// spectral/ritz.py: basis_of, by pivots. Returns of how many combinations it is, which are the rows
// of basis; gram_y is destroyed.
int basis_of(int b, double *gram_y, double independent, double (*basis)[MOST]) {
    double least[MOST], part[MOST], made_of[MOST][MOST];
    bool is_taken[MOST] = {};
    int kept = 0;
    for (int i = 0; i < b; i++) {
        least[i] = independent * gram_y[i * b + i];
        for (int j = 0; j < b; j++) made_of[i][j] = i == j;
    }
    for (int count = 0; count < b; count++) {
        int p = -1;
        for (int i = 0; i < b; i++)
            if (!is_taken[i] && (p < 0 || gram_y[i * b + i] > gram_y[p * b + p])) p = i;
        is_taken[p] = true;
        const double square = gram_y[p * b + p], scale = 1 / std::sqrt(square);
        if (!(square > least[p])) continue;
        for (int i = 0; i < b; i++) {
            basis[kept][i] = made_of[p][i] * scale;
            part[i] = gram_y[p * b + i] * scale;
        }
        for (int i = 0; i < b; i++) {
            if (is_taken[i]) continue;
            for (int j = 0; j < b; j++) {
                gram_y[i * b + j] -= part[i] * part[j];
                made_of[i][j] -= part[i] * basis[kept][j];
            }
        }
        kept++;
    }
    return kept;
}

// Z Zᵀ of `kept` directions of a basis, (kept, kept).
void inner_of(int b, int kept, const double (*basis)[MOST], const double *gram_z, double *inner) {
    for (int p = 0; p < kept; p++)
        for (int q = 0; q < kept; q++) {
            double total = 0;
            for (int i = 0; i < b; i++)
                for (int j = 0; j < b; j++) total += basis[p][i] * gram_z[i * b + j] * basis[q][j];
            inner[p * kept + q] = total;
        }
}

bool are_finite(int b, const double *gram_y, const double *gram_z) {
    for (int i = 0; i < b * b; i++)
        if (!std::isfinite(gram_y[i]) || !std::isfinite(gram_z[i])) return false;
    return true;
}

// spectral/ritz.py: largest_ratio. The first argument is destroyed.
double largest_ratio(int b, double *gram_y, const double *gram_z, double independent) {
    double basis[MOST][MOST], inner[MOST * MOST], unused[MOST * MOST];
    if (!are_finite(b, gram_y, gram_z)) return NAN;
    const int kept = basis_of(b, gram_y, independent, basis);
    if (!kept) return 0;
    inner_of(b, kept, basis, gram_z, inner);
    eigen(kept, inner, unused);
    double largest = 0;
    for (int p = 0; p < kept; p++) largest = std::max(largest, inner[p * kept + p]);
    return std::sqrt(largest);
}

double dot(const float *a, const float *b, int64_t n) {
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < n; c++) total += double(a[c]) * b[c];
    return total;
}

// Zᵀ Z of b vectors of length n, symmetric.
void gram_of(int b, const float *z, int64_t n, double *gram) {
    constexpr int64_t PART = 512;  // columns that are summed in float32
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < b * n; i++) largest = std::max(largest, std::fabs(z[i]));
    // Squares of float32 numbers need not be float32 numbers, nor inverses of the smallest.
    const float scale = largest > 1e-38f ? 1 / largest : 0;
    std::fill(gram, gram + b * b, 0.0);
    for (int64_t c = 0; c < n; c += PART) {
        const int64_t count = std::min(PART, n - c);
        for (int i = 0; i < b; i++)
            for (int j = 0; j <= i; j++) {
                const float *p = z + i * n + c, *q = z + j * n + c;
                float part = 0;
#pragma omp simd reduction(+ : part)
                for (int64_t k = 0; k < count; k++) part += (p[k] * scale) * (q[k] * scale);
                gram[i * b + j] += part;
            }
    }
    for (int i = 0; i < b; i++)
        for (int j = 0; j <= i; j++) gram[j * b + i] = gram[i * b + j] *= double(largest) * largest;
}

// X = L⁻¹ Z where Zᵀ Z = L Lᵀ; false where the vectors are too close to parallel for that.
bool by_cholesky(int b, int64_t n, const float *z, float *x, const double *gram) {
    constexpr double FAR_FROM_PARALLEL = 1e-2;
    double lower[MOST][MOST], inverse[MOST][MOST];
    for (int i = 0; i < b; i++) {
        for (int j = 0; j <= i; j++) {
            double rest = gram[i * b + j];
            for (int k = 0; k < j; k++) rest -= lower[i][k] * lower[j][k];
            if (i == j) {
                if (!(rest > FAR_FROM_PARALLEL * gram[i * b + i])) return false;
                lower[i][i] = std::sqrt(rest);
            } else {
                lower[i][j] = rest / lower[j][j];
            }
        }
        inverse[i][i] = 1 / lower[i][i];
        for (int j = 0; j < i; j++) {
            double total = 0;
            for (int k = j; k < i; k++) total += lower[i][k] * inverse[k][j];
            inverse[i][j] = -total / lower[i][i];
        }
    }
    for (int i = 0; i < b; i++) {
        float factors[MOST];
        for (int j = 0; j <= i; j++) factors[j] = float(inverse[i][j]);
        float *to = x + i * n;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            float total = 0;
            for (int j = 0; j <= i; j++) total += factors[j] * z[j * n + c];
            to[c] = total;
        }
    }
    return true;
}

double length_of(const float *a, int64_t n) { return std::sqrt(dot(a, a, n)); }

// spectral/ritz.py: gain.
double gain_of(int b, int64_t n, const double *gram_y, const float *x, double sigma) {
    double work[MOST * MOST], unused[MOST * MOST], largest = 0;
    const double length = length_of(x, n);
    if (!(sigma > 0) || !std::isfinite(sigma) || !(length > 0.5 && length < 2)) return INFINITY;
    std::copy(gram_y, gram_y + b * b, work);
    eigen(b, work, unused);
    for (int i = 0; i < b; i++) largest = std::max(largest, work[i * b + i]);
    return 1 - std::sqrt(largest) / (length * sigma);
}

// Gram and Schmidt's way, each vector projected twice; those with nothing new in them are the old
// ones. z is overwritten.
void by_projection(int b, int64_t n, float *z, float *x, double scale) {
    constexpr double NEW = 1e-5;
    for (int j = 0; j < b; j++) {
        float *v = z + j * n;
        for (int attempt = 0; attempt < 2; attempt++) {
            const double before = length_of(v, n);
            if (before > 0)  // or its squares vanish
                for (int64_t c = 0; c < n; c++) v[c] = float(v[c] / before);
            for (int pass = 0; pass < 2; pass++)
                for (int i = 0; i < j; i++) {
                    const double part = dot(z + i * n, v, n);
                    for (int64_t c = 0; c < n; c++) v[c] = float(v[c] - part * z[i * n + c]);
                }
            const double after = length_of(v, n);
            if (before > 0 && after > NEW) {
                for (int64_t c = 0; c < n; c++) v[c] = float(v[c] / after);
                break;
            }
            std::memcpy(v, x + j * n, n * sizeof(float));
        }
    }
    for (int64_t i = 0; i < b * n; i++) x[i] = float(z[i] * scale);
}

// spectral/ritz.py: next_block.
void next_block(int b, int64_t n, float *z, float *x, const double *gram, double sigma, bool more) {
    constexpr double LONG = 1e28;
    if (!(sigma > 0) || !std::isfinite(sigma)) {
        const double length = length_of(x, n);
        const bool is_one = length > 0.5 && length < 2;
        const double factor = (!more || !is_one ? 1 : sigma == 0 ? LONG : 1 / LONG) / length;
        for (int64_t i = 0; i < b * n; i++) x[i] = float(x[i] * factor);
        return;
    }
    const double scale = sigma > 1e-9 && sigma < 1e9 ? 1 : std::min(1 / sigma, 1e38);
    if (scale != 1 || !by_cholesky(b, n, z, x, gram)) by_projection(b, n, z, x, scale);
}

// The next block, σ₁ of a matrix, and what the iteration gained.
void orthonormalize(const Shape &shape, float *x, float *z, double independent, bool more,
                    double &sigma, double &gain) {
    const int b = int(shape.width);
    double gram_y[MOST * MOST], rest_y[MOST * MOST], gram_z[MOST * MOST];
    for (int p = 0; p < b * b; p++) rest_y[p] = gram_y[p] = z[shape.gram + p];
    gram_of(b, z + shape.z, shape.n, gram_z);
    sigma = largest_ratio(b, rest_y, gram_z, independent);
    gain = gain_of(b, shape.n, gram_y, x + shape.x, sigma);
    next_block(b, shape.n, z + shape.z, x + shape.x, gram_z, sigma, more);
}

}  // namespace
