// The step of AdamW² on a CPU: every number is read once per pass, U is formed in registers and never stored.
//
// Plain C functions on addresses; cpu.py compiles this file on first use and calls it. A table has one row of Tile per
// tile. Threads take equal shares of its elements, always the same ones, and what two of them add to one matrix is
// added up in the order of the threads: a step's result depends on nothing but its input and the number of threads.
//
// Compiled without contraction of a*b+c: moments and moves are torch's own operations, one by one, wherever a row begins
// and ends. Where a fused multiply-add is meant, it is written.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace {

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
    float decay, step_size;        // at the scheduled rate: 1 - αλ, -α / (1 - β₁ᵗ)
    float scale2, correction2_inverse, eps1;  // U = m / (√v · scale2 + eps1)
    double weight_decay, correction1;
};

constexpr int MOST = 4;  // vectors per matrix

#if defined(__AVX512F__)
typedef __m512 vec;
constexpr int LANES = 16, ROWS = 4;
inline vec load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, vec a) { _mm512_storeu_ps(p, a); }
inline vec splat(float a) { return _mm512_set1_ps(a); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(vec a) { return _mm512_reduce_add_ps(a); }
inline vec root(vec a) { return _mm512_sqrt_ps(a); }
// From 14 bits by Newton's step: the divider is busy with roots, and products wait for both. Of an infinite b, which v
// is where a gradient is above 1e19, r is 0; the step alone takes a finite one, for it would make 0 · ∞ of it.
inline vec quotient(vec a, vec b) {
    const vec r = _mm512_rcp14_ps(_mm512_max_ps(splat(1e-38f), b));
    return a * fma(r, _mm512_fnmadd_ps(_mm512_min_ps(splat(3e38f), b), r, splat(1.f)), r);
}
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256 vec;
constexpr int LANES = 8, ROWS = 2;
inline vec load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, vec a) { _mm256_storeu_ps(p, a); }
inline vec splat(float a) { return _mm256_set1_ps(a); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec root(vec a) { return _mm256_sqrt_ps(a); }
inline vec quotient(vec a, vec b) { return _mm256_div_ps(a, b); }
inline float sum(vec a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
#else
typedef float vec __attribute__((vector_size(16)));
constexpr int LANES = 4, ROWS = 2;
inline vec load(const float *p) { vec a; std::memcpy(&a, p, sizeof a); return a; }
inline void store(float *p, vec a) { std::memcpy(p, &a, sizeof a); }
inline vec splat(float a) { return vec{a, a, a, a}; }
inline vec fma(vec a, vec b, vec c) { return a * b + c; }
inline float sum(vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }
inline vec root(vec a) { return vec{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])}; }
inline vec quotient(vec a, vec b) { return a / b; }
#endif

// Floats on the boundary of a cache line: vectors that straddle two take twice the time.
class Room {
    std::vector<float> floats;

  public:
    float *at = nullptr;
    void resize(int64_t count) {
        floats.assign(count + 16, 0.f);
        at = floats.data() + (64 - reinterpret_cast<uintptr_t>(floats.data()) % 64) % 64 / sizeof(float);
    }
};

// The arithmetic of torch.optim.AdamW, in its order.

inline void moments_of(const Hyper &h, float g, float &m, float &v) {
    m = __builtin_fmaf(h.lerp, g - m, m);
    v = __builtin_fmaf(h.one_minus_beta2 * g, g, v * h.beta2);
}

// √v / correction + ε. The quotient by a constant is a product, made exact by the remainder (Markstein's theorem).
inline float denominator(const Hyper &h, float v) {
    const float a = std::sqrt(v), q = a * h.correction2_inverse, rest = __builtin_fmaf(-q, h.correction2_sqrt, a);
    const float exact = __builtin_fmaf(rest, h.correction2_inverse, q);
    return (rest == rest ? exact : q) + h.eps;
}

inline float direction(const Hyper &h, float m, float v) { return m / (std::sqrt(v) * h.scale2 + h.eps1); }
inline vec direction(const Hyper &h, vec m, vec v) {
    return quotient(m, fma(root(v), splat(h.scale2), splat(h.eps1)));
}

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

// Brings a line that is read some rows later nearer: what streams from memory and what is multiplied take turns, and
// memory would idle meanwhile.
inline void fetch(const float *p) { __builtin_prefetch(p, 0, 2); }

