// x / sqrt(|x|^2 + eps^2) over rows, entries beyond `bound` counted as `bound` (nestling/ops/normalize.py).

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

template <class T>
void forward(int64_t rows, int64_t width, T eps, T bound, const T* x, T* y, T* scale, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
    for (int64_t i = 0; i < rows; i++) {
        const T* in = x + i * width;
        T *out = y + i * width, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; j++) {
            const T v = std::min(std::max(in[j], -bound), bound);
            out[j] = v;
            sum += v * v;
        }
        const T r = 1 / std::sqrt(sum + eps * eps);
        scale[i] = r;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) out[j] *= r;
    }
}

// With y = r x: dx = r (dy - y (y . dy)); 0 where x was cut.
template <class T>
void backward(
    int64_t rows, int64_t width, T bound, const T* x, const T* y, const T* scale, const T* dy, T* dx, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
    for (int64_t i = 0; i < rows; i++) {
        const T *in = x + i * width, *unit = y + i * width, *up = dy + i * width, r = scale[i];
        T *out = dx + i * width, along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t j = 0; j < width; j++) along += unit[j] * up[j];
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            const T d = r * (up[j] - unit[j] * along);
            out[j] = std::abs(in[j]) > bound ? T(0) : d;
        }
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
