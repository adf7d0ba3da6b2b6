// What cpu.py hands over by address. Each struct is laid out as that file writes it.

#pragma once

#include <cstdint>

namespace {

// Vectors per matrix at most: settings.MOST_VECTORS; and those that are worked on at once.
constexpr int MOST = 64, FEW = 4;

struct Tile {  // COLUMNS of spectral/blocks.py
    int64_t buffer, offset, rows, cols, stride, matrix, x, z, n, width, gram, left, counts;
};
struct Shape {  // of a matrix: where x and z begin, columns, vectors, where YᵀY begins
    int64_t x, z, n, width, gram;
};
struct Buffer {
    float *weight;
    const float *grad;
    float *exp_avg, *exp_avg_sq;
};
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
struct Batch {
    Operand operands[2];
    const Tile *tiles;  // all of the batch's
    int64_t tile_count;
    const int64_t *members;
    int64_t count;
    float *x, *z, *left;
    int64_t z_size, left_size;
};

}  // namespace