// y[r][j] = Σ_c row_r[c] x_j[c] of rows that are formed on the way; returns Σ u². B = 0: they are only formed.
template <Source source, int R, int B>
float forward(const Hyper &h, const Row *rows, const float *x, int64_t n, int64_t cols, float (*y)[MOST],
              int64_t ahead) {
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
void back(const float *const *rows, float *z, int64_t n, int64_t cols, const float (*y)[MOST], int64_t ahead) {
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

// Where a thread adds the sums of one matrix: straight to it where no other thread has a part of it, or to a slot.
struct Target {
    float *z, *gram;
};

struct Arena {  // x, z and left of the batch that is measured
    const float *x;
    float *z, *left;
};

// R rows of a tile from `row` on; is_back: their Y are in `left` already. Returns Σ u² of moments.
template <Source source, int R, int B>
float multiply_rows(bool is_back, const Tile &tile, int64_t row, const Hyper &hyper, const Row *rows,
                    const Arena &arena, const Target &target, double *gram, int64_t ahead) {
    float y[R][MOST], squares;
    const float *formed[R];
    for (int r = 0; r < R; r++) formed[r] = rows[r].read(source);
    float *left = tile.left < 0 ? nullptr : arena.left + tile.left + row * B;  // there may be none of it
    if (is_back) {
        squares = source == WEIGHTS ? 0 : forward<source, R, 0>(hyper, rows, nullptr, 0, tile.cols, y, ahead);
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

template <Source source, int B>
float multiply_rows(bool is_back, const Tile &tile, int64_t row, int count, const Hyper &hyper, const Row *rows,
                    const Arena &arena, const Target &target, double *gram, int64_t ahead) {
    if (count == ROWS)
        return multiply_rows<source, ROWS, B>(is_back, tile, row, hyper, rows, arena, target, gram, ahead);
    float squares = 0;
    for (int r = 0; r < count; r++)
        squares += multiply_rows<source, 1, B>(is_back, tile, row + r, hyper, rows + r, arena, target, gram, ahead);
    return squares;
}

template <Source source>
float multiply_rows(bool is_back, const Tile &tile, int64_t row, int count, const Hyper &hyper, const Row *rows,
                    const Arena &arena, const Target &target, double *gram, int64_t ahead) {
    float y[1][MOST], squares = 0;
    switch (tile.width) {
        case 0:  // measured elsewhere
            for (int r = 0; r < count; r++)
                squares += forward<source, 1, 0>(hyper, rows + r, nullptr, 0, tile.cols, y, ahead);
            return squares;
        case 1: return multiply_rows<source, 1>(is_back, tile, row, count, hyper, rows, arena, target, gram, ahead);
        case 2: return multiply_rows<source, 2>(is_back, tile, row, count, hyper, rows, arena, target, gram, ahead);
        case 3: return multiply_rows<source, 3>(is_back, tile, row, count, hyper, rows, arena, target, gram, ahead);
        default: return multiply_rows<source, 4>(is_back, tile, row, count, hyper, rows, arena, target, gram, ahead);
    }
}

struct Squares {
    float moved, before, after;  // of α U, of W before and after
};

// Everything in one pass, at the scheduled rate.
Squares step_run(const Hyper &h, float *__restrict w, const float *__restrict g, float *__restrict m,
                 float *__restrict v, int64_t count) {
    float moved = 0, before = 0, after = 0;
#pragma omp simd reduction(+ : moved, before, after)
    for (int64_t c = 0; c < count; c++) {
        float a = m[c], b = v[c];
        moments_of(h, g[c], a, b);
        m[c] = a, v[c] = b;
        const float d = (h.step_size * a) / denominator(h, b);
        const float old = w[c], next = old * h.decay + d;
        w[c] = next;
        moved += d * d, before += old * old, after += next * next;
    }
    return {moved, before, after};
}

float move_run(const Hyper &h, float decay, float step_size, float *__restrict w, const float *__restrict m,
               const float *__restrict v, int64_t count) {
    float after = 0;
#pragma omp simd reduction(+ : after)
    for (int64_t c = 0; c < count; c++) {
        const float next = w[c] * decay + (step_size * m[c]) / denominator(h, v[c]);
        w[c] = next;
        after += next * next;
    }
    return after;
}

void undo_run(const Hyper &h, float *__restrict w, const float *__restrict m, const float *__restrict v,
              int64_t count) {
#pragma omp simd
    for (int64_t c = 0; c < count; c++) w[c] = (w[c] - (h.step_size * m[c]) / denominator(h, v[c])) / h.decay;
}

// The rows of active tiles, shared out: thread t of T takes those that begin in its T-th of the elements.
struct Shares {
    std::vector<int64_t> begin;  // of each tile, in elements; -1: not active
    int64_t total = 0;
    int threads = 1;
    Shares(const Tile *tiles, int64_t count, const uint8_t *active, bool with_rest, int most) : begin(count, -1) {
        for (int64_t i = 0; i < count; i++) {
            if (tiles[i].matrix < 0 ? !with_rest : !active[tiles[i].matrix]) continue;
            begin[i] = total;
            total += tiles[i].rows * tiles[i].cols;
        }
        constexpr int64_t LEAST = 1 << 14;  // elements that are worth a thread
        threads = int(std::max<int64_t>(1, std::min<int64_t>(most, total / LEAST)));
    }
    int64_t edge(int64_t thread) const { return total / threads * thread + std::min(thread, total % threads); }
    int64_t first_row(const Tile &tile, int64_t i, int64_t edge) const {
        if (edge <= begin[i]) return 0;
        return std::min(tile.rows, (edge - begin[i] + tile.cols - 1) / tile.cols);
    }
};

// Runs work(tile, row, stop, thread) on every share's rows of each active tile, in the order of the table.
template <typename Work>
void share(const Tile *tiles, int64_t count, const Shares &shares, const Work &work) {
#pragma omp parallel for num_threads(shares.threads) schedule(static, 1)
    for (int thread = 0; thread < shares.threads; thread++) {
        const int64_t low = shares.edge(thread), high = shares.edge(thread + 1);
        for (int64_t i = 0; i < count; i++) {
            if (shares.begin[i] < 0) continue;
            const int64_t row = shares.first_row(tiles[i], i, low), stop = shares.first_row(tiles[i], i, high);
            if (row < stop) work(tiles[i], row, stop, thread);
        }
    }
}

// Sums per matrix in double, of each thread, then of all in their order.
struct Sums {
    int64_t matrices;
    std::vector<double> parts;
    Sums(int64_t matrices_, int threads) : matrices(matrices_), parts(3 * matrices_ * threads) {}
    double *of(const Tile &tile, int thread) { return &parts[3 * (thread * matrices + tile.matrix)]; }
    void add_to(double *sums) const {
        for (size_t i = 0; i < parts.size(); i++) sums[i % (3 * matrices)] += parts[i];
    }
};

// Where the threads add Z and YᵀY. A thread's rows lie one after the other in the table, whose tiles are in the order
// of their matrices: all but the first and the last of its matrices are its own.
struct Targets {
    struct Slot {
        int64_t matrix = -1;
        Tile tile;
        Room z;
        double gram[MOST * MOST] = {};
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
            std::fill(gram, gram + MOST * MOST, 0.0);
            sum = gram;
            target.z = targets.arena.z;
        } else {
            Targets::Slot &slot = targets.slots[2 * thread + (targets.slots[2 * thread].matrix >= 0)];
            slot.matrix = matrix, slot.tile = next;
            slot.z.resize(next.width * next.n);
            sum = slot.gram;
            target.z = slot.z.at - (next.gram - next.width * next.n);  // so that offsets of the arena fit both
        }
    }
    void flush() {
        if (matrix >= 0 && is_own)
            for (int64_t i = 0; i < tile.width * tile.width; i++) targets.arena.z[tile.gram + i] += float(sum[i]);
        matrix = -1;
    }
};

// Which matrices lie whole in one thread's share.
std::vector<int64_t> extents(const Tile *tiles, int64_t count, const Shares &shares, int64_t matrices) {
    std::vector<int64_t> ends(2 * matrices, -1);
    for (int64_t i = 0; i < count; i++) {
        const int64_t k = tiles[i].matrix;
        if (k < 0 || shares.begin[i] < 0) continue;
        if (ends[2 * k] < 0) ends[2 * k] = shares.begin[i];
        ends[2 * k + 1] = shares.begin[i] + tiles[i].rows * tiles[i].cols;
    }
    return ends;
}

// The products of all active tiles with W or U; with MOMENTS, U is that of moments updated in the same pass.
template <Source source>
void multiply(bool is_back, const Tile *tiles, int64_t count, const uint8_t *active, int64_t matrices,
              const Buffer *buffers, const Hyper *hypers, const Arena &arena, double *sums, int threads) {
    const Shares shares(tiles, count, active, false, threads);
    if (!shares.total) return;
    const std::vector<int64_t> ends = extents(tiles, count, shares, matrices);
    Targets targets(arena, shares.threads);
    Sums partial(source == MOMENTS ? matrices : 0, shares.threads);
    int64_t widest = 0;
    for (int64_t i = 0; i < count; i++)
        if (shares.begin[i] >= 0) widest = std::max(widest, (tiles[i].cols + 15) / 16 * 16);
#pragma omp parallel for num_threads(shares.threads) schedule(static, 1)
    for (int thread = 0; thread < shares.threads; thread++) {
        Room room;
        room.resize(source == WEIGHTS ? 0 : ROWS * widest);
        Adding adding(targets, thread);
        const int64_t low = shares.edge(thread), high = shares.edge(thread + 1);
        for (int64_t i = 0; i < count; i++) {
            const Tile &tile = tiles[i];
            if (shares.begin[i] < 0) continue;
            const int64_t start = shares.first_row(tile, i, low), stop = shares.first_row(tile, i, high);
            const Buffer &buffer = buffers[tile.buffer];
            if (start >= stop || (source != WEIGHTS && !buffer.exp_avg)) continue;
            if (tile.width)
                adding.turn_to(tile, ends[2 * tile.matrix] >= low && ends[2 * tile.matrix + 1] <= high);
            for (int64_t done = 0; done < stop - start; done += ROWS) {
                const int rows = int(std::min<int64_t>(ROWS, stop - start - done));
                // U is formed again from the end on: what the pass before read last may still be in the cache.
                const bool is_backwards = source == UPDATES;
                const int64_t row = is_backwards ? stop - done - rows : start + done;
                const bool is_there = done + 3 * ROWS <= stop - start;
                const int64_t ahead = !is_there ? 0 : (is_backwards ? -2 : 2) * ROWS * tile.stride;
                Row each[ROWS];
                for (int r = 0; r < rows; r++) {
                    const int64_t at = tile.offset + (row + r) * tile.stride;
                    each[r] = {buffer.weight + at, buffer.grad + at, buffer.exp_avg + at, buffer.exp_avg_sq + at,
                               room.at + r * widest};
                }
                const float squares = multiply_rows<source>(is_back, tile, row, rows, hypers[tile.buffer], each, arena,
                                                            adding.target, adding.sum, ahead);
                if (source == MOMENTS && tile.width) partial.of(tile, thread)[0] += squares;
            }
        }
    }
    targets.add_all();
    if (source == MOMENTS) partial.add_to(sums);
}

// Runs f(offset, count) on the runs of a tile's rows that are contiguous in memory, short enough for float sums.
template <typename F>
void runs(const Tile &tile, int64_t row, int64_t stop, const F &f) {
    constexpr int64_t LONGEST = 4096;
    const bool is_dense = tile.stride == tile.cols;
    const int64_t length = is_dense ? (stop - row) * tile.cols : tile.cols;
    for (int64_t r = row; r < stop; r += is_dense ? stop - row : 1)
        for (int64_t c = 0; c < length; c += LONGEST)
            f(tile.offset + r * tile.stride + c, std::min(LONGEST, length - c));
}

// The eigenvalues and vectors of a symmetric matrix of b rows, by Jacobi's rotations; a is destroyed, v gets them as
// columns.
void eigen(int b, double *a, double *v) {
    for (int i = 0; i < b; i++)
        for (int j = 0; j < b; j++) v[i * b + j] = i == j;
    for (int sweep = 0; sweep < 30; sweep++) {
        double off = 0, on = 0;
        for (int i = 0; i < b; i++)
            for (int j = 0; j < b; j++) (i == j ? on : off) += a[i * b + j] * a[i * b + j];
        if (off <= 1e-32 * on) return;
        for (int p = 0; p < b; p++)
            for (int q = p + 1; q < b; q++) {
                if (a[p * b + q] == 0) continue;
                const double theta = (a[q * b + q] - a[p * b + p]) / (2 * a[p * b + q]);
                const double t = (theta >= 0 ? 1 : -1) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
                const double c = 1 / std::sqrt(t * t + 1), s = t * c;
                for (int k = 0; k < b; k++) {
                    const double x = a[k * b + p], y = a[k * b + q];
                    a[k * b + p] = c * x - s * y, a[k * b + q] = s * x + c * y;
                }
                for (int k = 0; k < b; k++) {
                    const double x = a[p * b + k], y = a[q * b + k];
                    a[p * b + k] = c * x - s * y, a[q * b + k] = s * x + c * y;
                }
                for (int k = 0; k < b; k++) {
                    const double x = v[k * b + p], y = v[k * b + q];
                    v[k * b + p] = c * x - s * y, v[k * b + q] = s * x + c * y;
                }
            }
    }
}

// spectral/ritz.py: largest_ratio. The first argument is destroyed.
double largest_ratio(int b, double *gram_y, const double *gram_z, double independent) {
    double scale[MOST], vectors[MOST * MOST], basis[MOST][MOST], inner[MOST * MOST], unused[MOST * MOST];
    for (int i = 0; i < b * b; i++)
        if (!std::isfinite(gram_y[i]) || !std::isfinite(gram_z[i])) return NAN;
    for (int i = 0; i < b; i++) scale[i] = gram_y[i * b + i] > 0 ? 1 / std::sqrt(gram_y[i * b + i]) : 0;
    for (int i = 0; i < b; i++)
        for (int j = 0; j < b; j++) gram_y[i * b + j] *= scale[i] * scale[j];
    eigen(b, gram_y, vectors);
    int kept = 0;
    for (int k = 0; k < b; k++) {
        const double value = gram_y[k * b + k];
        if (!(value > independent)) continue;
        for (int i = 0; i < b; i++) basis[kept][i] = scale[i] * vectors[i * b + k] / std::sqrt(value);
        kept++;
    }
    if (!kept) return 0;
    for (int p = 0; p < kept; p++)
        for (int q = 0; q < kept; q++) {
            double total = 0;
            for (int i = 0; i < b; i++)
                for (int j = 0; j < b; j++) total += basis[p][i] * gram_z[i * b + j] * basis[q][j];
            inner[p * kept + q] = total;
        }
    eigen(kept, inner, unused);
    double largest = 0;
    for (int p = 0; p < kept; p++) largest = std::max(largest, inner[p * kept + p]);
    return std::sqrt(largest);
}

double dot(const float *a, const float *b, int64_t n) {
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < n; c++) total += double(a[c]) * b[c];
    return total;
}

// Zᵀ Z of b vectors of length n, symmetric.
void gram_of(int b, const float *z, int64_t n, double *gram) {
    constexpr int64_t PART = 512;  // columns that are summed in float32
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < b * n; i++) largest = std::max(largest, std::fabs(z[i]));
    // Squares of float32 numbers need not be float32 numbers, nor inverses of the smallest.
    const float scale = largest > 1e-38f ? 1 / largest : 0;
    std::fill(gram, gram + b * b, 0.0);
    for (int64_t c = 0; c < n; c += PART) {
        const int64_t count = std::min(PART, n - c);
        for (int i = 0; i < b; i++)
            for (int j = 0; j <= i; j++) {
                const float *p = z + i * n + c, *q = z + j * n + c;
                float part = 0;
#pragma omp simd reduction(+ : part)
                for (int64_t k = 0; k < count; k++) part += (p[k] * scale) * (q[k] * scale);
                gram[i * b + j] += part;
            }
    }
    for (int i = 0; i < b; i++)
        for (int j = 0; j <= i; j++) gram[j * b + i] = gram[i * b + j] *= double(largest) * largest;
}

// X = L⁻¹ Z where Zᵀ Z = L Lᵀ; false where the vectors are too close to parallel for that.
bool by_cholesky(int b, int64_t n, const float *z, float *x, const double *gram) {
    constexpr double FAR_FROM_PARALLEL = 1e-2;
    double lower[MOST][MOST] = {}, inverse[MOST][MOST] = {};
    for (int i = 0; i < b; i++) {
        for (int j = 0; j <= i; j++) {
            double rest = gram[i * b + j];
            for (int k = 0; k < j; k++) rest -= lower[i][k] * lower[j][k];
            if (i == j) {
                if (!(rest > FAR_FROM_PARALLEL * gram[i * b + i])) return false;
                lower[i][i] = std::sqrt(rest);
            } else {
                lower[i][j] = rest / lower[j][j];
            }
        }
        inverse[i][i] = 1 / lower[i][i];
        for (int j = 0; j < i; j++) {
            double total = 0;
            for (int k = j; k < i; k++) total += lower[i][k] * inverse[k][j];
            inverse[i][j] = -total / lower[i][i];
        }
    }
    for (int i = 0; i < b; i++) {
        float factors[MOST];
        for (int j = 0; j <= i; j++) factors[j] = float(inverse[i][j]);
        float *to = x + i * n;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            float total = 0;
            for (int j = 0; j <= i; j++) total += factors[j] * z[j * n + c];
            to[c] = total;
        }
    }
    return true;
}

