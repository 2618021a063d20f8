// One chunk of the one rule on a CPU: the closed form of nestling/ops/chunk_rule.py, whose torch version is the
// specification. Every problem (row, head, memory) runs in the cache of one core from end to end, which is what it gains:
// the torch version moves every intermediate through memory and pays for a hundred small calls. Row-major. C tokens, K
// inputs, V outputs.

#include "chunk.h"
#include "chunk_backward.h"
#include "chunk_forward.h"

namespace {

template <class T>
void run(const int64_t* sizes, void* const* t, bool backward) {
    Args<T> s{};
    int64_t* to_sizes[] = {&s.problems, &s.memories, &s.C, &s.K, &s.V, &s.Q, &s.normalise, &s.before, &s.threads};
    for (int64_t* p : to_sizes) *p = *sizes++;
    const T** inputs[] = {&s.x, &s.g, &s.lr, &s.erase, &s.log_a, &s.log_b};
    for (const T** p : inputs) *p = static_cast<const T*>(*t++);
    s.valid = static_cast<const uint8_t*>(*t++);
    const T** carried[] = {&s.W, &s.S, &s.recalled, &s.q};
    for (const T** p : carried) *p = static_cast<const T*>(*t++);
    T** results[] = {&s.y, &s.W2, &s.S2, &s.E};
    for (T** p : results) *p = static_cast<T*>(*t++);
    if (backward) {
        const T** upstream[] = {&s.dy, &s.dW2, &s.dS2};
        for (const T** p : upstream) *p = static_cast<const T*>(*t++);
        T** found[] = {&s.dx, &s.dg, &s.dlr, &s.derase, &s.dlog_a, &s.dlog_b, &s.dW, &s.dS, &s.drecalled, &s.dq};
        for (T** p : found) *p = static_cast<T*>(*t++);
    }
    const size_t room = chunk_room(s.C, s.K, s.V);
#pragma omp parallel num_threads(s.threads) if (s.problems * s.memories > 1)
    {
        static thread_local Scratch<T> mem;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.problems * s.memories; i++) {
            mem.reset(room);
            if (backward) {
                Backward<T>(s, i, mem).run();
            } else {
                chunk_forward(s, i, mem);
            }
        }
    }
}

}  // namespace

extern "C" {
void nestling_chunk(const int64_t* sizes, void* const* tensors, int is_double, int backward) {
    is_double ? run<double>(sizes, tensors, backward) : run<float>(sizes, tensors, backward);
}
}
