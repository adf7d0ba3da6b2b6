// What cpu.py hands over by address. Each struct is laid out as that file writes it.

#pragma once

#include <cstdint>

namespace {

// Vectors per matrix at most: settings.MOST_VECTORS; and those that are worked on at once: while
// rows are formed, and else. Rows that are multiplied together, at most.
constexpr int MOST = 64, MANY = 8, FEW = 4, BAND = 16;

struct Tile {  // COLUMNS of spectral/blocks.py
    int64_t buffer, offset, rows, cols, stride, matrix, x, z, n, width, gram, left, counts;
};
struct Shape {  // of a matrix: where x and z begin, columns, vectors, where YᵀY begins
    int64_t x, z, n, width, gram;
};
struct Buffer {
    float *weight;
    const float *grad;
    void *exp_avg, *exp_avg_sq;
    int64_t narrow;  // which of them are in bfloat16, the others are floats
};
constexpr int64_t NARROW_M = 1, NARROW_V = 2;
constexpr int64_t RUN = 4096;  // numbers that are summed in float, at most
struct Hyper {  // of a buffer, made by cpu.py
    float lerp, beta2, one_minus_beta2, correction2_sqrt, eps;
    // At the scheduled rate: 1 - αλ and -α / (1 - β₁ᵗ).
    float decay, step_size;
    // U = m / (√v · scale2 + eps1).
    float scale2, correction2_inverse, eps1;
    double weight_decay, correction1;
};

struct Arena {  // x, z and left of the batch that is measured
    const float *x;
    float *z, *left;
};

struct Operand {  // of a batch, made by cpu.py
    const Tile *whole;
    int64_t whole_count;
    const Tile *cut;
    int64_t cut_count;
    const Shape *shapes;
    void *kept;  // bfloat16, or float32 where is_wide
    int64_t is_wide;
    float *block;
    int64_t length;
    double *sigma, *gain;
};
// Where Y of a table's tiles is kept, of each its first row or -1.
struct Lines {
    const int64_t *at;  // null: of none
    float *y;
    float *of(int64_t tile, int64_t row, int64_t width) const {
        return at && at[tile] >= 0 ? y + at[tile] + row * width : nullptr;
    }
};

// What of updates whose singular values are clipped is kept from their last iteration on, and what
// becomes of them; of all matrices, made by cpu_structs.py.
struct Clipping {
    const uint8_t *is_projected, *is_whole;
    const Shape *shapes;
    const int64_t *lefts;  // of each: where its Y of cut rows are in a batch and here, how many
    float *x, *z, *left;
    double *rate, *decay, *unseen, *share;
    int64_t *clipped;
    uint8_t *is_active;
    const double *constants;
};
struct Batch {
    Operand operands[2];
    const Tile *tiles;  // all of the batch's
    int64_t tile_count;
    const int64_t *members;
    int64_t count;
    float *x, *z, *left;
    int64_t z_size, left_size;
    const Tile *seen;  // those that are projected, with the places of Clipping
    int64_t seen_count, line_size;
    // Of `tiles`, `seen` and the update's `whole`.
    const int64_t *lines, *lines_of_seen, *lines_of_whole;
};

}  // namespace
