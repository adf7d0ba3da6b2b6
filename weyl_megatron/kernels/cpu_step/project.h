// The move of matrices whose singular values are clipped: W ← W − α_d λ W − (rate · U + Y C), with
// Y = U Xᵀ and C = M Z (rule.py: project).

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "adamw.h"
#include "rows.h"
#include "staged.h"
#include "tables.h"
#include "vector.h"

namespace {

// What moves rows: W ← W · decay − (rate · U + Y C).
struct Move {
    const Hyper &hyper;
    float rate, decay;
    const float *c;  // of the tile's first column
    int64_t n;
    int width;
};

// Columns [c, c + C registers) of R rows; Σ w² after the move is added to `after`.
template <int R, int C>
inline void move_columns(const Move &move, const Row *rows, float *const *w, int64_t c,
                         const float (*y)[MOST], vec *after) {
    vec changes[R][C];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < C; i++) {
            const int64_t at = c + i * LANES;
            const vec u = direction(move.hyper, load(rows[r].m + at), load(rows[r].v + at));
            changes[r][i] = u * splat(move.rate);
        }
    for (int j = 0; j < move.width; j++) {
        vec cs[C];
        for (int i = 0; i < C; i++) cs[i] = load(move.c + j * move.n + c + i * LANES);
        for (int r = 0; r < R; r++) {
            const vec a = splat(y[r][j]);
            for (int i = 0; i < C; i++) changes[r][i] = fma(cs[i], a, changes[r][i]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < C; i++) {
            float *at = w[r] + c + i * LANES;
            const vec next = load(at) * splat(move.decay) - changes[r][i];
            store(at, next);
            after[i] = fma(next, next, after[i]);
        }
}

// Columns [c, stop) of R rows; returns Σ w² after the move.
template <int R>
float move_rows(const Move &move, const Row *rows, float *const *w, int64_t c, int64_t stop,
                const float (*y)[MOST]) {
    vec squares[COLUMNS];
    for (vec &each : squares) each = splat(0.f);
    for (; c + COLUMNS * LANES <= stop; c += COLUMNS * LANES)
        move_columns<R, COLUMNS>(move, rows, w, c, y, squares);
    for (; c + LANES <= stop; c += LANES) move_columns<R, 1>(move, rows, w, c, y, squares);
    float after = 0;
    for (const vec &each : squares) after += sum(each);
    for (; c < stop; c++)
        for (int r = 0; r < R; r++) {
            float change = direction(move.hyper, rows[r].m[c], rows[r].v[c]) * move.rate;
            for (int j = 0; j < move.width; j++) change += y[r][j] * move.c[j * move.n + c];
            w[r][c] = w[r][c] * move.decay - change;
            after += w[r][c] * w[r][c];
        }
    return after;
}

// A band of a tile from `row` on, whose Y are in `left` or in `line`, or else made anew, with U in
// rows[r].u; `weights` are the same rows of W. Returns Σ w² after the move.
double project_band(const Tile &tile, int64_t row, int count, const Hyper &hyper, const Row *rows,
                    float *const *weights, const Arena &arena, const float *line, float rate,
                    float decay) {
    const int width = int(tile.width);
    float y[BAND][MOST];
    const float *known = tile.left < 0 ? line : arena.left + tile.left + row * width;
    if (known)
        for (int r = 0; r < count; r++)
            std::copy(known + r * width, known + (r + 1) * width, y[r]);
    else
        forward_band<UPDATES>(hyper, rows, count, width, arena.x + tile.x, tile.n, tile.cols, y, 0);
    const Move move{hyper, rate, decay, arena.z + tile.z, tile.n, width};
    double after = 0;
    int r = 0;
    const auto move_some = [&](auto some) {
        for (int64_t c = 0; c < tile.cols; c += RUN)
            after += move_rows<some()>(move, rows + r, weights + r, c,
                                       std::min(c + RUN, tile.cols), y + r);
        r += some();
    };
    while (r + FEW <= count) move_some(std::integral_constant<int, FEW>());
    while (r < count) move_some(std::integral_constant<int, 1>());
    return after;
}

// What `share` gives a thread: rows of one tile.
double project_tile(const Tile &tile, int64_t row, int64_t stop, const Buffer &buffer,
                    const Hyper &hyper, const Arena &arena, float *line, float rate, float decay,
                    Room &room) {
    const int64_t stride = Room::stride_of(tile.cols), band = band_of(tile.cols);
    room.resize((buffer.narrow ? 3 : 1) * band * stride);
    double after = 0;
    const int64_t first = row;
    for (; row < stop; row += band) {
        const int count = int(std::min<int64_t>(band, stop - row));
        Row each[BAND];
        float *weights[BAND];
        for (int r = 0; r < count; r++) {
            const int64_t at = tile.offset + (row + r) * tile.stride;
            weights[r] = buffer.weight + at;
            float *u = room.at + r * stride;
            each[r] = row_of<UPDATES>(buffer, hyper, at, tile.cols, u, u + band * stride,
                                      u + 2 * band * stride);
        }
        after += project_band(tile, row, count, hyper, each, weights, arena,
                              line ? line + (row - first) * tile.width : nullptr, rate, decay);
    }
    return after;
}

}  // namespace
