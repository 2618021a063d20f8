// x / sqrt(|x|^2 + eps^2) over a row, entries beyond `bound` counted as `bound` (nestling/ops/normalize.py).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

constexpr double unit_eps = 1e-6, unit_bound = 1e17;  // of nestling/ops/normalize.py

// Returns the factor.
template <class T>
T normalize_row(int64_t width, T eps, T bound, const T* in, T* out) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; j++) {
        const T v = std::min(std::max(in[j], -bound), bound);
        out[j] = v;
        sum += v * v;
    }
    const T r = 1 / std::sqrt(sum + eps * eps);
#pragma omp simd
    for (int64_t j = 0; j < width; j++) out[j] *= r;
    return r;
}

// With y = r x: dx = r (dy - y (y . dy)); 0 where x was cut.
template <class T>
void normalize_row_back(int64_t width, T bound, const T* in, const T* unit, T r, const T* up, T* out) {
    T along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t j = 0; j < width; j++) along += unit[j] * up[j];
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        const T d = r * (up[j] - unit[j] * along);
        out[j] = std::abs(in[j]) > bound ? T(0) : d;
    }
}
