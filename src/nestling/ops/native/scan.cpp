// Chunk after chunk of a memory whose inputs, gradients and rates are known from the start (chunk_scan in
// nestling/ops/chunk_rule.py): every row and head runs through the whole sequence on one core, its weights in the cache.

#include "chunk_backward.h"
#include "chunk_forward.h"

namespace {

// The arguments of a whole sequence. `starts` holds the weights before every chunk.
template <class T>
struct ScanArguments {
    int64_t problems, tokens, size, K, V, before, threads;
    const T *x, *g, *lr, *erase, *log_a, *q;
    T *starts, *last, *y, *E;
    const T *dy, *d_last;
    T *dx, *dg, *dlr, *derase, *dlog_a, *dq, *d_weight;

    int64_t chunks() const { return (tokens + size - 1) / size; }

    // Chunk n of problem i as a problem of its own.
    ChunkArguments<T> chunk(int64_t i, int64_t n) const {
        ChunkArguments<T> a{};
        const int64_t at = i * tokens + n * size, left = tokens - n * size;
        a.problems = a.memories = a.threads = 1;
        a.C = left < size ? left : size, a.K = K, a.V = a.Q = V, a.before = before;
        a.x = x + at * K, a.g = g + at * V, a.q = q + at * K;
        a.lr = lr + at, a.erase = erase ? erase + at : nullptr, a.log_a = log_a + at;
        T* weights = starts + (i * chunks() + n) * V * K;
        a.W = weights, a.W2 = n + 1 < chunks() ? weights + V * K : last + i * V * K;
        a.y = y + at * V, a.kept = E + at * V;
        return a;
    }
};

template <class T>
void forward(const ScanArguments<T>& s, int64_t i, Scratch<T>& mem) {
    for (int64_t n = 0; n < s.chunks(); n++) {
        mem.reset(chunk_room(s.size, s.K, s.V));
        chunk_forward(s.chunk(i, n), 0, mem);
    }
}

template <class T>
void backward(const ScanArguments<T>& s, int64_t i, Scratch<T>& mem) {
    const int64_t n_weights = s.V * s.K;
    // The gradient of a chunk's first weights is the upstream gradient of the chunk before it.
    std::vector<T> carried(2 * n_weights);
    if (s.d_last) std::copy_n(s.d_last + i * n_weights, n_weights, carried.data());
    for (int64_t n = s.chunks() - 1; n >= 0; n--) {
        const int64_t at = i * s.tokens + n * s.size;
        ChunkArguments<T> a = s.chunk(i, n);
        T* incoming = carried.data() + ((s.chunks() - 1 - n) % 2) * n_weights;
        T* outgoing = carried.data() + ((s.chunks() - n) % 2) * n_weights;
        a.dy = s.dy ? s.dy + at * s.V : nullptr;
        a.dW2 = incoming;
        a.dW = n ? outgoing : s.d_weight + i * n_weights;
        a.dx = s.dx + at * s.K, a.dg = s.dg + at * s.V, a.dq = s.dq + at * s.K;
        a.dlr = s.dlr + at, a.derase = s.derase ? s.derase + at : nullptr, a.dlog_a = s.dlog_a + at;
        mem.reset(chunk_room(s.size, s.K, s.V));
        Backward<T>(a, 0, mem).run();
    }
}

template <class T>
void run(const ScanArguments<T>& s, bool back) {
#pragma omp parallel num_threads(s.threads) if (s.problems > 1)
    {
        static thread_local Scratch<T> mem;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.problems; i++) back ? backward(s, i, mem) : forward(s, i, mem);
    }
}

}  // namespace

extern "C" void nestling_scan(const void* given, int is_double, int back) {
    is_double ? run(*static_cast<const ScanArguments<double>*>(given), back)
              : run(*static_cast<const ScanArguments<float>*>(given), back);
}
NESTLING_BYTES(ScanArguments)
