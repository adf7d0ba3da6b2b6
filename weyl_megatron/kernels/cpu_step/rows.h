// A few rows of W or U, times the vectors and back, in one read. U is formed in registers.

#pragma once

#include <cstdint>
#include <type_traits>

#include "adamw.h"
#include "tables.h"
#include "vector.h"

namespace {

enum Source { WEIGHTS = 0, UPDATES = 1, MOMENTS = 2 };

// What a row of W or U is made of, and where U of it is put.
struct Row {
    const float *w, *g;
    float *m, *v, *u;
    const float *read(Source source) const { return source == WEIGHTS ? w : u; }
};

// Elements c, c + 1, … of a row, as a vector or alone; U is put down for the way back.
template <Source source>
inline vec form(const Hyper &h, const Row &row, int64_t c, vec &squares) {
    if (source == WEIGHTS) return load(row.w + c);
    vec m = load(row.m + c), v = load(row.v + c);
    if (source == MOMENTS) {
        const vec g = load(row.g + c);
        m = fma(splat(h.lerp), g - m, m);
        v = fma(splat(h.one_minus_beta2) * g, g, v * splat(h.beta2));
        store(row.m + c, m), store(row.v + c, v);
    }
    const vec u = direction(h, m, v);
    store(row.u + c, u);
    if (source == MOMENTS) squares = fma(u, u, squares);
    return u;
}
template <Source source>
inline float form(const Hyper &h, const Row &row, int64_t c, float &squares) {
    if (source == WEIGHTS) return row.w[c];
    if (source == MOMENTS) moments_of(h, row.g[c], row.m[c], row.v[c]);
    row.u[c] = direction(h, row.m[c], row.v[c]);
    if (source == MOMENTS) squares += row.u[c] * row.u[c];
    return row.u[c];
}

// Brings a line that is read some rows later nearer: what streams from memory and what is
// multiplied take turns, and memory would idle meanwhile.
inline void fetch(const float *p) { __builtin_prefetch(p, 0, 2); }

// y[r][j] = Σ_c row_r[c] x_j[c] of rows that are formed on the way; returns Σ u². B = 0: they are
// only formed.
template <Source source, int R, int B>
float forward(const Hyper &h, const Row *rows, const float *x, int64_t n, int64_t cols,
              float (*y)[MOST], int64_t ahead) {
    vec acc[R][B ? B : 1], squares = splat(0.f);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < B; j++) acc[r][j] = splat(0.f);
    int64_t c = 0;
    for (; c + LANES <= cols; c += LANES) {
        if (ahead) {
            if (source == WEIGHTS)
                for (int r = 0; r < R; r += 2) fetch(rows[r].w + c + ahead);
            else
                for (int r = 0; r < R; r++) {
                    fetch(rows[r].m + c + ahead), fetch(rows[r].v + c + ahead);
                    if (source == MOMENTS) fetch(rows[r].g + c + ahead);
                }
        }
        vec xs[B ? B : 1];
        for (int j = 0; j < B; j++) xs[j] = load(x + j * n + c);
        for (int r = 0; r < R; r++) {
            const vec a = form<source>(h, rows[r], c, squares);
            for (int j = 0; j < B; j++) acc[r][j] = fma(a, xs[j], acc[r][j]);
        }
    }
    float total = sum(squares);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < B; j++) y[r][j] = sum(acc[r][j]);
    for (; c < cols; c++)
        for (int r = 0; r < R; r++) {
            const float a = form<source>(h, rows[r], c, total);
            for (int j = 0; j < B; j++) y[r][j] += a * x[j * n + c];
        }
    return total;
}

