// All chunks of all rows and heads in one call: a row and head runs from its first token to its last on one core.

#include "loop_backward.h"
#include "loop_forward.h"

namespace {

template <class T, Activation KIND>
void each(const LoopArguments<T>& s, bool back) {
#pragma omp parallel num_threads(s.threads) if (s.problems > 1)
    {
        static thread_local Scratch<T> mem, held;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.problems; i++)
            back ? loop_backward<T, KIND>(s, i, mem, held) : loop_forward<T, KIND>(s, i, mem, held);
    }
}

template <class T>
void run(const LoopArguments<T>& s, bool back) {
    switch (s.activation) {
        case Activation::silu: return each<T, Activation::silu>(s, back);
        case Activation::gelu: return each<T, Activation::gelu>(s, back);
        case Activation::relu: return each<T, Activation::relu>(s, back);
    }
}

template <class T>
int64_t room(const LoopArguments<T>& s) {
    return Kept<T>::room(s) * s.problems * Kept<T>::slots(s);
}

}  // namespace

extern "C" void nestling_loop(const void* given, int is_double, int back) {
    is_double ? run(*static_cast<const LoopArguments<double>*>(given), back)
              : run(*static_cast<const LoopArguments<float>*>(given), back);
}

// Numbers that a forward pass keeps; no tensor is read.
extern "C" int64_t nestling_loop_room(const void* given, int is_double) {
    return is_double ? room(*static_cast<const LoopArguments<double>*>(given))
                     : room(*static_cast<const LoopArguments<float>*>(given));
}
NESTLING_BYTES(LoopArguments)
