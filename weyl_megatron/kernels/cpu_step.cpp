// The step of AdamW² on a CPU: every number is read once per pass, U is formed in registers and never stored.
//
// Plain C functions on addresses; cpu.py compiles this file on first use and calls it. A table has one row of Tile per
// tile. Threads take equal shares of its elements, always the same ones, and what two of them add to one matrix is
// added up in the order of the threads: a step's result depends on nothing but its input and the number of threads.
//
// Compiled without contraction of a*b+c: moments and moves are then torch's own arithmetic to the bit, wherever a row
// begins and ends. Where a fused multiply-add is meant, it is written.

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
    float scale2, correction, eps1;  // U = m / (√v · scale2 + eps1)
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
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256 vec;
constexpr int LANES = 8, ROWS = 2;
inline vec load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, vec a) { _mm256_storeu_ps(p, a); }
inline vec splat(float a) { return _mm256_set1_ps(a); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
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
#endif

// y[r][j] = Σ_c row_r[c] x_j[c]
template <int R, int B>
void forward(const float *const *rows, const float *x, int64_t n, int64_t cols, float (*y)[MOST]) {
    vec acc[R][B];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < B; j++) acc[r][j] = splat(0.f);
    int64_t c = 0;
    for (; c + LANES <= cols; c += LANES) {
        vec xs[B];
        for (int j = 0; j < B; j++) xs[j] = load(x + j * n + c);
        for (int r = 0; r < R; r++) {
            const vec w = load(rows[r] + c);
            for (int j = 0; j < B; j++) acc[r][j] = fma(w, xs[j], acc[r][j]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < B; j++) {
            float total = sum(acc[r][j]);
            for (int64_t k = c; k < cols; k++) total += rows[r][k] * x[j * n + k];
            y[r][j] = total;
        }
}

// z_j[c] += Σ_r y[r][j] row_r[c]
template <int R, int B>
void back(const float *const *rows, float *z, int64_t n, int64_t cols, const float (*y)[MOST]) {
    vec ys[R][B];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < B; j++) ys[r][j] = splat(y[r][j]);
    int64_t c = 0;
    for (; c + LANES <= cols; c += LANES) {
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

template <int R, int B>
void multiply_rows(const Tile &tile, int64_t row, const float *const *rows, const float *x, const Target &target,
                   float *left, double *gram) {
    float y[R][MOST];
    forward<R, B>(rows, x + tile.x, tile.n, tile.cols, y);
    if (tile.left >= 0) {
        for (int r = 0; r < R; r++)
            for (int j = 0; j < B; j++) {
                float &sum_ = left[tile.left + (row + r) * B + j];
#pragma omp atomic
                sum_ += y[r][j];  // a row of which this rank has two tiles
            }
        return;
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < B; i++)
            for (int j = 0; j < B; j++) gram[i * B + j] += double(y[r][i]) * y[r][j];
    back<R, B>(rows, target.z + tile.z, tile.n, tile.cols, y);
}

template <int R, int B>
void back_rows(const Tile &tile, int64_t row, const float *const *rows, const Target &target, const float *left,
               double *gram) {
    float y[R][MOST];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < B; j++) y[r][j] = left[tile.left + (row + r) * B + j];
    if (tile.counts)
        for (int r = 0; r < R; r++)
            for (int i = 0; i < B; i++)
                for (int j = 0; j < B; j++) gram[i * B + j] += double(y[r][i]) * y[r][j];
    back<R, B>(rows, target.z + tile.z, tile.n, tile.cols, y);
}

struct Arena {  // x, z and left of the wave that is measured
    const float *x;
    float *z, *left;
};

template <int B>
void products(bool is_back, const Tile &tile, int64_t row, int count, const float *const *rows, const Arena &arena,
              const Target &target, double *gram) {
    if (is_back) {
        if (count == ROWS) back_rows<ROWS, B>(tile, row, rows, target, arena.left, gram);
        else for (int r = 0; r < count; r++) back_rows<1, B>(tile, row + r, rows + r, target, arena.left, gram);
    } else {
        if (count == ROWS) multiply_rows<ROWS, B>(tile, row, rows, arena.x, target, arena.left, gram);
        else for (int r = 0; r < count; r++)
            multiply_rows<1, B>(tile, row + r, rows + r, arena.x, target, arena.left, gram);
    }
}

void products(bool is_back, const Tile &tile, int64_t row, int count, const float *const *rows, const Arena &arena,
              const Target &target, double *gram) {
    switch (tile.width) {
        case 1: products<1>(is_back, tile, row, count, rows, arena, target, gram); break;
        case 2: products<2>(is_back, tile, row, count, rows, arena, target, gram); break;
        case 3: products<3>(is_back, tile, row, count, rows, arena, target, gram); break;
        default: products<4>(is_back, tile, row, count, rows, arena, target, gram);
    }
}

// The arithmetic of torch.optim.AdamW, in its order.

inline void moments_of(const Hyper &h, float g, float &m, float &v) {
    m = __builtin_fmaf(h.lerp, g - m, m);
    v = __builtin_fmaf(h.one_minus_beta2 * g, g, v * h.beta2);
}

inline float denominator(const Hyper &h, float v) { return std::sqrt(v) / h.correction2_sqrt + h.eps; }

inline float direction(const Hyper &h, float m, float v) { return m / (std::sqrt(v) * h.scale2 + h.eps1); }

// M and V of a run; u gets U where it is not null; returns Σ u².
float moments_run(const Hyper &h, const float *__restrict g, float *__restrict m, float *__restrict v, int64_t count,
                  float *__restrict u) {
    float squares = 0;
    if (u)
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < count; c++) {
            float a = m[c], b = v[c];
            moments_of(h, g[c], a, b);
            m[c] = a, v[c] = b;
            u[c] = direction(h, a, b);
            squares += u[c] * u[c];
        }
    else
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < count; c++) {
            float a = m[c], b = v[c];
            moments_of(h, g[c], a, b);
            m[c] = a, v[c] = b;
            const float d = direction(h, a, b);
            squares += d * d;
        }
    return squares;
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

void direction_run(const Hyper &h, const float *__restrict m, const float *__restrict v, int64_t count,
                   float *__restrict u) {
#pragma omp simd
    for (int64_t c = 0; c < count; c++) u[c] = direction(h, m[c], v[c]);
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
        std::vector<float> z;
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
            for (int64_t i = 0; i < b * n; i++) z[i] += slot.z[i];
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
            slot.z.assign(next.width * next.n, 0.f);
            sum = slot.gram;
            target.z = slot.z.data() - (next.gram - next.width * next.n);  // so that offsets of the arena fit both
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

enum Source { WEIGHTS = 0, UPDATES = 1, MOMENTS = 2 };

// The products of all active tiles with W or U; with MOMENTS, U is that of moments updated in the same pass.
void multiply(Source source, bool is_back, const Tile *tiles, int64_t count, const uint8_t *active, int64_t matrices,
              const Buffer *buffers, const Hyper *hypers, const Arena &arena, double *sums, int threads) {
    const Shares shares(tiles, count, active, false, threads);
    if (!shares.total) return;
    const std::vector<int64_t> ends = extents(tiles, count, shares, matrices);
    Targets targets(arena, shares.threads);
    Sums partial(source == MOMENTS ? matrices : 0, shares.threads);
    int64_t widest = 0;
    for (int64_t i = 0; i < count; i++)
        if (shares.begin[i] >= 0) widest = std::max(widest, tiles[i].cols);
#pragma omp parallel for num_threads(shares.threads) schedule(static, 1)
    for (int thread = 0; thread < shares.threads; thread++) {
        std::vector<float> room(source == WEIGHTS ? 0 : ROWS * widest);
        Adding adding(targets, thread);
        const int64_t low = shares.edge(thread), high = shares.edge(thread + 1);
        for (int64_t i = 0; i < count; i++) {
            const Tile &tile = tiles[i];
            if (shares.begin[i] < 0) continue;
            const int64_t start = shares.first_row(tile, i, low), stop = shares.first_row(tile, i, high);
            const Buffer &buffer = buffers[tile.buffer];
            if (start >= stop || (source != WEIGHTS && !buffer.exp_avg)) continue;
            const Hyper &hyper = hypers[tile.buffer];
            if (tile.width)
                adding.turn_to(tile, ends[2 * tile.matrix] >= low && ends[2 * tile.matrix + 1] <= high);
            for (int64_t row = start; row < stop; row += ROWS) {
                const int rows = int(std::min<int64_t>(ROWS, stop - row));
                const float *each[ROWS];
                float squares = 0;
                for (int r = 0; r < rows; r++) {
                    const int64_t at = tile.offset + (row + r) * tile.stride;
                    float *u = room.data() + r * tile.cols;
                    if (source == WEIGHTS) {
                        each[r] = buffer.weight + at;
                    } else if (source == UPDATES) {
                        direction_run(hyper, buffer.exp_avg + at, buffer.exp_avg_sq + at, tile.cols, u);
                        each[r] = u;
                    } else {
                        squares += moments_run(hyper, buffer.grad + at, buffer.exp_avg + at, buffer.exp_avg_sq + at,
                                               tile.cols, u);
                        each[r] = u;
                    }
                }
                if (!tile.width) continue;
                if (source == MOMENTS) partial.of(tile, thread)[0] += squares;
                products(is_back, tile, row, rows, each, arena, adding.target, adding.sum);
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

// spectral/ritz.py: largest_ratio. Both arguments are destroyed.
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

// spectral/ritz.py: next_block, by Gram and Schmidt in the order of the vectors, each projected twice. z is overwritten.
void next_block(int b, int64_t n, float *z, float *x, double sigma, bool more) {
    constexpr double NEW = 1e-5, LONG = 1e28;
    if (!(sigma > 0) || !std::isfinite(sigma)) {
        const double length = std::sqrt(dot(x, x, n));
        const bool is_one = length > 0.5 && length < 2;
        const double factor = (!more || !is_one ? 1 : sigma == 0 ? LONG : 1 / LONG) / length;
        for (int64_t i = 0; i < b * n; i++) x[i] = float(x[i] * factor);
        return;
    }
    const double scale = sigma > 1e-9 && sigma < 1e9 ? 1 : 1 / sigma;
    for (int j = 0; j < b; j++) {
        float *v = z + j * n;
        for (int attempt = 0;; attempt++) {
            double before = std::sqrt(dot(v, v, n));
            if (before > 0)
                for (int64_t c = 0; c < n; c++) v[c] = float(v[c] / before);  // squares of what is small must not vanish
            for (int pass = 0; pass < 2; pass++)
                for (int i = 0; i < j; i++) {
                    const float part = float(-dot(z + i * n, v, n));
                    for (int64_t c = 0; c < n; c++) v[c] = __builtin_fmaf(part, z[i * n + c], v[c]);
                }
            const double after = std::sqrt(dot(v, v, n));
            if (after > NEW && before > 0) {
                for (int64_t c = 0; c < n; c++) v[c] = float(v[c] / after);
                break;
            }
            std::memcpy(v, x + j * n, n * sizeof(float));  // nothing new: the old vector
            if (attempt) break;
        }
    }
    for (int64_t i = 0; i < b * n; i++) x[i] = float(z[i] * scale);
}

}  // namespace

extern "C" {

// M and V of the active matrices, Σ u² and the first products with U.
void weyl_moments(const Tile *tiles, int64_t count, const uint8_t *multiplied, int64_t matrices, const Buffer *buffers,
                  const Hyper *hypers, const float *x, float *z, float *left, double *sums, int threads) {
    const Arena arena{x, z, left};
    multiply(MOMENTS, false, tiles, count, multiplied, matrices, buffers, hypers, arena, sums, threads);
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
    multiply(operand ? UPDATES : WEIGHTS, is_back != 0, tiles, count, active, matrices, buffers, hypers, arena, nullptr,
             threads);
}

// The next blocks and σ₁ of the chosen matrices. Each is one thread's.
void weyl_orthonormalize(const Shape *shapes, const int64_t *wave, int64_t count, const uint8_t *mask,
                         const uint8_t *more, float *x, float *z, double *sigma, double independent, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t i = 0; i < count; i++) {
        const int64_t k = wave[i];
        if (!mask[k]) continue;
        const Shape &shape = shapes[k];
        const int b = int(shape.width);
        double gram_y[MOST * MOST], gram_z[MOST * MOST];
        for (int p = 0; p < b; p++)
            for (int q = 0; q < b; q++) {
                gram_y[p * b + q] = z[shape.gram + p * b + q];
                gram_z[p * b + q] = dot(z + shape.z + p * shape.n, z + shape.z + q * shape.n, shape.n);
            }
        sigma[k] = largest_ratio(b, gram_y, gram_z, independent);
        next_block(b, shape.n, z + shape.z, x + shape.x, sigma[k], more[k]);
    }
}

}  // extern "C"
