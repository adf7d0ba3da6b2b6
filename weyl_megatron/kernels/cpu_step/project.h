// The move of matrices whose singular values are clipped: W ← W − α_d λ W − (rate · U + Y C), row by
// row, with y = u Xᵀ and C = M Z (rule.py: project).

#pragma once

#include <cstdint>

#include "adamw.h"
#include "rows.h"
#include "tables.h"
#include "vector.h"

namespace {

// u_r[c] ← scale · u_r[c] + Σ_j y[r][j] C_j[c] of R rows and B vectors.
template <int R, int B>
void spread(float *const *rows, float scale, const float *c, int64_t n, int64_t cols,
            const float (*y)[MOST]) {
    vec ys[R][B];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < B; j++) ys[r][j] = splat(y[r][j]);
    int64_t i = 0;
    for (; i + LANES <= cols; i += LANES) {
        vec cs[B];
        for (int j = 0; j < B; j++) cs[j] = load(c + j * n + i);
        for (int r = 0; r < R; r++) {
            vec u = load(rows[r] + i) * splat(scale);
            for (int j = 0; j < B; j++) u = fma(cs[j], ys[r][j], u);
            store(rows[r] + i, u);
        }
    }
    for (; i < cols; i++)
        for (int r = 0; r < R; r++) {
            float u = rows[r][i] * scale;
            for (int j = 0; j < B; j++) u += y[r][j] * c[j * n + i];
            rows[r][i] = u;
        }
}

// W ← W · decay − change; returns Σ w² after it.
float subtract(float *__restrict w, const float *__restrict change, float decay, int64_t count) {
    float after = 0;
#pragma omp simd reduction(+ : after)
    for (int64_t c = 0; c < count; c++) {
        const float next = w[c] * decay - change[c];
        w[c] = next;
        after += next * next;
    }
    return after;
}

// R rows of a tile from `row` on, whose U are put into rows[r].u; `weights` are the same rows of W.
// Returns Σ w² after the move.
template <int R>
double project_rows(const Tile &tile, int64_t row, const Hyper &hyper, const Row *rows,
                    float *const *weights, const Arena &arena, float rate, float decay) {
    constexpr int64_t LONGEST = 4096;  // numbers that are summed in float
    const int width = int(tile.width);
    float y[R][MOST], *formed[R];
    Row again[R] = {};
    for (int r = 0; r < R; r++) again[r].w = formed[r] = rows[r].u;
    if (tile.left >= 0) {
        forward<UPDATES, R, 0>(hyper, rows, nullptr, 0, tile.cols, y, 0);
        const float *left = arena.left + tile.left + row * width;
        for (int r = 0; r < R; r++)
            for (int j = 0; j < width; j++) y[r][j] = left[r * width + j];
    } else {
        const float *x = arena.x + tile.x;
        some(width, [&](auto few) {
            forward<UPDATES, R, few()>(hyper, rows, x, tile.n, tile.cols, y, 0);
        });
        for (int j = FEW; j < width; j += FEW)
            some(width - j, [&](auto few) {
                forward<WEIGHTS, R, few()>(hyper, again, x + j * tile.n, tile.n, tile.cols,
                                           from(y, j), 0);
            });
    }
    for (int j = 0; j < width; j += FEW)
        some(width - j, [&](auto few) {
            spread<R, few()>(formed, j ? 1.f : rate, arena.z + tile.z + j * tile.n, tile.n,
                             tile.cols, from(y, j));
        });
    double after = 0;
    for (int r = 0; r < R; r++)
        for (int64_t c = 0; c < tile.cols; c += LONGEST)
            after += subtract(weights[r] + c, formed[r] + c, decay,
                              std::min(LONGEST, tile.cols - c));
    return after;
}

// What `share` gives a thread: rows of one tile.
double project_tile(const Tile &tile, int64_t row, int64_t stop, const Buffer &buffer,
                    const Hyper &hyper, const Arena &arena, float rate, float decay, Room &room) {
    const int64_t widest = (tile.cols + 15) / 16 * 16;
    room.resize(ROWS * widest);
    double after = 0;
    for (; row < stop; row += ROWS) {
        const int count = int(std::min<int64_t>(ROWS, stop - row));
        Row each[ROWS];
        float *weights[ROWS];
        for (int r = 0; r < count; r++) {
            const int64_t at = tile.offset + (row + r) * tile.stride;
            weights[r] = buffer.weight + at;
            each[r] = {weights[r], buffer.grad + at, buffer.exp_avg + at, buffer.exp_avg_sq + at,
                       room.at + r * widest};
        }
        if (count == ROWS)
            after += project_rows<ROWS>(tile, row, hyper, each, weights, arena, rate, decay);
        else
            for (int r = 0; r < count; r++)
                after += project_rows<1>(tile, row + r, hyper, each + r, weights + r, arena, rate,
                                         decay);
    }
    return after;
}

}  // namespace
