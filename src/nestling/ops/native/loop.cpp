// All chunks of all rows and heads in one call: a row and head runs from its first token to its last on one core.

#include "loop_backward.h"
#include "loop_forward.h"

namespace {

template <class P>
void take(P* to, void* const*& t, int64_t count) {
    for (int64_t l = 0; l < count; l++) to[l] = static_cast<P>(*t++);
}

template <class T>
Loop<T> sized(const int64_t* sizes) {
    Loop<T> s{};
    int64_t* to[] = {&s.problems, &s.heads,  &s.tokens,       &s.chunk, &s.first, &s.K,     &s.hidden,
                     &s.layers,   &s.memories, &s.gates,      &s.activation, &s.self_targets, &s.dot, &s.fold,
                     &s.split,    &s.momentum, &s.before, &s.keep,  &s.kind,  &s.online_only, &s.threads};
    for (int64_t* p : to) *p = *sizes++;
    std::copy_n(sizes, all_roles, s.made);
    return s;
}

template <class T, int KIND>
void each(const Loop<T>& s, bool back) {
#pragma omp parallel num_threads(s.threads) if (s.problems > 1)
    {
        static thread_local Scratch<T> mem, held;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.problems; i++)
            back ? loop_backward<T, KIND>(s, i, mem, held) : loop_forward<T, KIND>(s, i, mem, held);
    }
}

template <class T>
int64_t room(const int64_t* sizes) {
    const Loop<T> s = sized<T>(sizes);
    return Kept<T>::room(s) * s.problems * Kept<T>::slots(s);
}

template <class T>
void run(const int64_t* sizes, const double* constants, void* const* t, bool back) {
    Loop<T> s = sized<T>(sizes);
    const int64_t L = s.layers;
    s.clip = static_cast<T>(constants[0]), s.max_erase = static_cast<T>(constants[1]);
    s.floor = static_cast<T>(constants[2]);
    take(&s.u, t, 1), take(s.given, t, all_roles), take(&s.log_b, t, 1);
    take(&s.eta_bias, t, 1), take(&s.alpha_bias, t, 1), take(&s.share, t, 1), take(&s.hidden_erase, t, 1);
    take(s.start, t, L), take(s.running, t, L), take(s.surprise, t, L);
    take(&s.y, t, 1), take(s.last, t, L), take(s.last_surprise, t, L), take(s.last_start, t, L), take(&s.kept, t, 1);
    if (back) {
        take(&s.dy, t, 1), take(s.d_last, t, L), take(s.d_last_surprise, t, L), take(s.d_last_start, t, L);
        take(&s.du, t, 1), take(s.d_given, t, all_roles), take(&s.d_log_b, t, 1), take(&s.d_eta_bias, t, 1);
        take(&s.d_alpha_bias, t, 1), take(&s.d_share, t, 1), take(&s.d_hidden, t, 1);
        take(s.d_start, t, L), take(s.d_running, t, L), take(s.d_surprise, t, L);
    }
    if (s.activation == 0) return each<T, 0>(s, back);
    if (s.activation == 1) return each<T, 1>(s, back);
    each<T, 2>(s, back);
}

}  // namespace

extern "C" {
// Numbers that a forward pass keeps.
int64_t nestling_loop_room(const int64_t* sizes, int is_double) {
    return is_double ? room<double>(sizes) : room<float>(sizes);
}

// Tensors in the order of Loop's fields; the gradients of sums over tokens zeroed.
void nestling_loop(const int64_t* sizes, const double* constants, void* const* tensors, int is_double, int back) {
    is_double ? run<double>(sizes, constants, tensors, back) : run<float>(sizes, constants, tensors, back);
}
}