double length_of(const float *a, int64_t n) { return std::sqrt(dot(a, a, n)); }

// spectral/ritz.py: gain.
double gain_of(int b, int64_t n, const double *gram_y, const float *x, double sigma) {
    double work[MOST * MOST], unused[MOST * MOST], largest = 0;
    const double length = length_of(x, n);
    if (!(sigma > 0) || !std::isfinite(sigma) || !(length > 0.5 && length < 2)) return INFINITY;
    std::copy(gram_y, gram_y + b * b, work);
    eigen(b, work, unused);
    for (int i = 0; i < b; i++) largest = std::max(largest, work[i * b + i]);
    return 1 - std::sqrt(largest) / (length * sigma);
}

// Gram and Schmidt's way, each vector projected twice; those with nothing new in them are the old ones. z is overwritten.
void by_projection(int b, int64_t n, float *z, float *x, double scale) {
    constexpr double NEW = 1e-5;
    for (int j = 0; j < b; j++) {
        float *v = z + j * n;
        for (int attempt = 0; attempt < 2; attempt++) {
            const double before = length_of(v, n);
            if (before > 0)  // or its squares vanish
                for (int64_t c = 0; c < n; c++) v[c] = float(v[c] / before);
            for (int pass = 0; pass < 2; pass++)
                for (int i = 0; i < j; i++) {
                    const double part = dot(z + i * n, v, n);
                    for (int64_t c = 0; c < n; c++) v[c] = float(v[c] - part * z[i * n + c]);
                }
            const double after = length_of(v, n);
            if (before > 0 && after > NEW) {
                for (int64_t c = 0; c < n; c++) v[c] = float(v[c] / after);
                break;
            }
            std::memcpy(v, x + j * n, n * sizeof(float));
        }
    }
    for (int64_t i = 0; i < b * n; i++) x[i] = float(z[i] * scale);
}

