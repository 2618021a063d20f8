// Rows of a momentum under the delta rule, one pass: m_r <- kept m_r - e_r (m_r . k_r) k_r + v_r.

#include <algorithm>
#include <limits>

#include "arguments.h"
#include "vectors.h"

namespace {

template <class T>
struct DeltaRowsArguments {
    int64_t rows, width, threads;
    double kept, delta;
    DeltaScale scale;
    T* m;
    const T *keys, *values;
};

template <class T>
void run(const DeltaRowsArguments<T>& s) {
    const int64_t n = s.width;
    const T kept = static_cast<T>(s.kept), delta = static_cast<T>(s.delta);
#pragma omp parallel for num_threads(s.threads) schedule(static) if (s.rows * n > 1 << 15)
    for (int64_t r = 0; r < s.rows; r++) {
        T* m = s.m + r * n;
        const T *k = s.keys + r * n, *v = s.values + r * n;
        const T square = dot(k, k, n);
        T e = delta;
        if (s.scale == DeltaScale::nlms) e = square < std::numeric_limits<T>::min() ? T(0) : delta / square;
        if (s.scale == DeltaScale::bounded) e = delta / std::max(square, T(1));
        const T erased = e * dot(m, k, n);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) m[i] = kept * m[i] + v[i] - erased * k[i];
    }
}

}  // namespace

extern "C" void nestling_delta_rows(const void* given, int is_double, int) {
    is_double ? run(*static_cast<const DeltaRowsArguments<double>*>(given))
              : run(*static_cast<const DeltaRowsArguments<float>*>(given));
}
NESTLING_BYTES(DeltaRowsArguments)
