// PowerIteration.measure (spectral/power.py), for matrices that no other rank has pieces of.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "algebra.h"
#include "products.h"
#include "tables.h"

namespace {

inline float from_bfloat16(uint16_t a) {
    const uint32_t bits = uint32_t(a) << 16;
    float b;
    std::memcpy(&b, &bits, sizeof b);
    return b;
}

inline uint16_t to_bfloat16(float a) {  // to the nearest, as torch rounds; blocks are finite
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void load(const Operand &operand) {
    if (operand.is_wide)
        std::memcpy(operand.block, operand.kept, operand.length * sizeof(float));
    else
        for (int64_t i = 0; i < operand.length; i++)
            operand.block[i] = from_bfloat16(static_cast<const uint16_t *>(operand.kept)[i]);
}

void keep(const Operand &operand) {
    if (operand.is_wide)
        std::memcpy(operand.kept, operand.block, operand.length * sizeof(float));
    else
        for (int64_t i = 0; i < operand.length; i++)
            static_cast<uint16_t *>(operand.kept)[i] = to_bfloat16(operand.block[i]);
}

// Which matrices make which iterations: spectral/iterations.py. The numbers are those of all
// matrices' weights and, behind them, of their updates.
struct Iterations {
    const int64_t *most, *least;
    const uint8_t *begun;  // whose first products with U are made where the moments are updated
    int64_t matrices;
    double settled;

    bool makes(int64_t operand, int64_t k, int64_t number, double gain) const {
        const int64_t at = operand * matrices + k;
        return most[at] > number && (least[at] > number || !(gain <= settled));
    }
    bool is_begun(int64_t operand, int64_t k, int64_t number) const {
        return operand == 1 && number == 0 && begun[k];
    }
    bool may_follow(int64_t operand, int64_t k, int64_t number) const {
        return most[operand * matrices + k] > number + 1;
    }
    int64_t count(const Batch &batch) const {
        int64_t longest = 0;
        for (int64_t i = 0; i < 2 * batch.count; i++)
            longest = std::max(longest, most[i % 2 * matrices + batch.members[i / 2]]);
        return longest;
    }
};

// spectral/seen.py: keep, of one matrix of a batch.
void keep_seen(const Clipping &clipping, const Batch &batch, int64_t k) {
    const Shape &from = batch.operands[1].shapes[k], &to = clipping.shapes[k];
    const int64_t *lefts = clipping.lefts + 3 * k, length = from.width * from.n;
    std::copy_n(batch.x + from.x, length, clipping.x + to.x);
    std::copy_n(batch.z + from.z, length, clipping.z + to.z);
    std::copy_n(batch.z + from.gram, from.width * from.width, clipping.z + to.gram);
    std::copy_n(batch.left + lefts[0], lefts[2], clipping.left + lefts[1]);
}

// PowerIteration.measure for a batch of matrices that no other rank has pieces of. Of those whose
// first products with U are begun here the moments are updated, too. Of those that are projected it
// is kept what the vectors saw, in `clipping`, and Y, in `y`; null: there are none.
void measure(const Batch *batch, const Iterations &iterations, const Buffer *buffers,
             const Hyper *hypers, double *sums, double independent, int threads,
             const Clipping *clipping, float *y) {
    const Arena arena{batch->x, batch->z, batch->left};
    const int64_t matrices = iterations.matrices, rounds = iterations.count(*batch);
    for (const Operand &operand : batch->operands) load(operand);
    std::vector<uint8_t> making[2], beginning[2];  // of each operand, by matrix
    for (int o = 0; o < 2; o++) making[o].resize(matrices), beginning[o].resize(matrices);
    for (int64_t number = 0; number < rounds; number++) {
        for (int64_t i = 0; i < 2 * batch->count; i++) {
            const int64_t k = batch->members[i / 2], o = i % 2;
            making[o][k] = iterations.makes(o, k, number, batch->operands[o].gain[k]);
            beginning[o][k] = making[o][k] && !iterations.is_begun(o, k, number);
        }
        std::fill(batch->z, batch->z + batch->z_size, 0.f);
        std::fill(batch->left, batch->left + batch->left_size, 0.f);
        if (number == 0)
            multiply<MOMENTS>(false, batch->tiles, batch->tile_count, iterations.begun, matrices,
                              buffers, hypers, arena, sums, threads, {batch->lines, y});
        for (int o = 1; o >= 0; o--) {
            const Operand &operand = batch->operands[o];
            const auto product = o ? multiply<UPDATES> : multiply<WEIGHTS>;
            const auto run = [&](bool is_back, const Tile *tiles, int64_t count,
                                 const uint8_t *chosen, const int64_t *lines) {
                product(is_back, tiles, count, chosen, matrices, buffers, hypers, arena, nullptr,
                        threads, {lines, y});
            };
            run(false, operand.cut, operand.cut_count, beginning[o].data(), nullptr);
            run(false, operand.whole, operand.whole_count, beginning[o].data(),
                o ? batch->lines_of_whole : nullptr);
            run(true, operand.cut, operand.cut_count, making[o].data(), nullptr);
        }
        // Each matrix of each operand is one thread's.
        const int busy = int(std::min<int64_t>(threads, 2 * batch->count));
#pragma omp parallel for num_threads(busy) schedule(static, 1)
        for (int64_t i = 0; i < 2 * batch->count; i++) {
            const int64_t k = batch->members[i / 2], o = i % 2;
            const Operand &operand = batch->operands[o];
            if (o && making[o][k] && clipping && clipping->is_projected[k])
                keep_seen(*clipping, *batch, k);
            if (making[o][k])
                orthonormalize(operand.shapes[k], batch->x, batch->z, independent,
                               iterations.may_follow(o, k, number), operand.sigma[k],
                               operand.gain[k]);
        }
    }
    for (const Operand &operand : batch->operands) keep(operand);
}

}  // namespace
