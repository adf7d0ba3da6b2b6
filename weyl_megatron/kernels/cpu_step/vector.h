// A vector register of floats, as wide as the machine has them: loads, stores and arithmetic.
//
// LANES is the floats in one. The registers hold the Y of ROWS rows with FEW vectors, and FEW times
// COLUMNS of Z.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
typedef __m512 vec;
constexpr int LANES = 16, ROWS = 4, COLUMNS = 6;
inline vec load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, vec a) { _mm512_storeu_ps(p, a); }
inline vec splat(float a) { return _mm512_set1_ps(a); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(vec a) { return _mm512_reduce_add_ps(a); }
inline vec root(vec a) { return _mm512_sqrt_ps(a); }
// From 14 bits by Newton's step: the divider is busy with roots, and products wait for both. Of an
// infinite b, which v is where a gradient is above 1e19, r is 0; the step alone takes a finite one,
// for it would make 0 · ∞ of it.
inline vec quotient(vec a, vec b) {
    const vec r = _mm512_rcp14_ps(_mm512_max_ps(splat(1e-38f), b));
    return a * fma(r, _mm512_fnmadd_ps(_mm512_min_ps(splat(3e38f), b), r, splat(1.f)), r);
}
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256 vec;
constexpr int LANES = 8, ROWS = 2, COLUMNS = 3;
inline vec load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, vec a) { _mm256_storeu_ps(p, a); }
inline vec splat(float a) { return _mm256_set1_ps(a); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec root(vec a) { return _mm256_sqrt_ps(a); }
inline vec quotient(vec a, vec b) { return _mm256_div_ps(a, b); }
inline float sum(vec a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
#else
typedef float vec __attribute__((vector_size(16)));
constexpr int LANES = 4, ROWS = 2, COLUMNS = 3;
inline vec load(const float *p) {
    vec a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void store(float *p, vec a) { std::memcpy(p, &a, sizeof a); }
inline vec splat(float a) { return vec{a, a, a, a}; }
inline vec fma(vec a, vec b, vec c) { return a * b + c; }
inline float sum(vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }
inline vec root(vec a) {
    return vec{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])};
}
inline vec quotient(vec a, vec b) { return a / b; }
#endif

// Floats on the boundary of a cache line: vectors that straddle two take twice the time.
class Room {
    std::vector<float> floats;

  public:
    float *at = nullptr;
    // Rows at strides of many lines, an even number, would all lie in few of the cache's sets.
    static int64_t stride_of(int64_t cols) { return ((cols + 15) / 16 | 1) * 16; }
    void resize(int64_t count) {
        floats.assign(count + 16, 0.f);
        at = floats.data() +
             (64 - reinterpret_cast<uintptr_t>(floats.data()) % 64) % 64 / sizeof(float);
    }
};

}  // namespace
