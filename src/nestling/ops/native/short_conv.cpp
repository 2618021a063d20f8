// A causal convolution of few taps, one filter a channel (nestling/ops/short_conv.py): y_t = sum_w weight_w seen_{t + w}.
// Threads take blocks of channels, so that the filters' gradients need no exchange.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "arguments.h"

namespace {

constexpr int64_t block = 32, span = 64;  // channels, and tokens that stay in the cache while all taps pass over them

template <class T>
struct ConvolutionArguments {
    int64_t rows, time, channels, taps, threads;  // rows of `seen` have time + taps - 1 tokens
    const T *seen, *weight;
    T* y;
    const T* dy;
    T *dseen, *dweight;

    // f(offset in `seen`, offset in y, tap, channels, the filter at the tap, its gradient)
    template <class F>
    void each(F f) const {
#pragma omp parallel for num_threads(threads) if (rows * time * channels > 32768)
        for (int64_t from = 0; from < channels; from += block) {
            const int64_t n = std::min(block, channels - from);
            std::vector<T> filter(taps * block), found(taps * block);
            for (int64_t w = 0; w < taps; w++)
                for (int64_t c = 0; c < n; c++) filter[w * block + c] = weight[(from + c) * taps + w];
            for (int64_t r = 0; r < rows; r++)
                for (int64_t first = 0; first < time; first += span)
                    for (int64_t w = 0; w < taps; w++)
                        for (int64_t t = first; t < std::min(first + span, time); t++)
                            f((r * (time + taps - 1) + t + w) * channels + from, (r * time + t) * channels + from, w, n,
                              &filter[w * block], &found[w * block]);
            if (dweight)
                for (int64_t w = 0; w < taps; w++)
                    for (int64_t c = 0; c < n; c++) dweight[(from + c) * taps + w] = found[w * block + c];
        }
    }

    void forward() const {
        each([this](int64_t under, int64_t at, int64_t w, int64_t n, const T* filter, T*) {
            const T* in = seen + under;
            T* out = y + at;
            if (!w) std::memset(out, 0, n * sizeof(T));
#pragma omp simd
            for (int64_t c = 0; c < n; c++) out[c] += filter[c] * in[c];
        });
    }

    void backward() const {
        std::memset(dseen, 0, rows * (time + taps - 1) * channels * sizeof(T));
        each([this](int64_t under, int64_t at, int64_t, int64_t n, const T* filter, T* found) {
            const T *in = seen + under, *up = dy + at;
            T* out = dseen + under;
#pragma omp simd
            for (int64_t c = 0; c < n; c++) {
                out[c] += filter[c] * up[c];
                found[c] += in[c] * up[c];
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