// spectral/ritz.py: next_block.
void next_block(int b, int64_t n, float *z, float *x, const double *gram, double sigma, bool more) {
    constexpr double LONG = 1e28;
    if (!(sigma > 0) || !std::isfinite(sigma)) {
        const double length = length_of(x, n);
        const bool is_one = length > 0.5 && length < 2;
        const double factor = (!more || !is_one ? 1 : sigma == 0 ? LONG : 1 / LONG) / length;
        for (int64_t i = 0; i < b * n; i++) x[i] = float(x[i] * factor);
        return;
    }
    const double scale = sigma > 1e-9 && sigma < 1e9 ? 1 : std::min(1 / sigma, 1e38);
    if (scale != 1 || !by_cholesky(b, n, z, x, gram)) by_projection(b, n, z, x, scale);
}

// The next block, σ₁ of a matrix, and what the iteration gained.
void orthonormalize(const Shape &shape, float *x, float *z, double independent, bool more, double &sigma, double &gain) {
    const int b = int(shape.width);
    double gram_y[MOST * MOST], scaled_y[MOST * MOST], gram_z[MOST * MOST];
    for (int p = 0; p < b * b; p++) scaled_y[p] = gram_y[p] = z[shape.gram + p];
    gram_of(b, z + shape.z, shape.n, gram_z);
    sigma = largest_ratio(b, scaled_y, gram_z, independent);
    gain = gain_of(b, shape.n, gram_y, x + shape.x, sigma);
    next_block(b, shape.n, z + shape.z, x + shape.x, gram_z, sigma, more);
}

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
    if (operand.is_wide) std::memcpy(operand.block, operand.kept, operand.length * sizeof(float));
    else
        for (int64_t i = 0; i < operand.length; i++)
            operand.block[i] = from_bfloat16(static_cast<const uint16_t *>(operand.kept)[i]);
}

