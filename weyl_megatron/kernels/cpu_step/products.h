// The products of whole tables of tiles with W or U, by all threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rows.h"
#include "shares.h"
#include "staged.h"
#include "tables.h"
#include "vector.h"

namespace {

// Where the threads add Z and YᵀY. A thread's rows lie one after the other in the table, whose
// tiles are in the order of their matrices: all but the first and the last of its matrices are its
// own.
struct Targets {
    struct Slot {
        int64_t matrix = -1;
        Tile tile;
        Room z;
        std::vector<double> gram;
    };
    const Arena &arena;
    std::vector<Slot> slots;  // two a thread
    Targets(const Arena &arena_, int threads) : arena(arena_), slots(2 * threads) {}
    void add_all() {
        for (Slot &slot : slots) {
            if (slot.matrix < 0) continue;
            const int64_t n = slot.tile.n, b = slot.tile.width;
            float *z = arena.z + slot.tile.gram - b * n;
            for (int64_t i = 0; i < b * n; i++) z[i] += slot.z.at[i];
            for (int64_t i = 0; i < b * b; i++) arena.z[slot.tile.gram + i] += float(slot.gram[i]);
        }
    }
};

// One thread's current matrix.
struct Adding {
    Targets &targets;
    const int thread;
    int64_t matrix = -1;
    Target target{};
    double gram[MOST * MOST];
    double *sum = gram;
    Tile tile{};
    bool is_own = false;
    Adding(Targets &targets_, int thread_) : targets(targets_), thread(thread_) {}
    ~Adding() { flush(); }
    // matrices of which [begin, end) of the elements is outside the thread's share are not its own
    void turn_to(const Tile &next, bool own) {
        if (next.matrix == matrix) return;
        flush();
        matrix = next.matrix, tile = next, is_own = own;
        if (own) {
            std::fill(gram, gram + next.width * next.width, 0.0);
            sum = gram;
            target.z = targets.arena.z;
        } else {
            Targets::Slot &slot =
                targets.slots[2 * thread + (targets.slots[2 * thread].matrix >= 0)];
            slot.matrix = matrix, slot.tile = next;
            slot.z.resize(next.width * next.n);
            slot.gram.assign(next.width * next.width, 0.0);
            sum = slot.gram.data();
            // so that offsets of the arena fit both
            target.z = slot.z.at - (next.gram - next.width * next.n);
        }
    }
    void flush() {
        if (matrix >= 0 && is_own)
            for (int64_t i = 0; i < tile.width * tile.width; i++)
                targets.arena.z[tile.gram + i] += float(sum[i]);
        matrix = -1;
    }
};

// Which matrices lie whole in one thread's share.
std::vector<int64_t> extents(const Tile *tiles, int64_t count, const Shares &shares,
                             int64_t matrices) {
    std::vector<int64_t> ends(2 * matrices, -1);
    for (int64_t i = 0; i < count; i++) {
        const int64_t k = tiles[i].matrix;
        if (k < 0 || shares.begin[i] < 0) continue;
        if (ends[2 * k] < 0) ends[2 * k] = shares.begin[i];
        ends[2 * k + 1] = shares.begin[i] + tiles[i].rows * tiles[i].cols;
    }
    return ends;
}

// The products of all active tiles with W or U; with MOMENTS, U is that of moments updated in the
// same pass. Y is kept in `lines`.
template <Source source>
void multiply(bool is_back, const Tile *tiles, int64_t count, const uint8_t *active,
              int64_t matrices, const Buffer *buffers, const Hyper *hypers, const Arena &arena,
              double *sums, int threads, const Lines &lines = {}) {
    const Shares shares(tiles, count, active, false, threads);
    if (!shares.total) return;
    const std::vector<int64_t> ends = extents(tiles, count, shares, matrices);
    Targets targets(arena, shares.threads);
    Sums partial(source == MOMENTS ? matrices : 0, shares.threads);
    int64_t longest = 0;
    bool has_narrow = false;
    for (int64_t i = 0; i < count; i++)
        if (shares.begin[i] >= 0) {
            longest = std::max(longest, band_of(tiles[i].cols) * Room::stride_of(tiles[i].cols));
            has_narrow |= buffers[tiles[i].buffer].narrow != 0;
        }
#pragma omp parallel for num_threads(shares.threads) schedule(static, 1)
    for (int thread = 0; thread < shares.threads; thread++) {
        Room room;
        room.resize(source == WEIGHTS ? 0 : (has_narrow ? 3 : 1) * longest);
        Adding adding(targets, thread);
        const int64_t low = shares.edge(thread), high = shares.edge(thread + 1);
        for (int64_t i = 0; i < count; i++) {
            const Tile &tile = tiles[i];
            if (shares.begin[i] < 0) continue;
            const int64_t start = shares.first_row(tile, i, low),
                          stop = shares.first_row(tile, i, high);
            const Buffer &buffer = buffers[tile.buffer];
            if (start >= stop || (source != WEIGHTS && !buffer.exp_avg)) continue;
            if (tile.width)
                adding.turn_to(tile,
                               ends[2 * tile.matrix] >= low && ends[2 * tile.matrix + 1] <= high);
            const Hyper hyper = of_rows(buffer, hypers[tile.buffer]);
            const int64_t band = band_of(tile.cols);
            for (int64_t done = 0; done < stop - start; done += band) {
                const int rows = int(std::min<int64_t>(band, stop - start - done));
                // U is formed again from the end on: what the pass before read last may still be in
                // the cache.
                const bool is_backwards = source == UPDATES;
                const int64_t row = is_backwards ? stop - done - rows : start + done;
                const bool is_there = done + 2 * band <= stop - start;
                const int64_t ahead = !is_there ? 0 : (is_backwards ? -1 : 1) * band * tile.stride;
                Row each[BAND];
                for (int r = 0; r < rows; r++) {
                    const int64_t at = tile.offset + (row + r) * tile.stride;
                    float *u = room.at + r * Room::stride_of(tile.cols);
                    each[r] = row_of<source>(buffer, hypers[tile.buffer], at, tile.cols, u,
                                             u + longest, u + 2 * longest);
                }
                const double squares =
                    multiply_band<source>(is_back, tile, row, rows, hyper, each, arena,
                                          adding.target, adding.sum, ahead,
                                          lines.of(i, row, tile.width));
                if (source == MOMENTS && tile.width) partial.of(tile, thread)[0] += squares;
            }
        }
    }
    targets.add_all();
    if (source == MOMENTS) partial.add_to(sums);
}

}  // namespace
