// Normalisation of many rows.

#include "normalize.h"

#include "arguments.h"

namespace {

template <class T>
struct NormalizeArguments {
    int64_t rows, width, threads;
    double eps, bound;
    const T* x;
    T *y, *scale;  // scale [rows]: the factors, kept for the backward pass
    const T* dy;
    T* dx;
};

template <class T>
void run(const NormalizeArguments<T>& s, bool back) {
    const T eps = static_cast<T>(s.eps), bound = static_cast<T>(s.bound);
#pragma omp parallel for num_threads(s.threads) if (s.rows * s.width > 32768)
    for (int64_t i = 0; i < s.rows; i++) {
        const int64_t at = i * s.width;
        if (back) {
            normalize_row_back<T>(s.width, bound, s.x + at, s.y + at, s.scale[i], s.dy + at, s.dx + at);
        } else {
            s.scale[i] = normalize_row<T>(s.width, eps, bound, s.x + at, s.y + at);
        }
    }
}

}  // namespace

extern "C" void nestling_normalize(const void* given, int is_double, int back) {
    is_double ? run(*static_cast<const NormalizeArguments<double>*>(given), back)
              : run(*static_cast<const NormalizeArguments<float>*>(given), back);
}
NESTLING_BYTES(NormalizeArguments)
