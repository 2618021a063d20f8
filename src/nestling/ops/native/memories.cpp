// Reads and inner gradients of a bank of MLP memories at the first weights of a chunk.

#include "memory_lesson.h"
#include "memory_read.h"

namespace {

// Takes pointers off the caller's list, one a layer from `from` on.
template <class P>
void take(P* to, void* const*& t, int64_t from, int64_t to_layer) {
    for (int64_t l = from; l < to_layer; l++) to[l] = static_cast<P>(*t++);
}

template <class T, int KIND>
void run(Bank<T> s, void* const* t, bool inner, bool backward) {
    const int64_t L = s.layers;
    Read<T> r{};
    Inner<T> p{};
    if (inner) {
        p.key = static_cast<const T*>(*t++), p.value = static_cast<const T*>(*t++);
        take(p.H, t, 1, L), take(p.recalled, t, 0, L), take(p.g, t, 0, L), take(p.zv, t, 0, L);
    } else {
        r.x = static_cast<const T*>(*t++), r.values = static_cast<T*>(*t++), r.gate_values = static_cast<T*>(*t++);
        take(r.z, t, 0, L);
    }
    if (backward && inner) {
        take(p.dH, t, 1, L), take(p.drecalled, t, 0, L), take(p.dg, t, 0, L);
        p.dkey = static_cast<T*>(*t++), p.dvalue = static_cast<T*>(*t++);
    } else if (backward) {
        r.dvalues = static_cast<const T*>(*t++), r.dgates = static_cast<const T*>(*t++), r.dx = static_cast<T*>(*t++);
    }
#pragma omp parallel num_threads(s.threads) if (s.problems > 1)
    {
        static thread_local Scratch<T> mem;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < s.problems; b++) {
            mem.reset(s.room());
            if (inner) {
                InnerOne<T, KIND>(s, p, b, mem).run(backward);
            } else {
                read_one<T, KIND>(s, r, b, mem, backward);
            }
        }
    }
}

template <class T>
void dispatch(const int64_t* sizes, double clip, void* const* t, bool inner, bool backward) {
    Bank<T> s{};
    int64_t* to_sizes[] = {&s.problems, &s.first, &s.memories,   &s.C,            &s.K,   &s.hidden,
                           &s.layers,   &s.gates, &s.activation, &s.self_targets, &s.dot, &s.threads};
    for (int64_t* p : to_sizes) *p = *sizes++;
    s.clip = static_cast<T>(clip);
    take(s.W, t, 0, s.layers);
    if (backward) take(s.dW, t, 0, s.layers);
    if (s.activation == 0) return run<T, 0>(s, t, inner, backward);
    if (s.activation == 1) return run<T, 1>(s, t, inner, backward);
    run<T, 2>(s, t, inner, backward);
}

}  // namespace

extern "C" {
// The tensors: weights; (backward) their gradients, zeroed; then the fields of Inner or Read in their order.
void nestling_memories(
    const int64_t* sizes, double clip, void* const* tensors, int is_double, int inner, int backward
) {
    is_double ? dispatch<double>(sizes, clip, tensors, inner, backward)
              : dispatch<float>(sizes, clip, tensors, inner, backward);
}
}
