// The rule with a retention for every channel of the key and an erase with keys of its own (nestling/ops/diagonal_rule.py),
// token after token: a row and head's weights stay in one core's cache, and no product of retentions is ever inverted.
// Backward, the weights after every token of a chunk are made again from those before the chunk.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arguments.h"
#include "exponential.h"
#include "scratch.h"
#include "vectors.h"

namespace {

// W = W (diag(a) - b c') + v k', y = W q. Without b nothing is erased; without c it is k. `starts` holds the weights
// before every chunk, cut at `bound`; u = W b of every token is kept.
template <class T>
struct DiagonalArguments {
    int64_t problems, tokens, size, K, V, threads;
    double bound;
    const T *k, *v, *q, *log_a, *b, *c, *weight;
    T *starts, *last, *y, *u;
    const T *dy, *d_last;
    T *dk, *dv, *dq, *dlog_a, *db, *dc, *d_weight;

    int64_t chunks() const { return (tokens + size - 1) / size; }
};

template <class T>
struct Problem {
    const DiagonalArguments<T>& s;
    int64_t i, n_weights;
    T* a;

    Problem(const DiagonalArguments<T>& s, int64_t i, T* a) : s(s), i(i), n_weights(s.V * s.K), a(a) {}

    int64_t at(int64_t t) const { return i * s.tokens + t; }
    T* start(int64_t n) const { return s.starts + (i * s.chunks() + n) * n_weights; }
    const T* erase_key(int64_t t) const { return (s.c ? s.c : s.k) + at(t) * s.K; }

    void retain(int64_t t) const {
        const T* log_a = s.log_a + at(t) * s.K;
#pragma omp simd
        for (int64_t j = 0; j < s.K; j++) a[j] = exponential(log_a[j]);
    }

    // The weights after token t, from those before it; they may be the same memory.
    void step(int64_t t, const T* before, T* after) const {
        retain(t);
        const T *k = s.k + at(t) * s.K, *v = s.v + at(t) * s.V;
        const T *b = s.b ? s.b + at(t) * s.K : nullptr, *c = erase_key(t);
        for (int64_t r = 0; r < s.V; r++) {
            const T *W = before + r * s.K, write = v[r];
            T* W2 = after + r * s.K;
            if (b) {
                const T u = dot(W, b, s.K);
                s.u[at(t) * s.V + r] = u;
#pragma omp simd
                for (int64_t j = 0; j < s.K; j++) W2[j] = a[j] * W[j] - u * c[j] + write * k[j];
            } else {
#pragma omp simd
                for (int64_t j = 0; j < s.K; j++) W2[j] = a[j] * W[j] + write * k[j];
            }
        }
    }

    void forward(T* W) const {
        const T bound = static_cast<T>(s.bound);
        std::copy_n(s.weight + i * n_weights, n_weights, W);
        for (int64_t t = 0; t < s.tokens; t++) {
            if (t % s.size == 0) {
                for (int64_t j = 0; j < n_weights; j++) W[j] = std::min(std::max(W[j], -bound), bound);
                std::copy_n(W, n_weights, start(t / s.size));
            }
            step(t, W, W);
            const T* q = s.q + at(t) * s.K;
            for (int64_t r = 0; r < s.V; r++) s.y[at(t) * s.V + r] = dot(W + r * s.K, q, s.K);
        }
        std::copy_n(W, n_weights, s.last + i * n_weights);
    }

    // G: the gradient of the weights after token t, and then of those before it.
    void back(int64_t t, const T* before, const T* after, T* G) const {
        retain(t);
        const int64_t row = at(t) * s.K;
        const T *k = s.k + row, *v = s.v + at(t) * s.V, *q = s.q + row;
        const T *b = s.b ? s.b + row : nullptr, *c = erase_key(t);
        T *dk = s.dk + row, *dq = s.dq + row, *da = s.dlog_a + row;
        T *db = b ? s.db + row : nullptr, *dc = b && s.c ? s.dc + row : dk;
        for (T* d : {dk, dq, da}) zero(d, s.K);
        if (b) zero(db, s.K);
        if (dc != dk) zero(dc, s.K);
        for (int64_t r = 0; r < s.V; r++) {
            const T *W = before + r * s.K, *W2 = after + r * s.K, up = s.dy ? s.dy[at(t) * s.V + r] : T(0), write = v[r];
            T* g = G + r * s.K;
            add_scaled(g, up, q, s.K);
            s.dv[at(t) * s.V + r] = dot(g, k, s.K);
#pragma omp simd
            for (int64_t j = 0; j < s.K; j++) {
                dq[j] += up * W2[j];
                dk[j] += write * g[j];
                da[j] += g[j] * W[j];
            }
            if (b) {
                const T u = s.u[at(t) * s.V + r], du = -dot(g, c, s.K);
                add_scaled(dc, -u, g, s.K);
                add_scaled(db, du, W, s.K);
#pragma omp simd
                for (int64_t j = 0; j < s.K; j++) g[j] = a[j] * g[j] + du * b[j];
            } else {
#pragma omp simd
                for (int64_t j = 0; j < s.K; j++) g[j] *= a[j];
            }
        }
#pragma omp simd
        for (int64_t j = 0; j < s.K; j++) da[j] *= a[j];
    }

    // `states`: room for the weights after every token of a chunk.
    void backward(T* states) const {
        const T bound = static_cast<T>(s.bound);
        T* G = s.d_weight + i * n_weights;
        if (s.d_last) std::copy_n(s.d_last + i * n_weights, n_weights, G);
        else zero(G, n_weights);
        for (int64_t n = s.chunks() - 1; n >= 0; n--) {
            const int64_t first = n * s.size, end = std::min(first + s.size, s.tokens);
            const T* before = start(n);
            auto weights = [&](int64_t t) { return t < first ? before : states + (t - first) * n_weights; };
            for (int64_t t = first; t < end; t++) step(t, weights(t - 1), states + (t - first) * n_weights);
            for (int64_t t = end - 1; t >= first; t--) back(t, weights(t - 1), weights(t), G);
            for (int64_t j = 0; j < n_weights; j++)
                if (std::abs(before[j]) >= bound) G[j] = 0;
        }
    }
};

template <class T>
void run(const DiagonalArguments<T>& s, bool back) {
    const int64_t weights = s.V * s.K * (back ? std::min(s.size, s.tokens) : 1);
#pragma omp parallel num_threads(s.threads) if (s.problems > 1)
    {
        static thread_local Scratch<T> mem;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.problems; i++) {
            mem.reset(weights + s.K + 32);
            T* room = mem.take(weights);
            const Problem<T> problem(s, i, mem.take(s.K));
            back ? problem.backward(room) : problem.forward(room);
        }
    }
}

}  // namespace

extern "C" void nestling_diagonal(const void* given, int is_double, int back) {
    is_double ? run(*static_cast<const DiagonalArguments<double>*>(given), back)
              : run(*static_cast<const DiagonalArguments<float>*>(given), back);
}
NESTLING_BYTES(DiagonalArguments)
