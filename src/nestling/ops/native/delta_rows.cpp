// Rows of a momentum under the delta rule, one pass: m_r <- kept m_r - e_r (m_r . k_r) k_r + v_r.

#include <algorithm>
#include <limits>

#include "vectors.h"

namespace {

enum { nlms, bounded, literal };

template <class T>
void run(const int64_t* sizes, const double* constants, void* const* tensors) {
    const int64_t count = sizes[0], n = sizes[1], scale = sizes[2], threads = sizes[3];
    const T kept = static_cast<T>(constants[0]), delta = static_cast<T>(constants[1]);
    T* all = static_cast<T*>(tensors[0]);
    const T *keys = static_cast<T*>(tensors[1]), *values = static_cast<T*>(tensors[2]);
#pragma omp parallel for num_threads(threads) schedule(static) if (count * n > 1 << 15)
    for (int64_t r = 0; r < count; r++) {
        T* m = all + r * n;
        const T *k = keys + r * n, *v = values + r * n;
        const T square = dot(k, k, n);
        T e = delta;
        if (scale == nlms) e = square < std::numeric_limits<T>::min() ? T(0) : delta / square;
        if (scale == bounded) e = delta / std::max(square, T(1));
        const T erased = e * dot(m, k, n);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) m[i] = kept * m[i] + v[i] - erased * k[i];
    }
}

}  // namespace

extern "C" {
// Sizes: rows, width, scale, threads; constants: kept, delta; tensors: m, keys, values.
void nestling_delta_rows(const int64_t* sizes, const double* constants, void* const* tensors, int is_double) {
    is_double ? run<double>(sizes, constants, tensors) : run<float>(sizes, constants, tensors);
}
}
