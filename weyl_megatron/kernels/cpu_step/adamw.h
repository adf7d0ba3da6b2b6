// The arithmetic of torch.optim.AdamW, in its order: on a number, on a vector register, on a run of
// numbers.

#pragma once

#include <cmath>
#include <cstdint>

#include "tables.h"
#include "vector.h"

namespace {

inline void moments_of(const Hyper &h, float g, float &m, float &v) {
    m = __builtin_fmaf(h.lerp, g - m, m);
    v = __builtin_fmaf(h.one_minus_beta2 * g, g, v * h.beta2);
}

// √v / correction + ε. The quotient by a constant is a product, made exact by the remainder
// (Markstein's theorem).
inline float denominator(const Hyper &h, float v) {
    const float a = std::sqrt(v), q = a * h.correction2_inverse,
                rest = __builtin_fmaf(-q, h.correction2_sqrt, a);
    const float exact = __builtin_fmaf(rest, h.correction2_inverse, q);
    return (rest == rest ? exact : q) + h.eps;
}

inline float direction(const Hyper &h, float m, float v) {
    return m / (std::sqrt(v) * h.scale2 + h.eps1);
}
inline vec direction(const Hyper &h, vec m, vec v) {
    return quotient(m, fma(root(v), splat(h.scale2), splat(h.eps1)));
}

struct Squares {
    float moved, before, after;  // of α U, of W before and after
};

// M, V and W in one pass, at the scheduled rate.
Squares step_run(const Hyper &h, float *__restrict w, const float *__restrict g,
                 float *__restrict m, float *__restrict v, int64_t count) {
    float moved = 0, before = 0, after = 0;
#pragma omp simd reduction(+ : moved, before, after)
    for (int64_t c = 0; c < count; c++) {
        float a = m[c], b = v[c];
        moments_of(h, g[c], a, b);
        m[c] = a, v[c] = b;
        const float d = (h.step_size * a) / denominator(h, b);
        const float old = w[c], next = old * h.decay + d;
        w[c] = next;
        moved += d * d, before += old * old, after += next * next;
    }
    return {moved, before, after};
}

// W at the rate that `decay` and `step_size` are made of; returns Σ w² after it.
float move_run(const Hyper &h, float decay, float step_size, float *__restrict w,
               const float *__restrict m, const float *__restrict v, int64_t count) {
    float after = 0;
#pragma omp simd reduction(+ : after)
    for (int64_t c = 0; c < count; c++) {
        const float next = w[c] * decay + (step_size * m[c]) / denominator(h, v[c]);
        w[c] = next;
        after += next * next;
    }
    return after;
}

// The move at the scheduled rate taken back.
void undo_run(const Hyper &h, float *__restrict w, const float *__restrict m,
              const float *__restrict v, int64_t count) {
#pragma omp simd
    for (int64_t c = 0; c < count; c++)
        w[c] = (w[c] - (h.step_size * m[c]) / denominator(h, v[c])) / h.decay;
}

}  // namespace
