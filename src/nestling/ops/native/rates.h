// Rates of a chunk from the logits of its gates, and their gradients (nestling/layers/rates.py has the formulas).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arguments.h"

template <class T>
struct RatesArguments {
    int64_t rows, heads, tokens, layers, online_only;
    double max_erase, floor, stretch;
    RateKind kind;
    const T *eta, *alpha, *log_b;
    const uint8_t* valid;  // [rows, tokens]
    const T *eta_bias, *alpha_bias, *share, *hidden;
    T *log_a, *lr[most_layers], *e[most_layers];  // e is not read without erase
    const T *d_log_a, *d_lr[most_layers], *d_e[most_layers];
    T *d_eta, *d_alpha, *d_log_b, *d_eta_bias, *d_alpha_bias, *d_share, *d_hidden;  // sums over rows and tokens: zeroed

    T largest() const { return static_cast<T>(max_erase); }
    T stretched() const { return static_cast<T>(stretch); }
    T least() const { return static_cast<T>(floor); }
    bool online() const { return kind == RateKind::online || kind == RateKind::split; }
    bool erases() const {
        return kind == RateKind::erase || kind == RateKind::split || (kind == RateKind::online && !online_only);
    }
};

namespace rates {

template <class T>
T sigmoid(T x) {
    const T small = std::exp(-std::abs(x));
    return (x >= 0 ? T(1) : small) / (1 + small);
}

// What momentum multiplies l_t and e_t by, and the derivatives of both factors by log b_t.
template <class T>
struct Push {
    T step = 1, erase = 1, step_slope = 0, erase_slope = 0;

    Push(const RatesArguments<T>& s, int64_t at) {
        if (!s.log_b) return;
        const T b = std::exp(s.log_b[at]), left = -std::expm1(s.log_b[at]);
        if (!s.online()) {
            step = left, step_slope = -b;
            return;
        }
        const T bound = 1 + b * left;
        step = left * left / (1 + b), step_slope = -b * left * (3 + b) / ((1 + b) * (1 + b));
        erase = left * (1 + b) / bound, erase_slope = -b * (1 + b * b) / (bound * bound);
    }
};

// One token of one head: the values every formula shares.
template <class T>
struct Token {
    // base: e_t of the last layer; step: l_t before the share; both without momentum's part
    T open, eta, present, log_a, keep, full, left, base, step;
    const Push<T> push;

    Token(const RatesArguments<T>& s, int64_t row, int64_t head, int64_t t, int64_t at) : push(s, at) {
        open = sigmoid(s.eta[at] + s.eta_bias[head]);
        eta = std::clamp(s.stretched() * (open - T(0.5)) + T(0.5), T(0), T(1));
        present = !s.valid || s.valid[row * s.tokens + t] ? T(1) : T(0);
        log_a = 0;
        if (s.alpha) {
            const T z = s.alpha[at] + s.alpha_bias[head];
            log_a = (std::min(z, T(0)) - std::log1p(std::exp(-std::abs(z)))) / 16;
        }
        keep = s.alpha ? std::exp(log_a) : T(1);
        full = s.largest() * eta * present;
        left = -std::expm1(log_a);
        base = 0;
        const T last = s.share[(s.layers - 1) * s.heads + head];
        switch (s.kind) {
            case RateKind::online: base = full * keep / (s.online_only ? T(1) : 1 + last), step = base; break;
            case RateKind::erase: base = keep * full, step = keep * std::min(full, 2 - full); break;
            case RateKind::split: step = keep * full, base = step * (1 - last); break;
            case RateKind::free: step = eta * present * (s.alpha ? std::max(left, s.least()) : s.least()); break;
            default: step = eta * present;
        }
    }

