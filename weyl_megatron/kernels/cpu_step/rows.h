// A band of rows of W or U, times the vectors and back, while the band is in the cache.

#pragma once

#include <algorithm>
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

// Columns [c, c + C registers) of z_j += Σ_r y[r][j] row_r, which stay in registers meanwhile.
template <int B, int C>
inline void back_columns(const float *const *rows, int count, float *z, int64_t n, int64_t c,
                         const float (*y)[MOST]) {
    vec zs[B][C];
    for (int j = 0; j < B; j++)
        for (int i = 0; i < C; i++) zs[j][i] = load(z + j * n + c + i * LANES);
    for (int r = 0; r < count; r++) {
        vec ws[C];
        for (int i = 0; i < C; i++) ws[i] = load(rows[r] + c + i * LANES);
        for (int j = 0; j < B; j++) {
            const vec a = splat(y[r][j]);
            for (int i = 0; i < C; i++) zs[j][i] = fma(ws[i], a, zs[j][i]);
        }
    }
    for (int j = 0; j < B; j++)
        for (int i = 0; i < C; i++) store(z + j * n + c + i * LANES, zs[j][i]);
}

// z_j[c] += Σ_r y[r][j] row_r[c]
template <int B>
void back(const float *const *rows, int count, float *z, int64_t n, int64_t cols,
          const float (*y)[MOST]) {
    int64_t c = 0;
    for (; c + COLUMNS * LANES <= cols; c += COLUMNS * LANES)
        back_columns<B, COLUMNS>(rows, count, z, n, c, y);
    for (; c + LANES <= cols; c += LANES) back_columns<B, 1>(rows, count, z, n, c, y);
    for (; c < cols; c++)
        for (int j = 0; j < B; j++)
            for (int r = 0; r < count; r++) z[j * n + c] += y[r][j] * rows[r][c];
}

// Columns of y from j on.
template <typename Y>
inline auto from(Y (*y)[MOST], int64_t j) {
    return reinterpret_cast<Y(*)[MOST]>(&y[0][j]);
}

// Runs f with a number from LEAST to MAX as a constant.
template <int LEAST, int MAX, typename F>
inline void with_constant(int number, const F &f) {
    if constexpr (MAX > LEAST)
        if (number < MAX) return with_constant<LEAST, MAX - 1>(number, f);
    f(std::integral_constant<int, MAX>());
}

// Forms a row, and y[j] = Σ_c row[c] x_j[c] of B vectors; returns Σ u² of moments. What is
// multiplied was formed LEAD before: products that wait for the divider would fill the processor's
// queues, and nothing would be computed beside it.
template <Source source, int B>
float form_row(const Hyper &h, const Row &row, const float *x, int64_t n, int64_t cols, float *y) {
    constexpr int64_t LEAD = 8 * LANES;
    const int64_t whole = cols / LANES * LANES, first = std::min(LEAD, whole);
    vec acc[B], squares = splat(0.f);
    for (int j = 0; j < B; j++) acc[j] = splat(0.f);
    const auto multiply = [&](int64_t c) {
        const vec a = load(row.u + c);
        for (int j = 0; j < B; j++) acc[j] = fma(a, load(x + j * n + c), acc[j]);
    };
    for (int64_t c = 0; c < first; c += LANES) form<source>(h, row, c, squares);
    int64_t c = 0;
    for (; c + LEAD < whole; c += LANES) {
        form<source>(h, row, c + LEAD, squares);
        multiply(c);
    }
    for (; c < whole; c += LANES) multiply(c);
    float total = sum(squares);
    for (int j = 0; j < B; j++) y[j] = sum(acc[j]);
    for (; c < cols; c++) {
        const float a = form<source>(h, row, c, total);
        for (int j = 0; j < B; j++) y[j] += a * x[j * n + c];
    }
    return total;
}