// z_j[c] += Σ_r y[r][j] row_r[c]
template <int R, int B>
void back(const float *const *rows, float *z, int64_t n, int64_t cols, const float (*y)[MOST],
          int64_t ahead) {
    vec ys[R][B];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < B; j++) ys[r][j] = splat(y[r][j]);
    int64_t c = 0;
    for (; c + LANES <= cols; c += LANES) {
        if (ahead)
            for (int r = 1; r < R; r += 2) fetch(rows[r] + c + ahead);
        vec zs[B];
        for (int j = 0; j < B; j++) zs[j] = load(z + j * n + c);
        for (int r = 0; r < R; r++) {
            const vec w = load(rows[r] + c);
            for (int j = 0; j < B; j++) zs[j] = fma(w, ys[r][j], zs[j]);
        }
        for (int j = 0; j < B; j++) store(z + j * n + c, zs[j]);
    }
    for (; c < cols; c++)
        for (int j = 0; j < B; j++)
            for (int r = 0; r < R; r++) z[j * n + c] += y[r][j] * rows[r][c];
}

// Columns of y from j on.
template <typename Y>
inline auto from(Y (*y)[MOST], int64_t j) {
    return reinterpret_cast<Y(*)[MOST]>(&y[0][j]);
}

// Runs f with a constant, the next FEW or fewer of `rest` vectors.
template <typename F>
inline void some(int64_t rest, const F &f) {
    if (rest >= FEW)
        f(std::integral_constant<int, FEW>());
    else if (rest == 3)
        f(std::integral_constant<int, 3>());
    else if (rest == 2)
        f(std::integral_constant<int, 2>());
    else if (rest == 1)
        f(std::integral_constant<int, 1>());
}

// Where a thread adds the sums of one matrix: straight to it where no other thread has a part of
// it, or to a slot.
struct Target {
    float *z, *gram;
};

// R rows of a tile from `row` on; is_back: their Y are in `left` already. Returns Σ u² of moments.
template <Source source, int R, int B>
float multiply_rows(bool is_back, const Tile &tile, int64_t row, const Hyper &hyper,
                    const Row *rows, const Arena &arena, const Target &target, double *gram,
                    int64_t ahead) {
    float y[R][MOST], squares;
    const float *formed[R];
    for (int r = 0; r < R; r++) formed[r] = rows[r].read(source);
    // There may be none of it.
    float *left = tile.left < 0 ? nullptr : arena.left + tile.left + row * B;
    if (is_back) {
        squares = 0;
        if (source != WEIGHTS)
            squares = forward<source, R, 0>(hyper, rows, nullptr, 0, tile.cols, y, ahead);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < B; j++) y[r][j] = left[r * B + j];
    } else {
        squares = forward<source, R, B>(hyper, rows, arena.x + tile.x, tile.n, tile.cols, y, ahead);
        if (tile.left >= 0) {
            for (int r = 0; r < R; r++)
                for (int j = 0; j < B; j++) {
                    float &sum_ = left[r * B + j];
#pragma omp atomic
                    sum_ += y[r][j];  // a row of which this rank has two tiles
                }
            return squares;
        }
    }
    if (!is_back || tile.counts)
        for (int r = 0; r < R; r++)
            for (int i = 0; i < B; i++)
                for (int j = 0; j < B; j++) gram[i * B + j] += double(y[r][i]) * y[r][j];
    back<R, B>(formed, target.z + tile.z, tile.n, tile.cols, y, source == WEIGHTS ? ahead : 0);
    return squares;
}

