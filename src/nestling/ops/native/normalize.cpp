// Normalisation of many rows.

#include "normalize.h"

namespace {

template <class T>
void forward(int64_t rows, int64_t width, T eps, T bound, const T* x, T* y, T* scale, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
    for (int64_t i = 0; i < rows; i++) scale[i] = normalize_row(width, eps, bound, x + i * width, y + i * width);
}

template <class T>
void backward(
    int64_t rows, int64_t width, T bound, const T* x, const T* y, const T* scale, const T* dy, T* dx, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = i * width;
        normalize_row_back(width, bound, x + at, y + at, scale[i], dy + at, dx + at);
    }
}

template <class T>
void run(const int64_t* sizes, double eps, double bound, void* const* t, bool back) {
    const int64_t rows = sizes[0], width = sizes[1], threads = sizes[2];
    T* p[5];
    for (int i = 0; i < (back ? 5 : 3); i++) p[i] = static_cast<T*>(t[i]);
    const T e = static_cast<T>(eps), b = static_cast<T>(bound);
    back ? backward<T>(rows, width, b, p[0], p[1], p[2], p[3], p[4], threads)
         : forward<T>(rows, width, e, b, p[0], p[1], p[2], threads);
}

}  // namespace

extern "C" {
// Tensors: x, y, scale, and for the backward pass dy, dx.
void nestling_normalize(
    const int64_t* sizes, double eps, double bound, void* const* tensors, int is_double, int back
) {
    is_double ? run<double>(sizes, eps, bound, tensors, back) : run<float>(sizes, eps, bound, tensors, back);
}
}
