// What the forward and the backward pass of a chunk share. A, A0, B, B0, D, d0, G as in nestling/ops/chunk_rule.py. A and
// D come from recursions, A[t] = a_t A[t-1] and D[t] = a_t D[t-1] + valid_t B[t], so that sh(A)[t] is simply A[t-1].
#pragma once

#include <cmath>
#include <cstdint>

#include "arguments.h"
#include "matmul.h"
#include "scratch.h"
#include "vectors.h"

// The arguments, shared by both directions; pointers are null where the rule has no such part.
template <class T>
struct ChunkArguments {
    int64_t problems, memories, C, K, V, Q;  // Q: outputs of the first memory that are read
    int64_t normalise, before, online, threads;  // online: gradients are g + W_{t-1} x_t; only with momentum
    const T *x, *g, *lr, *erase, *log_a, *log_b;
    const uint8_t* valid;
    const T *W, *S, *recalled, *q;
    T *y, *W2, *S2;        // results
    T* kept;               // for the backward pass: u, or with no momentum P
    const T *dy, *dW2, *dS2;
    T *dx, *dg, *dlr, *derase, *dlog_a, *dlog_b, *dW, *dS, *drecalled, *dq;
};

// Numbers that either direction needs as working memory.
inline size_t chunk_room(int64_t C, int64_t K, int64_t V) {
    const int64_t side = C > V ? C : V, other = K > V ? K : V;
    return 12 * C * C + 7 * C * V + 2 * K * V + 2 * C * K + side * other + 16 * C + 16 * 64;
}

// What both directions compute first: rates, decay products, steps P = l g, the Gram matrix and its shifted products.
template <class T>
struct Chunk {
    const ChunkArguments<T>& s;
    int64_t C, K, V, Q, b, m, bm;
    bool momentum, erases, online, solves, reads;
    const T *x, *g, *W, *S, *q;
    T *a, *bt, *A0, *B0, *d0, *lr, *e, *power;
    T *A, *B, *D, *P, *G, *Xt, *Mq;

    Chunk(const ChunkArguments<T>& args, int64_t index, Scratch<T>& mem) : s(args) {
        C = s.C, K = s.K, V = s.V, Q = s.Q;
        bm = index, b = index / s.memories, m = index % s.memories;
        momentum = s.log_b, erases = s.erase, reads = s.q && m == 0;
        online = s.online && momentum, solves = erases || online;
        x = s.x + bm * C * K, g = s.g + bm * C * V, W = s.W + bm * V * K;
        S = momentum ? s.S + bm * V * K : nullptr;
        q = reads ? s.q + b * C * K : nullptr;
        a = mem.take(C), bt = mem.take(C), A0 = mem.take(C), B0 = mem.take(C), d0 = mem.take(C);
        lr = mem.take(C), e = mem.take(C), power = mem.take(C);
        A = mem.take(C * C), B = mem.take(C * C), D = mem.take(C * C), P = mem.take(C * V);
        G = mem.take(C * C), Xt = mem.take(C * K), Mq = mem.take(C * C);
        rates();
        decay();
        for (int64_t t = 0; t < C; t++) scaled(P + t * V, lr[t], g + t * V, V);
        if (solves || reads) transpose(x, K, C, K, Xt);
        if (solves) matmul<T>({x, K, 1}, {Xt, C}, G, C, C, C, K, {.out_lower = true});
        if (reads) matmul<T>({q, K, 1}, {Xt, C}, Mq, C, C, C, K, {.out_lower = true});
    }

    bool present(int64_t t) const { return !s.valid || s.valid[b * C + t]; }

    void rates() {
        for (int64_t t = 0; t < C; t++) {
            T size = s.normalise ? dot(x + t * K, x + t * K, K) : T(1);
            power[t] = size > 1 ? 1 / size : T(1);
            lr[t] = s.lr[b * C + t] * power[t];
            e[t] = erases ? s.erase[b * C + t] * power[t] : T(0);
            a[t] = present(t) ? std::exp(s.log_a[b * C + t]) : T(1);
            bt[t] = momentum && present(t) ? std::exp(s.log_b[b * C + t]) : T(1);
        }
    }

    void decay() {
        for (int64_t t = 0; t < C; t++) {
            T keep = present(t) ? T(1) : T(0);
            A0[t] = t ? a[t] * A0[t - 1] : a[t];
            if (t) scaled(A + t * C, a[t], A + (t - 1) * C, t);
            A[t * C + t] = 1;
            if (!momentum) continue;
            B0[t] = t ? bt[t] * B0[t - 1] : bt[t];
            d0[t] = (t ? a[t] * d0[t - 1] : T(0)) + keep * B0[t];
            if (t) scaled(B + t * C, bt[t], B + (t - 1) * C, t);
            B[t * C + t] = 1;
            if (t) scaled(D + t * C, a[t], D + (t - 1) * C, t);
            D[t * C + t] = 0;
            add_scaled(D + t * C, keep, B + t * C, t + 1);
        }
    }

    // out[t, r] = factor[t - lag, r] * match[t, r] for r <= t - lag, else 0.
    void masked(T* out, const T* factor, const T* match, int64_t lag) const {
        for (int64_t t = 0; t < C; t++) {
            int64_t n = t + 1 - lag;
            const T *f = factor + (t - lag) * C, *with = match + t * C;
            T* o = out + t * C;
#pragma omp simd
            for (int64_t r = 0; r < n; r++) o[r] = f[r] * with[r];
            zero(o + n, C - n);
        }
    }

    // N of the triangular system: e_t A[t-1, r] G[t, r], with momentum (A[t-1, r] e_r + D[t-1, r] l_r) G[t, r], where the
    // second term is that of online gradients.
    void system(T* out) const {
        masked(out, A, G, 1);
        for (int64_t t = 0; t < C; t++) {
            if (!momentum) {
                scaled(out + t * C, e[t], out + t * C, t);
                continue;
            }
            const T *before = D + (t - 1) * C, *with = G + t * C;
            T* o = out + t * C;
#pragma omp simd
            for (int64_t r = 0; r < t; r++) o[r] *= e[r];
            if (!online) continue;
#pragma omp simd
            for (int64_t r = 0; r < t; r++) o[r] += before[r] * lr[r] * with[r];
        }
    }

    // From u: what is erased, E = e u, and with online gradients the whole steps, P = l (g + u).
    void known(const T* u, T* E) {
        for (int64_t t = 0; t < C; t++) {
            scaled(E + t * V, e[t], u + t * V, V);
            if (online) add_scaled(P + t * V, lr[t], u + t * V, V);
        }
    }

    // rows[t - lag], or `first` where there is no such row.
    static T shifted(const T* rows, int64_t t, int64_t lag, T first) { return t >= lag ? rows[t - lag] : first; }
};
