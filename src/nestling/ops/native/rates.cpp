// Rates of all rows and heads.

#include "rates.h"

namespace {

using namespace rates;

template <class T>
void run(const int64_t* sizes, double max_erase, double floor, void* const* t, bool back) {
    Args<T> s{};
    int64_t* to[] = {&s.rows, &s.heads, &s.tokens, &s.layers, &s.kind, &s.online_only};
    for (int64_t* p : to) *p = *sizes++;
    s.max_erase = static_cast<T>(max_erase), s.floor = static_cast<T>(floor);
    auto next = [&t] { return static_cast<T*>(*t++); };
    s.eta = next(), s.alpha = next(), s.log_b = next();
    s.valid = static_cast<const uint8_t*>(*t++);
    s.eta_bias = next(), s.alpha_bias = next(), s.share = next(), s.hidden = next();
    const bool erases = s.kind == erase || (s.kind == online && !s.online_only);
    constexpr int most_layers = 32;
    T *out[2 * most_layers], *up[2 * most_layers];  // l of every layer, then e
    const int64_t count = s.layers * (erases ? 2 : 1);
    s.log_a = next();
    for (int64_t i = 0; i < count; i++) out[i] = next();
    s.lr = out, s.e = erases ? out + s.layers : nullptr;
    if (back) {
        s.d_log_a = next();
        for (int64_t i = 0; i < count; i++) up[i] = next();
        s.d_lr = const_cast<const T**>(up), s.d_e = s.d_lr + s.layers;
        T** found[] = {&s.d_eta, &s.d_alpha, &s.d_log_b, &s.d_eta_bias, &s.d_alpha_bias, &s.d_share, &s.d_hidden};
        for (T** p : found) *p = next();
    }
    for (int64_t row = 0; row < s.rows; row++)
        for (int64_t head = 0; head < s.heads; head++) back ? backward(s, row, head) : forward(s, row, head);
}

}  // namespace

extern "C" {
// Tensors: eta, alpha, log b, valid, the biases, share, hidden share; log a, l and e of every layer; for the backward
// pass their gradients, then those of what comes in (the sums over rows and tokens zeroed).
void nestling_rates(
    const int64_t* sizes, double max_erase, double floor, void* const* tensors, int is_double, int back
) {
    is_double ? run<double>(sizes, max_erase, floor, tensors, back) : run<float>(sizes, max_erase, floor, tensors, back);
}
}
