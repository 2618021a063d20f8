// A bank of memories (nestling/memory/bank.py) at the first weights of a chunk: one memory at its inputs, and back.
//
// Layer 0 of all memories is one stacked weight [rows, K], memory m at rows m * hidden, the gates after the last;
// layer l > 0 is [M, out, hidden]. Memory m at x: z_0 = W_0 x, z_l = W_l act(z_{l-1}), output z_{L-1} + x; of a matrix, with
// L = 1, z_0.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "exponential.h"
#include "matmul.h"
#include "scratch.h"
#include "vectors.h"

template <class T>
struct BankArguments {
    int64_t problems, memories, C, K, hidden, layers, gates, self_targets, dot, threads;
    int64_t first;    // memory from which a read starts
    int64_t padding;  // rows of layer 0 after the gates, all zero
    int64_t apart;    // of layer 0's products and gradients, the first so many outputs stand before all others
    int64_t online;   // the last layer's gradient leaves out what the weight itself gives, F x
    double clip;
    Activation activation;
    const T* W[most_layers];
    const T* base;  // online: W_0 of the last layer, where its weight is W_0 + F; else null
    const T* own[most_layers];  // the first memory's weights that make its targets, where they are others; else null
    const T* length;  // the first memory's targets are so many times as long; null is 1
    T *dW[most_layers], *dbase, *d_own[most_layers], *d_length;

    int64_t outputs(int64_t l) const { return l == layers - 1 ? K : hidden; }
    int64_t inputs(int64_t l) const { return l ? hidden : K; }
    int64_t rows() const { return memories * hidden + gates + padding; }  // of layer 0
    int64_t offset(int64_t b, int64_t m, int64_t l) const {  // of a memory's weight
        return l ? (b * memories + m) * outputs(l) * hidden : (b * rows() + m * hidden) * K;
    }
    int64_t wide() const { return std::max({K, hidden, gates}); }  // of any row of working memory
    int64_t gate_offset(int64_t b) const { return (b * rows() + memories * hidden) * K; }
    size_t room() const { return wide() * wide() + (8 + 2 * layers) * C * wide() + 64 * (10 + 2 * layers); }
};

// One activation at one point: value, slope and curvature.
template <class T>
struct Point {
    T value, slope, curve;
};

template <class T, Activation KIND>
inline Point<T> act(T z) {
    if constexpr (KIND == Activation::silu) {
        T s = 1 / (1 + exponential(-z));
        return {z * s, s + z * s * (1 - s), s * (1 - s) * (2 + z * (1 - 2 * s))};
    } else if constexpr (KIND == Activation::gelu) {
        T cdf = T(0.5) * (1 + std::erf(z * T(0.70710678118654752440)));
        T pdf = exponential(T(-0.5) * z * z) * T(0.39894228040143267794);
        return {z * cdf, cdf + z * pdf, pdf * (2 - z * z)};
    } else {
        return {z > 0 ? z : T(0), z > 0 ? T(1) : T(0), T(0)};
    }
}

// Rows of a matrix that may be part of a wider one.
template <class T>
struct Rows {
    T* data;
    int64_t row;
    T* operator[](int64_t t) const { return data + t * row; }
};

template <class T, Activation KIND>
struct Work {
    const BankArguments<T>& s;
    const int64_t C, K, L;
    const T* const* W;
    T* const* dW;
    T *Wt, *h, *y, *dh;

    Work(const BankArguments<T>& bank, Scratch<T>& mem)
        : s(bank), C(bank.C), K(bank.K), L(bank.layers), W(bank.W), dW(bank.dW) {
        const int64_t wide = s.wide();
        Wt = mem.take(wide * wide), h = mem.take(C * wide), y = mem.take(C * wide), dh = mem.take(C * wide);
    }

    // z_l of memory m at x, for all l; `H` keeps the inputs of the layers after the first.
    void pass(int64_t b, int64_t m, const T* x, const Rows<T>* z, T* const* H = nullptr) const {
        for (int64_t l = 0; l < L; l++) {
            const int64_t out = s.outputs(l), in = s.inputs(l);
            T* h = H && l ? H[l] : this->h;
            if (l) activations(z[l - 1], h);
            transpose(W[l] + s.offset(b, m, l), in, out, in, Wt);
            matmul<T>({l ? h : x, in, 1}, {Wt, out}, z[l].data, z[l].row, C, out, in, {});
        }
    }

    void activations(Rows<T> z, T* out) const {
        for (int64_t t = 0; t < C; t++) {
            const T* in = z[t];
            T* o = out + t * s.hidden;
#pragma omp simd
            for (int64_t j = 0; j < s.hidden; j++) o[j] = act<T, KIND>(in[j]).value;
        }
    }

    // act(z) and act'(z).
    void activations(Rows<T> z, T* out, T* slopes) const {
        for (int64_t t = 0; t < C; t++) {
            const T* in = z[t];
            T *o = out + t * s.hidden, *slope = slopes + t * s.hidden;
#pragma omp simd
            for (int64_t j = 0; j < s.hidden; j++) {
                const Point<T> a = act<T, KIND>(in[j]);
                o[j] = a.value, slope[j] = a.slope;
            }
        }
    }

    // The reverse of `pass`. dz[L - 1] holds the gradient of z_{L-1}; with `key`, dz[l] of earlier layers and dH[l], the
    // gradient of act(z_{l-1}), hold what else comes back to them. Adds to dx and to the bank's dW.
    void chain(int64_t b, int64_t m, const T* x, const Rows<T>* z, T* const* dz, const T* const* dH, bool key, T* dx) const {
        for (int64_t l = L - 1; l > 0; l--) {
            const int64_t out = s.outputs(l), at = s.offset(b, m, l), hidden = s.hidden;
            const T* more = key ? dH[l] : nullptr;
            activations(z[l - 1], h, y);
            matmul<T>({dz[l], out, 1}, {W[l] + at, hidden}, dh, hidden, C, hidden, out, {});
            matmul<T>({dz[l], 1, out}, {h, hidden}, dW[l] + at, hidden, out, hidden, C, {.add = true});
            if (more) add_scaled(dh, T(1), more, C * hidden);
            T* o = dz[l - 1];
            if (key) {
#pragma omp simd
                for (int64_t j = 0; j < C * hidden; j++) o[j] += dh[j] * y[j];
            } else {
#pragma omp simd
                for (int64_t j = 0; j < C * hidden; j++) o[j] = dh[j] * y[j];
            }
        }
        linear_back(s.offset(b, m, 0), s.hidden, x, dz[0], s.hidden, dx);
    }

    // out = W_0 x over `count` rows of layer 0 at `at`: adds to dx and dW_0.
    void linear_back(int64_t at, int64_t count, const T* x, const T* d, int64_t d_row, T* dx) const {
        matmul<T>({d, d_row, 1}, {W[0] + at, K}, dx, K, C, K, count, {.add = true});
        matmul<T>({d, 1, d_row}, {x, K}, dW[0] + at, K, count, K, C, {.add = true});
    }

    void gates(int64_t b, const T* x, T* out, int64_t out_row) const {
        transpose(W[0] + s.gate_offset(b), K, s.gates, K, Wt);
        matmul<T>({x, K, 1}, {Wt, s.gates}, out, out_row, C, s.gates, K, {});
    }
};
