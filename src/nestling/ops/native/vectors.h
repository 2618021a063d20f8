// Loops over contiguous numbers.
#pragma once

#include <cstdint>
#include <cstring>

template <class T>
T dot(const T* a, const T* b, int64_t n) {
    T s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}

template <class T>
void scaled(T* out, T c, const T* a, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = c * a[i];
}

template <class T>
void zero(T* out, int64_t n) {
    std::memset(out, 0, n * sizeof(T));
}

template <class T>
void add_scaled(T* out, T c, const T* a, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] += c * a[i];
}

template <class T>
void sum(T* out, const T* a, const T* b, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}