// Y of a band's rows, which are formed on the way; returns Σ u² of moments.
template <Source source>
double forward_band(const Hyper &hyper, const Row *rows, int count, int width, const float *x,
                    int64_t n, int64_t cols, float (*y)[MOST], int64_t ahead) {
    double squares = 0;
    int first = 0;
    if constexpr (source != WEIGHTS) {
        first = std::min(width, MANY);
        if (!first)
            for (int r = 0; r < count; r++)
                squares += forward<source, 1, 0>(hyper, rows + r, nullptr, 0, cols, y, ahead);
        else
            with_constant<1, MANY>(first, [&](auto many) {
                for (int r = 0; r < count; r++)
                    squares += form_row<source, many()>(hyper, rows[r], x, n, cols, y[r]);
            });
    }
    Row again[BAND] = {};
    for (int r = 0; r < count; r++) again[r].w = rows[r].read(source);
    for (int j = first; j < width; j += FEW)
        with_constant<1, FEW>(std::min(width - j, FEW), [&](auto few) {
            int r = 0;
            for (; r + ROWS <= count; r += ROWS)
                forward<WEIGHTS, ROWS, few()>(hyper, again + r, x + j * n, n, cols, from(y + r, j),
                                              j ? 0 : ahead);
            for (; r < count; r++)
                forward<WEIGHTS, 1, few()>(hyper, again + r, x + j * n, n, cols, from(y + r, j), 0);
        });
    return squares;
}

// Rows of a band: many, so that Z is seldom read and written, but no more than a cache holds.
inline int64_t band_of(int64_t cols) {
    constexpr int64_t FLOATS = 1 << 15;
    return std::max<int64_t>(ROWS, std::min<int64_t>(BAND, FLOATS / std::max<int64_t>(1, cols)));
}

// Where a thread adds the sums of one matrix: straight to it where no other thread has a part of
// it, or to a slot.
struct Target {
    float *z, *gram;
};

// YᵀY of a band's rows, four columns at a time; `gram` is (width, width).
inline void add_gram(const float (*y)[MOST], int count, int width, double *gram) {
    double wide[BAND][MOST + 3];
    for (int r = 0; r < count; r++) {
        for (int j = 0; j < width; j++) wide[r][j] = y[r][j];
        for (int j = width; j < width + 3; j++) wide[r][j] = 0;
    }
    for (int i = 0; i < width; i++)
        for (int j = 0; j < width; j += 4) {
            double sums[4] = {};
            for (int r = 0; r < count; r++)
                for (int k = 0; k < 4; k++) sums[k] += wide[r][i] * wide[r][j + k];
            for (int k = 0; k < std::min(4, width - j); k++) gram[i * width + j + k] += sums[k];
        }
}

// A band of a tile from `row` on; is_back: the Y of its rows are in `left` already. Those that are
// made are put into `line`, unless it is null. Returns Σ u² of moments.
template <Source source>
double multiply_band(bool is_back, const Tile &tile, int64_t row, int count, const Hyper &hyper,
                     const Row *rows, const Arena &arena, const Target &target, double *gram,
                     int64_t ahead, float *line) {
    const int width = int(tile.width);  // 0: measured elsewhere
    float y[BAND][MOST];
    const double squares =
        is_back && source == WEIGHTS
            ? 0
            : forward_band<source>(hyper, rows, count, is_back ? 0 : width, arena.x + tile.x,
                                   tile.n, tile.cols, y, ahead);
    if (!width) return squares;
    float *left = tile.left < 0 ? nullptr : arena.left + tile.left + row * width;
    if (is_back) {
        for (int r = 0; r < count; r++)
            for (int j = 0; j < width; j++) y[r][j] = left[r * width + j];
    } else if (left) {
        for (int r = 0; r < count; r++)
            for (int j = 0; j < width; j++) {
                float &sum_ = left[r * width + j];
#pragma omp atomic
                sum_ += y[r][j];  // a row of which this rank has two tiles
            }
        return squares;
    }
    if (line)
        for (int r = 0; r < count; r++) std::copy(y[r], y[r] + width, line + r * width);
    if (!is_back || tile.counts) add_gram(y, count, width, gram);
    const float *formed[BAND];
    for (int r = 0; r < count; r++) formed[r] = rows[r].read(source);
    for (int j = 0; j < width; j += FEW)
        with_constant<1, FEW>(std::min(width - j, FEW), [&](auto few) {
            back<few()>(formed, count, target.z + tile.z + j * tile.n, tile.n, tile.cols,
                        from(y, j));
        });
    return squares;
}

}  // namespace