void keep(const Operand &operand) {
    if (operand.is_wide) std::memcpy(operand.kept, operand.block, operand.length * sizeof(float));
    else
        for (int64_t i = 0; i < operand.length; i++)
            static_cast<uint16_t *>(operand.kept)[i] = to_bfloat16(operand.block[i]);
}

// What PowerIteration.measure does, for a batch of matrices that no other rank has pieces of. At most need[k] and at least
// least[k] iterations are made for matrix k's weights, [matrices + k] for its update; of those in `waiting` the moments
// are updated, too.
void measure(const Batch *batch, const int64_t *need, const int64_t *least, const uint8_t *waiting, int64_t matrices,
             const Buffer *buffers, const Hyper *hypers, double *sums, double independent, double settled, int threads) {
    const Arena arena{batch->x, batch->z, batch->left};
    for (const Operand &operand : batch->operands)
        load(operand);
    std::vector<uint8_t> masks[2], more[2], rest[2];
    int64_t most = 0;
    for (int o = 0; o < 2; o++) {
        masks[o].resize(matrices), more[o].resize(matrices), rest[o].resize(matrices);
        for (int64_t i = 0; i < batch->count; i++) most = std::max(most, need[o * matrices + batch->members[i]]);
    }
    for (int64_t iteration = 0; iteration < most; iteration++) {
        for (int64_t i = 0; i < batch->count; i++) {
            const int64_t k = batch->members[i];
            for (int o = 0; o < 2; o++) {
                const int64_t needed = need[o * matrices + k];
                const bool is_sure = least[o * matrices + k] > iteration;
                masks[o][k] = needed > iteration && (is_sure || !(batch->operands[o].gain[k] <= settled));
                more[o][k] = needed > iteration + 1;
                rest[o][k] = masks[o][k] && !(o == 1 && iteration == 0 && waiting[k]);
            }
        }
        std::fill(batch->z, batch->z + batch->z_size, 0.f);
        std::fill(batch->left, batch->left + batch->left_size, 0.f);
        if (iteration == 0)
            multiply<MOMENTS>(false, batch->tiles, batch->tile_count, waiting, matrices, buffers, hypers, arena, sums,
                              threads);
        for (int o = 1; o >= 0; o--) {
            const Operand &operand = batch->operands[o];
            const auto product = o ? multiply<UPDATES> : multiply<WEIGHTS>;
            const uint8_t *active = rest[o].data(), *all = masks[o].data();
            const auto run = [&](bool is_back, const Tile *tiles, int64_t count, const uint8_t *chosen) {
                product(is_back, tiles, count, chosen, matrices, buffers, hypers, arena, nullptr, threads);
            };
            run(false, operand.cut, operand.cut_count, active);
            run(false, operand.whole, operand.whole_count, active);
            run(true, operand.cut, operand.cut_count, all);
        }
#pragma omp parallel for num_threads(int(std::min<int64_t>(threads, 2 * batch->count))) schedule(static, 1)
        for (int64_t i = 0; i < 2 * batch->count; i++) {  // each matrix of each operand is one thread's
            const int64_t k = batch->members[i / 2], o = i % 2;
            const Operand &operand = batch->operands[o];
            if (masks[o][k])
                orthonormalize(operand.shapes[k], batch->x, batch->z, independent, more[o][k], operand.sigma[k],
                               operand.gain[k]);
        }
    }
    for (const Operand &operand : batch->operands)
        keep(operand);
}

}  // namespace

