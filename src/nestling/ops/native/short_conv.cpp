// A causal convolution of few taps, one filter a channel (nestling/ops/short_conv.py): y_t = sum_w weight_w seen_{t + w}.
// Threads take blocks of channels, so that the filters' gradients need no exchange.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "arguments.h"

namespace {

constexpr int64_t block = 32;

template <class T>
struct ConvolutionArguments {
    int64_t rows, time, channels, taps, threads;  // rows of `seen` have time + taps - 1 tokens
    const T *seen, *weight;
    T* y;
    const T* dy;
    T *dseen, *dweight;

    template <class F>
    void each_block(F f) const {
#pragma omp parallel for num_threads(threads) if (rows * time * channels > 32768)
        for (int64_t from = 0; from < channels; from += block) {
            const int64_t n = std::min(block, channels - from);
            for (int64_t w = 0; w < taps; w++) {
                T filter[block], found[block] = {};
                for (int64_t c = 0; c < n; c++) filter[c] = weight[(from + c) * taps + w];
                for (int64_t r = 0; r < rows; r++) f(r, w, from, n, filter, found);
                if (dweight)
                    for (int64_t c = 0; c < n; c++) dweight[(from + c) * taps + w] = found[c];
            }
        }
    }

    void forward() const {
        each_block([this](int64_t r, int64_t w, int64_t from, int64_t n, const T* filter, T*) {
            for (int64_t t = 0; t < time; t++) {
                const T* in = seen + (r * (time + taps - 1) + t + w) * channels + from;
                T* out = y + (r * time + t) * channels + from;
                if (!w) std::memset(out, 0, n * sizeof(T));
#pragma omp simd
                for (int64_t c = 0; c < n; c++) out[c] += filter[c] * in[c];
            }
        });
    }

    void backward() const {
        std::memset(dseen, 0, rows * (time + taps - 1) * channels * sizeof(T));
        each_block([this](int64_t r, int64_t w, int64_t from, int64_t n, const T* filter, T* found) {
            for (int64_t t = 0; t < time; t++) {
                const int64_t at = (r * (time + taps - 1) + t + w) * channels + from;
                const T *in = seen + at, *up = dy + (r * time + t) * channels + from;
                T* out = dseen + at;
#pragma omp simd
                for (int64_t c = 0; c < n; c++) {
                    out[c] += filter[c] * up[c];
                    found[c] += in[c] * up[c];
                }
            }
        });
    }
};

template <class T>
void run(const ConvolutionArguments<T>& s, bool back) {
    back ? s.backward() : s.forward();
}

}  // namespace

extern "C" void nestling_short_conv(const void* given, int is_double, int back) {
    is_double ? run(*static_cast<const ConvolutionArguments<double>*>(given), back)
              : run(*static_cast<const ConvolutionArguments<float>*>(given), back);
}
NESTLING_BYTES(ConvolutionArguments)