// The same of more than FEW vectors, so many at a time: the rows are formed once, and stay in the
// cache.
template <Source source, int R>
float multiply_wide_rows(bool is_back, const Tile &tile, int64_t row, const Hyper &hyper,
                         const Row *rows, const Arena &arena, const Target &target, double *gram,
                         int64_t ahead) {
    const int width = int(tile.width);
    float y[R][MOST], squares = 0;
    const float *formed[R];
    Row again[R] = {};
    for (int r = 0; r < R; r++) again[r].w = formed[r] = rows[r].read(source);
    float *left = tile.left < 0 ? nullptr : arena.left + tile.left + row * width;
    if (is_back) {
        if (source != WEIGHTS)
            squares = forward<source, R, 0>(hyper, rows, nullptr, 0, tile.cols, y, ahead);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < width; j++) y[r][j] = left[r * width + j];
    } else {
        const float *x = arena.x + tile.x;
        squares = forward<source, R, FEW>(hyper, rows, x, tile.n, tile.cols, y, ahead);
        for (int j = FEW; j < width; j += FEW)
            some(width - j, [&](auto few) {
                forward<WEIGHTS, R, few()>(hyper, again, x + j * tile.n, tile.n, tile.cols,
                                           from(y, j), 0);
            });
        if (tile.left >= 0) {
            for (int r = 0; r < R; r++)
                for (int j = 0; j < width; j++) {
                    float &sum_ = left[r * width + j];
#pragma omp atomic
                    sum_ += y[r][j];
                }
            return squares;
        }
    }
    if (!is_back || tile.counts)
        for (int r = 0; r < R; r++)
            for (int i = 0; i < width; i++)
                for (int j = 0; j < width; j++) gram[i * width + j] += double(y[r][i]) * y[r][j];
    for (int j = 0; j < width; j += FEW)
        some(width - j, [&](auto few) {
            back<R, few()>(formed, target.z + tile.z + j * tile.n, tile.n, tile.cols, from(y, j),
                           0);
        });
    return squares;
}

template <Source source>
float multiply_wide_rows(bool is_back, const Tile &tile, int64_t row, int count,
                         const Hyper &hyper, const Row *rows, const Arena &arena,
                         const Target &target, double *gram, int64_t ahead) {
    if (count == ROWS)
        return multiply_wide_rows<source, ROWS>(is_back, tile, row, hyper, rows, arena, target,
                                                gram, ahead);
    float squares = 0;
    for (int r = 0; r < count; r++)
        squares += multiply_wide_rows<source, 1>(is_back, tile, row + r, hyper, rows + r, arena,
                                                 target, gram, ahead);
    return squares;
}

template <Source source, int B>
float multiply_rows(bool is_back, const Tile &tile, int64_t row, int count, const Hyper &hyper,
                    const Row *rows, const Arena &arena, const Target &target, double *gram,
                    int64_t ahead) {
    if (count == ROWS)
        return multiply_rows<source, ROWS, B>(is_back, tile, row, hyper, rows, arena, target, gram,
                                              ahead);
    float squares = 0;
    for (int r = 0; r < count; r++)
        squares += multiply_rows<source, 1, B>(is_back, tile, row + r, hyper, rows + r, arena,
                                               target, gram, ahead);
    return squares;
}

template <Source source>
float multiply_rows(bool is_back, const Tile &tile, int64_t row, int count, const Hyper &hyper,
                    const Row *rows, const Arena &arena, const Target &target, double *gram,
                    int64_t ahead) {
    float y[1][MOST], squares = 0;
    switch (tile.width) {
        case 0:  // measured elsewhere
            for (int r = 0; r < count; r++)
                squares += forward<source, 1, 0>(hyper, rows + r, nullptr, 0, tile.cols, y, ahead);
            return squares;
        case 1:
            return multiply_rows<source, 1>(is_back, tile, row, count, hyper, rows, arena, target,
                                            gram, ahead);
        case 2:
            return multiply_rows<source, 2>(is_back, tile, row, count, hyper, rows, arena, target,
                                            gram, ahead);
        case 3:
            return multiply_rows<source, 3>(is_back, tile, row, count, hyper, rows, arena, target,
                                            gram, ahead);
        case 4:
            return multiply_rows<source, 4>(is_back, tile, row, count, hyper, rows, arena, target,
                                            gram, ahead);
        default:
            return multiply_wide_rows<source>(is_back, tile, row, count, hyper, rows, arena,
                                              target, gram, ahead);
    }
}

}  // namespace
