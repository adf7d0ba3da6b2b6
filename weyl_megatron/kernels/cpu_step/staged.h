// M and V that are kept in bfloat16: widened to floats while a run of them is worked on. U is
// formed of what is stored.

#pragma once

#include <cstdint>
#include <cstring>

#include "adamw.h"
#include "rows.h"
#include "tables.h"

namespace {

inline float widen(uint16_t kept) {
    const uint32_t bits = uint32_t(kept) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}
// To the nearest, ties to even.
inline uint16_t narrow(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    if (number != number) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A moment's numbers: where they are, or, if they are narrow, in `room`.
inline float *read_moment(void *moment, bool is_narrow, int64_t at, int64_t count, float *room) {
    if (!is_narrow) return static_cast<float *>(moment) + at;
    const uint16_t *kept = static_cast<const uint16_t *>(moment) + at;
    for (int64_t c = 0; c < count; c++) room[c] = widen(kept[c]);
    return room;
}
inline void round_moment(void *moment, int64_t at, int64_t count, float *room) {
    uint16_t *kept = static_cast<uint16_t *>(moment) + at;
    for (int64_t c = 0; c < count; c++) {
        kept[c] = narrow(room[c]);
        room[c] = widen(kept[c]);
    }
}

// M and V of a run, of at most as many numbers as the rooms have.
struct Moments {
    float *m, *v;
    Moments(const Buffer &buffer, int64_t at, int64_t count, float *of_m, float *of_v)
        : m(read_moment(buffer.exp_avg, buffer.narrow & NARROW_M, at, count, of_m)),
          v(read_moment(buffer.exp_avg_sq, buffer.narrow & NARROW_V, at, count, of_v)) {}
    // Updates them and rounds what is kept so.
    void update(const Buffer &buffer, const Hyper &h, int64_t at, int64_t count) {
        const float *g = buffer.grad + at;
        for (int64_t c = 0; c < count; c++) moments_of(h, g[c], m[c], v[c]);
        if (buffer.narrow & NARROW_M) round_moment(buffer.exp_avg, at, count, m);
        if (buffer.narrow & NARROW_V) round_moment(buffer.exp_avg_sq, at, count, v);
    }
};

// Of moments that were updated and rounded already: a step leaves them.
inline Hyper updated(Hyper h) {
    h.lerp = h.one_minus_beta2 = 0, h.beta2 = 1;
    return h;
}
inline Hyper of_rows(const Buffer &buffer, const Hyper &h) {
    return buffer.narrow ? updated(h) : h;
}

// A row of W or U for `multiply_band`; U is put into `u`, and narrow moments into the rooms.
template <Source source>
Row row_of(const Buffer &buffer, const Hyper &h, int64_t at, int64_t cols, float *u, float *of_m,
           float *of_v) {
    if (source == WEIGHTS) return {buffer.weight + at, nullptr, nullptr, nullptr, u};
    Moments moments(buffer, at, cols, of_m, of_v);
    if (source == MOMENTS && buffer.narrow) moments.update(buffer, h, at, cols);
    return {buffer.weight + at, buffer.grad + at, moments.m, moments.v, u};
}

}  // namespace