extern "C" {

// M and V of the active matrices, Σ u² and the first products with U.
void weyl_moments(const Tile *tiles, int64_t count, const uint8_t *multiplied, int64_t matrices, const Buffer *buffers,
                  const Hyper *hypers, const float *x, float *z, float *left, double *sums, int threads) {
    const Arena arena{x, z, left};
    multiply<MOMENTS>(false, tiles, count, multiplied, matrices, buffers, hypers, arena, sums, threads);
}

// The whole step of the matrices in `moved` and of what is no matrix, at the scheduled rate.
void weyl_step(const Tile *tiles, int64_t count, const uint8_t *moved, int64_t matrices, const Buffer *buffers,
               const Hyper *hypers, double *sums, int threads) {
    const Shares shares(tiles, count, moved, true, threads);
    Sums partial(matrices, shares.threads);
    share(tiles, count, shares, [&](const Tile &tile, int64_t row, int64_t stop, int thread) {
        const Buffer &buffer = buffers[tile.buffer];
        const Hyper &hyper = hypers[tile.buffer];
        if (!buffer.exp_avg) return;
        // -α U is what was summed, so that no second quotient is needed.
        const double rate = double(hyper.step_size) * hyper.correction1, factor = rate == 0 ? 0 : 1 / rate;
        runs(tile, row, stop, [&](int64_t at, int64_t length) {
            const Squares squares = step_run(hyper, buffer.weight + at, buffer.grad + at, buffer.exp_avg + at,
                                             buffer.exp_avg_sq + at, length);
            if (!tile.width) return;
            double *mine = partial.of(tile, thread);
            mine[0] += squares.moved * factor * factor;
            mine[1] += squares.before;
            mine[2] += squares.after;
        });
    });
    partial.add_to(sums);
}

void weyl_undo(const Tile *tiles, int64_t count, const uint8_t *undone, const Buffer *buffers, const Hyper *hypers,
               int threads) {
    const Shares shares(tiles, count, undone, false, threads);
    share(tiles, count, shares, [&](const Tile &tile, int64_t row, int64_t stop, int) {
        const Buffer &buffer = buffers[tile.buffer];
        if (!buffer.exp_avg) return;
        runs(tile, row, stop, [&](int64_t at, int64_t length) {
            undo_run(hypers[tile.buffer], buffer.weight + at, buffer.exp_avg + at, buffer.exp_avg_sq + at, length);
        });
    });
}

void weyl_move(const Tile *tiles, int64_t count, const uint8_t *moved, int64_t matrices, const Buffer *buffers,
               const Hyper *hypers, const double *rates, double *sums, int threads) {
    const Shares shares(tiles, count, moved, false, threads);
    Sums partial(matrices, shares.threads);
    share(tiles, count, shares, [&](const Tile &tile, int64_t row, int64_t stop, int thread) {
        const Buffer &buffer = buffers[tile.buffer];
        const Hyper &hyper = hypers[tile.buffer];
        if (!buffer.exp_avg) return;
        const double rate = rates[tile.matrix];
        const float decay = float(1 - rate * hyper.weight_decay), step_size = float(-(rate / hyper.correction1));
        runs(tile, row, stop, [&](int64_t at, int64_t length) {
            const float after = move_run(hyper, decay, step_size, buffer.weight + at, buffer.exp_avg + at,
                                         buffer.exp_avg_sq + at, length);
            if (tile.width) partial.of(tile, thread)[2] += after;
        });
    });
    partial.add_to(sums);
}

void weyl_multiply(int operand, int is_back, const Tile *tiles, int64_t count, const uint8_t *active, int64_t matrices,
                   const Buffer *buffers, const Hyper *hypers, const float *x, float *z, float *left, int threads) {
    const Arena arena{x, z, left};
    const auto function = operand ? multiply<UPDATES> : multiply<WEIGHTS>;
    function(is_back != 0, tiles, count, active, matrices, buffers, hypers, arena, nullptr, threads);
}

void weyl_orthonormalize(const Shape *shapes, const int64_t *batch, int64_t count, const uint8_t *mask,
                         const uint8_t *more, float *x, float *z, double *sigma, double *gain, double independent,
                         int threads) {
#pragma omp parallel for num_threads(int(std::min<int64_t>(threads, std::max<int64_t>(1, count)))) schedule(static, 1)
    for (int64_t i = 0; i < count; i++) {
        const int64_t k = batch[i];
        if (mask[k]) orthonormalize(shapes[k], x, z, independent, more[k], sigma[k], gain[k]);
    }
}

// Lines 3 to 14 of the algorithm for batches that no other rank has pieces of, each while its numbers are in the cache.
void weyl_step_alone(const Batch *const *batches, int64_t count, const int64_t *need, const int64_t *least,
                     const uint8_t *active, const uint8_t *waiting, int64_t matrices, const Buffer *buffers, const Hyper *hypers,
                     const double *lr, const double *tau, const double *floor, double *rates, double *sums,
                     double independent, double settled, int threads) {
    for (int64_t i = 0; i < count; i++) {
        const Batch *batch = batches[i];
        measure(batch, need, least, waiting, matrices, buffers, hypers, sums, independent, settled, threads);
        for (int64_t m = 0; m < batch->count; m++) {
            const int64_t k = batch->members[m];
            const double weight = std::fmax(batch->operands[0].sigma[k], floor[k]);  // not NaN, see walk.py: rates
            double update = batch->operands[1].sigma[k];
            if (!(update > 0)) update = std::sqrt(sums[3 * k]);
            const double bound = update == 0 || std::isinf(tau[k]) ? INFINITY : tau[k] * weight / update;
            rates[k] = std::isnan(bound) ? NAN : std::min(lr[k], bound);
        }
        weyl_move(batch->tiles, batch->tile_count, active, matrices, buffers, hypers, rates, sums, threads);
    }
}

}  // extern "C"