    // What the layers before the last take a share of.
    T whole(RateKind kind) const { return (kind == RateKind::split ? step : base) * push.erase; }
    T rate() const { return step * push.step; }
};

template <class T>
void forward(const RatesArguments<T>& s, int64_t row, int64_t head) {
    for (int64_t t = 0; t < s.tokens; t++) {
        const int64_t at = (row * s.heads + head) * s.tokens + t;
        const Token<T> k(s, row, head, t, at);
        s.log_a[at] = k.log_a;
        for (int64_t l = 0; l < s.layers; l++) {
            const bool last = l == s.layers - 1;
            s.lr[l][at] = k.rate() * (last && s.kind == RateKind::online && s.online_only ? T(1) : s.share[l * s.heads + head]);
            if (s.erases()) s.e[l][at] = last ? k.base * k.push.erase : k.whole(s.kind) * s.hidden[l * s.heads + head];
        }
    }
}

template <class T>
void backward(const RatesArguments<T>& s, int64_t row, int64_t head) {
    for (int64_t t = 0; t < s.tokens; t++) {
        const int64_t at = (row * s.heads + head) * s.tokens + t;
        const Token<T> k(s, row, head, t, at);
        T d_rate = 0, d_base = 0, d_step = 0, d_full = 0, d_keep = 0, d_eta = 0;
        T d_log_a = s.d_log_a ? s.d_log_a[at] : T(0);
        for (int64_t l = 0; l < s.layers; l++) {
            const int64_t of = l * s.heads + head;
            const bool last = l == s.layers - 1, whole = last && s.kind == RateKind::online && s.online_only;
            if (s.d_lr[l]) {
                d_rate += s.d_lr[l][at] * (whole ? T(1) : s.share[of]);
                if (!whole) s.d_share[of] += s.d_lr[l][at] * k.rate();
            }
            if (!s.erases() || !s.d_e[l]) continue;
            (last || s.kind != RateKind::split ? d_base : d_step) += s.d_e[l][at] * (last ? T(1) : s.hidden[of]);
            if (!last) s.d_hidden[of] += s.d_e[l][at] * k.whole(s.kind);
        }
        if (s.log_b) {
            const T erased = d_base * k.base + d_step * k.step;
            s.d_log_b[at] = d_rate * k.step * k.push.step_slope + erased * k.push.erase_slope;
        }
        d_rate *= k.push.step, d_base *= k.push.erase, d_step *= k.push.erase;
        switch (s.kind) {
            case RateKind::online: {
                const int64_t of = (s.layers - 1) * s.heads + head;
                const T split = s.online_only ? T(1) : 1 + s.share[of], d = (d_base + d_rate) / split;
                if (!s.online_only) s.d_share[of] -= d * k.base;
                d_full = d * k.keep, d_keep = d * k.full;
                break;
            }
            case RateKind::erase: {
                const T least = std::min(k.full, 2 - k.full), slope = k.full < 1 ? T(1) : k.full > 1 ? T(-1) : T(0);
                d_full = (d_base + d_rate * slope) * k.keep;
                d_keep = d_base * k.full + d_rate * least;
                break;
            }
            case RateKind::split: {
                const int64_t of = (s.layers - 1) * s.heads + head;
                const T d = d_rate + d_step + d_base * (1 - s.share[of]);
                s.d_share[of] -= d_base * k.step;
                d_full = d * k.keep, d_keep = d * k.full;
                break;
            }
            case RateKind::free:
                d_eta = d_rate * k.present * (s.alpha ? std::max(k.left, s.least()) : s.least());
                if (s.alpha && k.left >= s.least()) d_log_a -= d_rate * k.eta * k.present * k.keep;
                break;
            default: d_eta = d_rate * k.present;
        }
        d_eta += d_full * s.largest() * k.present;
        d_log_a += d_keep * k.keep;
        const T z = k.eta > 0 && k.eta < 1 ? d_eta * s.stretched() * k.open * (1 - k.open) : T(0);
        s.d_eta[at] = z;
        s.d_eta_bias[head] += z;
        if (!s.alpha) continue;
        // The derivative of log sigmoid(z) is sigmoid(-z).
        const T d = d_log_a / 16 * sigmoid(-(s.alpha[at] + s.alpha_bias[head]));
        s.d_alpha[at] = d;
        s.d_alpha_bias[head] += d;
    }
}

}  // namespace rates
