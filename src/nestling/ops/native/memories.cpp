// Reads and inner gradients of a bank of MLP memories at the first weights of a chunk.

#include "memory_lesson.h"
#include "memory_read.h"

namespace {

template <class T, Activation KIND>
void one(const BankArguments<T>& s, const ReadArguments<T>& r, int64_t b, Scratch<T>& mem, bool back) {
    read_one<T, KIND>(s, r, b, mem, back);
}

template <class T, Activation KIND>
void one(const BankArguments<T>& s, const LessonArguments<T>& p, int64_t b, Scratch<T>& mem, bool back) {
    Lesson<T, KIND>(s, p, b, mem).run(back);
}

template <class T, Activation KIND, class Arguments>
void each(const BankArguments<T>& s, const Arguments& what, bool back) {
#pragma omp parallel num_threads(s.threads) if (s.problems > 1)
    {
        static thread_local Scratch<T> mem;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < s.problems; b++) {
            mem.reset(s.room());
            one<T, KIND>(s, what, b, mem, back);
        }
    }
}

template <class T, class Arguments>
void run(const void* bank, const void* given, bool back) {
    const auto& s = *static_cast<const BankArguments<T>*>(bank);
    const auto& what = *static_cast<const Arguments*>(given);
    switch (s.activation) {
        case Activation::silu: return each<T, Activation::silu>(s, what, back);
        case Activation::gelu: return each<T, Activation::gelu>(s, what, back);
        case Activation::relu: return each<T, Activation::relu>(s, what, back);
    }
}

}  // namespace

extern "C" void nestling_read(const void* bank, const void* given, int is_double, int back) {
    is_double ? run<double, ReadArguments<double>>(bank, given, back)
              : run<float, ReadArguments<float>>(bank, given, back);
}

extern "C" void nestling_lesson(const void* bank, const void* given, int is_double, int back) {
    is_double ? run<double, LessonArguments<double>>(bank, given, back)
              : run<float, LessonArguments<float>>(bank, given, back);
}
NESTLING_BYTES(BankArguments)
NESTLING_BYTES(ReadArguments)
NESTLING_BYTES(LessonArguments)
