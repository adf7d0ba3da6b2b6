// The step of AdamW² on a CPU: every number is read once per pass, U is formed in registers and
// never stored.
//
// Plain C functions on addresses; cpu.py compiles this file, which includes all others, on first
// use and calls it. A table has one row of Tile per tile. Threads take equal shares of its
// elements, always the same ones, and what two of them add to one matrix is added up in the order
// of the threads: a step's result depends on nothing but its input and the number of threads.
//
// Compiled without contraction of a*b+c: moments and moves are torch's own operations, one by one,
// wherever a row begins and ends. Where a fused multiply-add is meant, it is written.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_step/adamw.h"
#include "cpu_step/algebra.h"
#include "cpu_step/clip.h"
#include "cpu_step/measure.h"
#include "cpu_step/products.h"
#include "cpu_step/project.h"
#include "cpu_step/shares.h"
#include "cpu_step/staged.h"
#include "cpu_step/tables.h"

extern "C" {

// M and V of the active matrices, Σ u² and the first products with U.
void weyl_moments(const Tile *tiles, int64_t count, const uint8_t *multiplied, int64_t matrices,
                  const Buffer *buffers, const Hyper *hypers, const float *x, float *z, float *left,
                  double *sums, int threads) {
    const Arena arena{x, z, left};
    multiply<MOMENTS>(false, tiles, count, multiplied, matrices, buffers, hypers, arena, sums,
                      threads);
}

// The whole step of the matrices in `moved` and of what is no matrix, at the scheduled rate.
void weyl_step(const Tile *tiles, int64_t count, const uint8_t *moved, int64_t matrices,
               const Buffer *buffers, const Hyper *hypers, double *sums, int threads) {
    const Shares shares(tiles, count, moved, true, threads);
    Sums partial(matrices, shares.threads);
    share(tiles, count, shares, [&](const Tile &tile, int64_t row, int64_t stop, int thread) {
        const Buffer &buffer = buffers[tile.buffer];
        const Hyper &hyper = hypers[tile.buffer];
        if (!buffer.exp_avg) return;
        // -α U is what was summed, so that no second quotient is needed.
        const double rate = double(hyper.step_size) * hyper.correction1,
                     factor = rate == 0 ? 0 : 1 / rate;
        runs(tile, row, stop, [&](int64_t at, int64_t length) {
            float of_m[RUN], of_v[RUN];
            Moments moments(buffer, at, length, of_m, of_v);
            if (buffer.narrow) moments.update(buffer, hyper, at, length);
            const Squares squares =
                step_run(of_rows(buffer, hyper), buffer.weight + at, buffer.grad + at, moments.m,
                         moments.v, length);
            if (!tile.width) return;
            double *total = partial.of(tile, thread);
            total[0] += squares.moved * factor * factor;
            total[1] += squares.before;
            total[2] += squares.after;
        });
    });
    partial.add_to(sums);
}

void weyl_undo(const Tile *tiles, int64_t count, const uint8_t *undone, const Buffer *buffers,
               const Hyper *hypers, int threads) {
    const Shares shares(tiles, count, undone, false, threads);
    share(tiles, count, shares, [&](const Tile &tile, int64_t row, int64_t stop, int) {
        const Buffer &buffer = buffers[tile.buffer];
        if (!buffer.exp_avg) return;
        runs(tile, row, stop, [&](int64_t at, int64_t length) {
            float of_m[RUN], of_v[RUN];
            const Moments moments(buffer, at, length, of_m, of_v);
            undo_run(hypers[tile.buffer], buffer.weight + at, moments.m, moments.v, length);
        });
    });
}

void weyl_move(const Tile *tiles, int64_t count, const uint8_t *moved, int64_t matrices,
               const Buffer *buffers, const Hyper *hypers, const double *rates, double *sums,
               int threads) {
    const Shares shares(tiles, count, moved, false, threads);
    Sums partial(matrices, shares.threads);
    share(tiles, count, shares, [&](const Tile &tile, int64_t row, int64_t stop, int thread) {
        const Buffer &buffer = buffers[tile.buffer];
        const Hyper &hyper = hypers[tile.buffer];
        if (!buffer.exp_avg) return;
        const double rate = rates[tile.matrix];
        const float decay = float(1 - rate * hyper.weight_decay),
                    step_size = float(-(rate / hyper.correction1));
        runs(tile, row, stop, [&](int64_t at, int64_t length) {
            float of_m[RUN], of_v[RUN];
            const Moments moments(buffer, at, length, of_m, of_v);
            const float after = move_run(hyper, decay, step_size, buffer.weight + at, moments.m,
                                         moments.v, length);
            if (tile.width) partial.of(tile, thread)[2] += after;
        });
    });
    partial.add_to(sums);
}

// As weyl_move, of matrices whose singular values are clipped; z holds their C. `counts` of a tile
// is whether it is measured here. Y of tiles may be known: `lines`, or null, says where in y.
void weyl_project(const Tile *tiles, int64_t count, const uint8_t *moved, int64_t matrices,
                  const Buffer *buffers, const Hyper *hypers, const float *x, float *z, float *left,
                  const double *rates, const double *decays, double *sums, const int64_t *lines,
                  float *y, int threads) {
    const Arena arena{x, z, left};
    const Shares shares(tiles, count, moved, false, threads);
    Sums partial(matrices, shares.threads);
    std::vector<Room> rooms(shares.threads);
    share(tiles, count, shares, [&](const Tile &tile, int64_t row, int64_t stop, int thread) {
        const Buffer &buffer = buffers[tile.buffer];
        const Hyper &hyper = hypers[tile.buffer];
        if (!buffer.exp_avg) return;
        const float decay = float(1 - decays[tile.matrix] * hyper.weight_decay);
        float *line = Lines{lines, y}.of(&tile - tiles, row, tile.width);
        const double after = project_tile(tile, row, stop, buffer, hyper, arena, line,
                                          float(rates[tile.matrix]), decay, rooms[thread]);
        if (tile.counts) partial.of(tile, thread)[2] += after;
    });
    partial.add_to(sums);
}

// C of the active ones of some matrices, from what the vectors saw, and what is said of it.
void weyl_clip(const int64_t *members, int64_t count, const uint8_t *active, const double *lr,
               const double *bound, const double *sums, const Clipping *clipping, int threads) {
    const int busy = int(std::min<int64_t>(threads, std::max<int64_t>(1, count)));
#pragma omp parallel for num_threads(busy) schedule(static, 1)
    for (int64_t i = 0; i < count; i++) {
        const int64_t k = members[i];
        if (active[k]) clip_seen(*clipping, k, lr[k], bound[k], std::sqrt(sums[3 * k]));
    }
}

void weyl_multiply(int operand, int is_back, const Tile *tiles, int64_t count,
                   const uint8_t *active, int64_t matrices, const Buffer *buffers,
                   const Hyper *hypers, const float *x, float *z, float *left, int threads) {
    const Arena arena{x, z, left};
    const auto function = operand ? multiply<UPDATES> : multiply<WEIGHTS>;
    function(is_back != 0, tiles, count, active, matrices, buffers, hypers, arena, nullptr, threads,
             {});
}

void weyl_orthonormalize(const Shape *shapes, const int64_t *batch, int64_t count,
                         const uint8_t *mask, const uint8_t *more, float *x, float *z,
                         double *sigma, double *gain, double independent, int threads) {
    const int busy = int(std::min<int64_t>(threads, std::max<int64_t>(1, count)));
#pragma omp parallel for num_threads(busy) schedule(static, 1)
    for (int64_t i = 0; i < count; i++) {
        const int64_t k = batch[i];
        if (mask[k]) orthonormalize(shapes[k], x, z, independent, more[k], sigma[k], gain[k]);
    }
}

// Lines 3 to 14 of the algorithm for batches that no other rank has pieces of, each while its
// numbers are in the cache. `begun` are the matrices whose moments are not updated yet, `moved`
// those whose weights wait for their rates; `clipping` is null where nothing is projected.
void weyl_step_alone(const Batch *const *batches, int64_t count, const int64_t *most,
                     const int64_t *least, const uint8_t *begun, const uint8_t *moved,
                     int64_t matrices, const Buffer *buffers, const Hyper *hypers, const double *lr,
                     const double *tau, const double *floor, double *rates, double *sums,
                     double independent, double settled, const Clipping *clipping, int threads) {
    const Iterations iterations{most, least, begun, matrices, settled};
    std::vector<uint8_t> scaled(moved, moved + matrices), projected(matrices);
    std::vector<double> bounds(matrices);
    std::vector<float> y;
    for (int64_t i = 0; i < count; i++) {
        const Batch *batch = batches[i];
        if (int64_t(y.size()) < batch->line_size) y.resize(batch->line_size);
        measure(batch, iterations, buffers, hypers, sums, independent, threads, clipping, y.data());
        bool has_projected = false;
        for (int64_t m = 0; m < batch->count; m++) {
            const int64_t k = batch->members[m];
            // As matrices.py: rates. A σ₁(W) that is not a number counts for the floor.
            bounds[k] = tau[k] * std::fmax(batch->operands[0].sigma[k], floor[k]);
            double update = batch->operands[1].sigma[k];
            if (!(update > 0)) update = std::sqrt(sums[3 * k]);
            const double bound = update == 0 || std::isinf(tau[k]) ? INFINITY : bounds[k] / update;
            rates[k] = std::isnan(bound) ? NAN : std::min(lr[k], bound);
            const bool is_over = moved[k] && rates[k] < lr[k];
            if (!is_over || !clipping || !clipping->is_projected[k]) continue;
            projected[k] = clipping->is_active[k] = 1;
            scaled[k] = 0;
            has_projected = true;
        }
        if (has_projected) {
            weyl_clip(batch->members, batch->count, projected.data(), lr, bounds.data(), sums,
                      clipping, threads);
            weyl_project(batch->seen, batch->seen_count, projected.data(), matrices, buffers,
                         hypers, clipping->x, clipping->z, clipping->left, clipping->rate,
                         clipping->decay, sums, batch->lines_of_seen, y.data(), threads);
        }
        weyl_move(batch->tiles, batch->tile_count, scaled.data(), matrices, buffers, hypers, rates,
                  sums, threads);
    }
}

}  // extern "C"
