// Which thread does what: the rows of a table's tiles, shared out, and what the threads sum.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tables.h"

namespace {

// The rows of active tiles, shared out: thread t of T takes those that begin in its T-th of the
// elements.
struct Shares {
    std::vector<int64_t> begin;  // of each tile, in elements; -1: not active
    int64_t total = 0;
    int threads = 1;
    Shares(const Tile *tiles, int64_t count, const uint8_t *active, bool with_rest, int most)
        : begin(count, -1) {
        for (int64_t i = 0; i < count; i++) {
            if (tiles[i].matrix < 0 ? !with_rest : !active[tiles[i].matrix]) continue;
            begin[i] = total;
            total += tiles[i].rows * tiles[i].cols;
        }
        constexpr int64_t LEAST = 1 << 14;  // elements that are worth a thread
        threads = int(std::max<int64_t>(1, std::min<int64_t>(most, total / LEAST)));
    }
    int64_t edge(int64_t thread) const {
        return total / threads * thread + std::min(thread, total % threads);
    }
    int64_t first_row(const Tile &tile, int64_t i, int64_t edge) const {
        if (edge <= begin[i]) return 0;
        return std::min(tile.rows, (edge - begin[i] + tile.cols - 1) / tile.cols);
    }
};

// Runs work(tile, row, stop, thread) on every share's rows of each active tile, in the order of the
// table.
template <typename Work>
void share(const Tile *tiles, int64_t count, const Shares &shares, const Work &work) {
#pragma omp parallel for num_threads(shares.threads) schedule(static, 1)
    for (int thread = 0; thread < shares.threads; thread++) {
        const int64_t low = shares.edge(thread), high = shares.edge(thread + 1);
        for (int64_t i = 0; i < count; i++) {
            if (shares.begin[i] < 0) continue;
            const int64_t row = shares.first_row(tiles[i], i, low),
                          stop = shares.first_row(tiles[i], i, high);
            if (row < stop) work(tiles[i], row, stop, thread);
        }
    }
}

// Sums per matrix in double, of each thread, then of all in their order.
struct Sums {
    int64_t matrices;
    std::vector<double> parts;
    Sums(int64_t matrices_, int threads) : matrices(matrices_), parts(3 * matrices_ * threads) {}
    double *of(const Tile &tile, int thread) {
        return &parts[3 * (thread * matrices + tile.matrix)];
    }
    void add_to(double *sums) const {
        for (size_t i = 0; i < parts.size(); i++) sums[i % (3 * matrices)] += parts[i];
    }
};

// Runs f(offset, count) on the runs of a tile's rows that are contiguous in memory, short enough
// for float sums.
template <typename F>
void runs(const Tile &tile, int64_t row, int64_t stop, const F &f) {
    const bool is_dense = tile.stride == tile.cols;
    const int64_t length = is_dense ? (stop - row) * tile.cols : tile.cols;
    for (int64_t r = row; r < stop; r += is_dense ? stop - row : 1)
        for (int64_t c = 0; c < length; c += RUN)
            f(tile.offset + r * tile.stride + c, std::min(RUN, length - c));
}

}  // namespace
