// One chunk of the one rule on a CPU, forward and backward: the closed form of nestling/ops/chunk_rule.py, whose torch
// version is the specification. Every problem (row, head, memory) runs in the cache of one core from end to end, which
// is what it gains: the torch version moves every intermediate through memory and pays for a hundred small calls.
//
// Row-major. C tokens, K inputs, V outputs; A, A0, B, B0, D, d0, G as in chunk_rule.py. A and D come from recursions,
// A[t] = a_t A[t-1] and D[t] = a_t D[t-1] + valid_t B[t], so that sh(A)[t] is simply A[t-1].

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "matmul.h"
#include "scratch.h"

namespace {

// The arguments, shared by both directions; pointers are null where the rule has no such part.
template <class T>
struct Args {
    int64_t problems, memories, C, K, V, Q;  // Q: outputs of the first memory that are read
    int64_t normalise, before, threads;
    const T *x, *g, *lr, *erase, *log_a, *log_b;
    const uint8_t* valid;
    const T *W, *S, *recalled, *q;
    T *y, *W2, *S2;         // results
    T *E, *R, *Tm, *QW, *QS;  // kept for the backward pass: e u, X W^T, X S^T, q W^T, q S^T
    const T *dy, *dW2, *dS2;
    T *dx, *dg, *dlr, *derase, *dlog_a, *dlog_b, *dW, *dS, *drecalled, *dq;
};

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

// What both directions compute first: rates, decay products, steps P = l g, the Gram matrix and its shifted products.
template <class T>
struct Chunk {
    const Args<T>& s;
    int64_t C, K, V, Q, b, m, bm;
    bool momentum, erases, reads;
    const T *x, *g, *W, *S, *q;
    T *a, *bt, *A0, *B0, *d0, *lr, *e, *power;
    T *A, *B, *D, *P, *G, *Xt, *Mq;

    Chunk(const Args<T>& args, int64_t index, Scratch<T>& mem) : s(args) {
        C = s.C, K = s.K, V = s.V, Q = s.Q;
        bm = index, b = index / s.memories, m = index % s.memories;
        momentum = s.log_b, erases = s.erase, reads = s.q && m == 0;
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
        if (erases || reads) transpose(x, K, C, K, Xt);
        if (erases) matmul<T>({x, K, 1}, {Xt, C}, G, C, C, C, K, {.out_lower = true});
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

    T before_chunk(const T* rows, int64_t t, int64_t lag, T first) const { return t >= lag ? rows[t - lag] : first; }
};

// E = (I + L)^{-1} E in place, L[t, s] = e_t A[t-1, s] G[t, s]. `system` receives L.
template <class T>
void solve(const Chunk<T>& c, T* E, T* system) {
    c.masked(system, c.A, c.G, 1);
    for (int64_t t = 0; t < c.C; t++) scaled(system + t * c.C, c.e[t], system + t * c.C, t);
    solve_unit_lower(system, E, c.C, c.V);
}

template <class T>
void forward_one(const Args<T>& s, int64_t index, Scratch<T>& mem) {
    Chunk<T> c(s, index, mem);
    const int64_t C = c.C, K = c.K, V = c.V, Q = c.Q, lag = s.before ? 1 : 0;
    T* E = s.E + c.bm * C * V;
    T *R = s.R ? s.R + c.bm * C * V : nullptr, *Tm = s.Tm ? s.Tm + c.bm * C * V : nullptr;
    const T* recalled = s.recalled ? s.recalled + c.bm * C * V : R;
    T *Wt = mem.take(K * V), *St = mem.take(K * V), *work = mem.take(C * C), *tot = mem.take(C * V);
    if (R || c.reads) transpose(c.W, K, V, K, Wt);
    if (c.momentum && (c.erases || c.reads)) transpose(c.S, K, V, K, St);

    if (c.erases) {
        if (R) matmul<T>({c.x, K, 1}, {Wt, V}, R, V, C, V, K, {});
        if (c.momentum) {
            matmul<T>({c.x, K, 1}, {St, V}, Tm, V, C, V, K, {});
            c.masked(work, c.D, c.G, 1);
            matmul<T>({work, C, 1}, {c.P, V}, E, V, C, V, C, {.lower = true, .negate = true});
        }
        for (int64_t t = 0; t < C; t++) {
            T start = c.before_chunk(c.A0, t, 1, T(1)), start_m = c.momentum ? c.before_chunk(c.d0, t, 1, T(0)) : T(0);
            const T e = c.e[t], *recall = recalled + t * V;
            T* o = E + t * V;
            if (c.momentum) {
                const T* past = Tm + t * V;
#pragma omp simd
                for (int64_t v = 0; v < V; v++) o[v] = e * (start * recall[v] + o[v] + start_m * past[v]);
            } else {
                const T* step = c.P + t * V;
#pragma omp simd
                for (int64_t v = 0; v < V; v++) o[v] = e * start * recall[v] + step[v];
            }
        }
        solve(c, E, work);
    } else {
        for (int64_t i = 0; i < C * V; i++) E[i] = c.momentum ? T(0) : c.P[i];
    }

    if (c.reads) {
        T *y = s.y + c.b * C * Q, *QW = s.QW + c.b * C * Q, *QS = s.QS ? s.QS + c.b * C * Q : nullptr;
        matmul<T>({c.q, K, 1}, {Wt, V}, QW, Q, C, Q, K, {});
        if (c.momentum) matmul<T>({c.q, K, 1}, {St, V}, QS, Q, C, Q, K, {});
        for (int64_t t = 0; t < C; t++) {
            scaled(y + t * Q, c.before_chunk(c.A0, t, lag, T(1)), QW + t * Q, Q);
            if (c.momentum) add_scaled(y + t * Q, c.before_chunk(c.d0, t, lag, T(0)), QS + t * Q, Q);
        }
        if (c.momentum) {
            c.masked(work, c.D, c.Mq, lag);
            matmul<T>({work, C, 1}, {c.P, V}, y, Q, C, Q, C, {.lower = true, .negate = true, .add = true});
        }
        if (c.erases || !c.momentum) {
            c.masked(work, c.A, c.Mq, lag);
            matmul<T>({work, C, 1}, {E, V}, y, Q, C, Q, C, {.lower = true, .negate = true, .add = true});
        }
    }

    const T* last = c.A + (C - 1) * C;
    T* W2 = s.W2 + c.bm * V * K;
    for (int64_t t = 0; t < C; t++) {
        scaled(tot + t * V, last[t], E + t * V, V);
        if (c.momentum) add_scaled(tot + t * V, c.D[(C - 1) * C + t], c.P + t * V, V);
    }
    scaled(W2, c.A0[C - 1], c.W, V * K);
    if (c.momentum) add_scaled(W2, c.d0[C - 1], c.S, V * K);
    matmul<T>({tot, 1, V}, {c.x, K}, W2, K, V, K, C, {.negate = true, .add = true});
    if (c.momentum) {
        T* S2 = s.S2 + c.bm * V * K;
        for (int64_t t = 0; t < C; t++) scaled(tot + t * V, c.B[(C - 1) * C + t], c.P + t * V, V);
        scaled(S2, c.B0[C - 1], c.S, V * K);
        matmul<T>({tot, 1, V}, {c.x, K}, S2, K, V, K, C, {.negate = true, .add = true});
    }
}

// Gradients of one problem, in the order in which the forward pass is undone: advance, read, solve, decay, rates.
template <class T>
struct Backward {
    Chunk<T> c;
    const Args<T>& s;
    const int64_t C, K, V, Q;
    const T *E, *R, *Tm;
    T *dx, *dP, *dE, *dW, *dS, *dA, *dB, *dD, *dA0, *dB0, *dd0, *de, *work, *work2, *rows, *rows2, *wide;

    Backward(const Args<T>& args, int64_t index, Scratch<T>& mem)
        : c(args, index, mem), s(args), C(args.C), K(args.K), V(args.V), Q(args.Q) {
        E = s.E + c.bm * C * V;
        R = s.recalled ? s.recalled + c.bm * C * V : (s.R ? s.R + c.bm * C * V : nullptr);
        Tm = s.Tm ? s.Tm + c.bm * C * V : nullptr;
        dx = s.dx + c.bm * C * K, dW = s.dW + c.bm * V * K, dS = c.momentum ? s.dS + c.bm * V * K : nullptr;
        dP = s.dg + c.bm * C * V;  // becomes dg at the end
        dE = mem.take(C * V), rows = mem.take(C * V), rows2 = mem.take(C * V);
        wide = mem.take((C > V ? C : V) * (K > V ? K : V));
        work = mem.take(C * C), work2 = mem.take(C * C);
        dA = zeros(mem, C * C), dB = zeros(mem, C * C), dD = zeros(mem, C * C);
        dA0 = zeros(mem, C), dB0 = zeros(mem, C), dd0 = zeros(mem, C), de = zeros(mem, C);
        zero(dx, C * K);
        zero(dP, C * V);
        zero(dE, C * V);
    }

    static T* zeros(Scratch<T>& mem, int64_t n) {
        T* p = mem.take(n);
        zero(p, n);
        return p;
    }

    void advance() {
        const int64_t l = C - 1, n = V * K;
        zero(dW, n);
        if (c.momentum) zero(dS, n);
        if (s.dW2) {
            const T* d = s.dW2 + c.bm * n;
            add_scaled(dW, c.A0[l], d, n);
            dA0[l] += dot(c.W, d, n);
            transpose(d, K, V, K, wide);
            matmul<T>({c.x, K, 1}, {wide, V}, rows, V, C, V, K, {});
            for (int64_t t = 0; t < C; t++) {
                const T keep = c.A[l * C + t], keep_m = c.momentum ? c.D[l * C + t] : T(0);
                const T *z = rows + t * V, *erased = E + t * V, *step = c.P + t * V;
                T *o = rows2 + t * V, *de_t = dE + t * V, *dp = dP + t * V, to_a = 0, to_d = 0;
#pragma omp simd reduction(+ : to_a, to_d)
                for (int64_t v = 0; v < V; v++) {
                    o[v] = keep * erased[v] + keep_m * step[v];
                    de_t[v] = -keep * z[v];
                    dp[v] = -keep_m * z[v];
                    to_a += erased[v] * z[v];
                    to_d += step[v] * z[v];
                }
                dA[l * C + t] -= to_a;
                if (c.momentum) dD[l * C + t] -= to_d;
            }
            matmul<T>({rows2, V, 1}, {d, K}, dx, K, C, K, V, {.negate = true, .add = true});
            if (c.momentum) {
                add_scaled(dS, c.d0[l], d, n);
                dd0[l] += dot(c.S, d, n);
            }
        }
        if (c.momentum && s.dS2) {
            const T* d = s.dS2 + c.bm * n;
            add_scaled(dS, c.B0[l], d, n);
            dB0[l] += dot(c.S, d, n);
            transpose(d, K, V, K, wide);
            matmul<T>({c.x, K, 1}, {wide, V}, rows, V, C, V, K, {});
            for (int64_t t = 0; t < C; t++) {
                const T keep = c.B[l * C + t], *z = rows + t * V, *step = c.P + t * V;
                T *o = rows2 + t * V, *dp = dP + t * V, sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t v = 0; v < V; v++) {
                    o[v] = keep * step[v];
                    dp[v] -= keep * z[v];
                    sum += step[v] * z[v];
                }
                dB[l * C + t] -= sum;
            }
            matmul<T>({rows2, V, 1}, {d, K}, dx, K, C, K, V, {.negate = true, .add = true});
        }
    }

    // One of the two sums of a read, y -= (F * Mq) Z with F = A or D: dF, dZ and the part of d(Mq), left in `match`.
    void read_sum(const T* dy, const T* Z, const T* factor, T* dfactor, T* dZ, T* match, bool add) {
        const int64_t lag = s.before ? 1 : 0;
        transpose(Z, V, C, Q, wide);
        matmul<T>({dy, Q, 1}, {wide, C}, work, C, C, C, Q, {.out_lower = true, .negate = true});
        for (int64_t t = 0; t < C; t++) {
            const int64_t n = t + 1 - lag;
            const T *f = factor + (t - lag) * C, *d = work + t * C, *mq = c.Mq + t * C;
            T *df = dfactor + (t - lag) * C, *o = match + t * C;
            if (!add) zero(o, C);
#pragma omp simd
            for (int64_t r = 0; r < n; r++) {
                df[r] += d[r] * mq[r];
                o[r] += d[r] * f[r];
            }
        }
        c.masked(work, factor, c.Mq, lag);
        matmul<T>({work, 1, C}, {dy, Q}, dZ, V, C, Q, C, {.upper = true, .negate = true, .add = true});
    }

    void read() {
        T* dq = s.dq + c.b * C * K;
        zero(dq, C * K);
        const int64_t lag = s.before ? 1 : 0;
        const T* dy = s.dy + c.b * C * Q;
        start_term(dy, s.QW + c.b * C * Q, c.A0, dA0, T(1), lag, c.W, dW, dq);
        if (c.momentum) start_term(dy, s.QS + c.b * C * Q, c.d0, dd0, T(0), lag, c.S, dS, dq);
        bool both = c.momentum && c.erases;
        if (c.momentum) read_sum(dy, c.P, c.D, dD, dP, work2, false);
        if (c.erases || !c.momentum) read_sum(dy, E, c.A, dA, dE, work2, both);
        matmul<T>({work2, C, 1}, {c.x, K}, dq, K, C, K, C, {.lower = true, .add = true});
        matmul<T>({work2, 1, C}, {c.q, K}, dx, K, C, K, C, {.upper = true, .add = true});
    }

    // y += start * (q weight^T), over the read outputs.
    void start_term(
        const T* dy, const T* product, const T* start, T* dstart, T first, int64_t lag, const T* weight, T* dweight, T* dq
    ) {
        for (int64_t t = 0; t < C; t++) {
            if (t >= lag) dstart[t - lag] += dot(dy + t * Q, product + t * Q, Q);
            scaled(rows + t * Q, c.before_chunk(start, t, lag, first), dy + t * Q, Q);
        }
        matmul<T>({rows, Q, 1}, {weight, K}, dq, K, C, K, Q, {.add = true});
        matmul<T>({rows, 1, Q}, {c.q, K}, dweight, K, Q, K, C, {.add = true});
    }

    // The triangular solve and its right-hand side; leaves d(l g) of the direct path in dP.
    void erase() {
        c.masked(work, c.A, c.G, 1);
        for (int64_t t = 0; t < C; t++) scaled(work + t * C, c.e[t], work + t * C, t);
        solve_unit_lower_transposed(work, dE, C, V);
        if (!c.momentum) add_scaled(dP, T(1), dE, C * V);
        // dL = -dE E^T; L = e * sh(A) * G.
        transpose(E, V, C, V, wide);
        matmul<T>({dE, V, 1}, {wide, C}, work2, C, C, C, V, {.out_lower = true, .negate = true});
        T* dG = work;
        zero(dG, C);
        for (int64_t t = 1; t < C; t++) {
            const T e = c.e[t], *d = work2 + t * C, *before = c.A + (t - 1) * C, *gram = c.G + t * C;
            T sum = 0, *da = dA + (t - 1) * C, *o = dG + t * C;
#pragma omp simd reduction(+ : sum)
            for (int64_t r = 0; r < t; r++) {
                sum += d[r] * before[r] * gram[r];
                da[r] += d[r] * e * gram[r];
                o[r] = d[r] * e * before[r];
            }
            de[t] += sum;
            zero(o + t, C - t);
        }
        right_side(dG);
        matmul<T>({dG, C, 1}, {c.x, K}, dx, K, C, K, C, {.lower = true, .add = true});
        matmul<T>({dG, 1, C}, {c.x, K}, dx, K, C, K, C, {.upper = true, .add = true});
    }

    // right = e * inner, inner = sh(A0) R + sh(d0) T - (sh(D) * G) P. On entry dE is the gradient of `right`.
    void right_side(T* dG) {
        T* inner = rows;
        if (c.momentum) {
            c.masked(work2, c.D, c.G, 1);
            matmul<T>({work2, C, 1}, {c.P, V}, inner, V, C, V, C, {.lower = true, .negate = true});
        }
        for (int64_t t = 0; t < C; t++) {
            T start = c.before_chunk(c.A0, t, 1, T(1)), start_m = c.momentum ? c.before_chunk(c.d0, t, 1, T(0)) : T(0);
            de[t] += start * dot(R + t * V, dE + t * V, V);
            if (c.momentum) de[t] += dot(inner + t * V, dE + t * V, V) + start_m * dot(Tm + t * V, dE + t * V, V);
            scaled(dE + t * V, c.e[t], dE + t * V, V);  // from here the gradient of `inner`
            if (t) dA0[t - 1] += dot(dE + t * V, R + t * V, V);
            if (t && c.momentum) dd0[t - 1] += dot(dE + t * V, Tm + t * V, V);
            scaled(rows2 + t * V, start, dE + t * V, V);
        }
        if (s.drecalled) {
            std::copy(rows2, rows2 + C * V, s.drecalled + c.bm * C * V);
        } else {
            matmul<T>({rows2, V, 1}, {c.W, K}, dx, K, C, K, V, {.add = true});
            matmul<T>({rows2, 1, V}, {c.x, K}, dW, K, V, K, C, {.add = true});
        }
        if (!c.momentum) return;
        matmul<T>({work2, 1, C}, {dE, V}, dP, V, C, V, C, {.upper = true, .negate = true, .add = true});
        for (int64_t t = 0; t < C; t++) scaled(rows2 + t * V, c.before_chunk(c.d0, t, 1, T(0)), dE + t * V, V);
        matmul<T>({rows2, V, 1}, {c.S, K}, dx, K, C, K, V, {.add = true});
        matmul<T>({rows2, 1, V}, {c.x, K}, dS, K, V, K, C, {.add = true});
        transpose(c.P, V, C, V, wide);
        matmul<T>({dE, V, 1}, {wide, C}, work2, C, C, C, V, {.out_lower = true, .negate = true});
        for (int64_t t = 1; t < C; t++) {
            const T *d = work2 + t * C, *before = c.D + (t - 1) * C, *gram = c.G + t * C;
            T *o = dG + t * C, *dd = dD + (t - 1) * C;
#pragma omp simd
            for (int64_t r = 0; r < t; r++) {
                o[r] += d[r] * before[r];
                dd[r] += d[r] * gram[r];
            }
        }
    }

    void decay() {
        for (int64_t t = C - 1; t >= 0; t--) {
            T keep = c.present(t) ? T(1) : T(0), da = 0, db = 0;
            if (c.momentum) {
                if (t) {
                    da += dot(dD + t * C, c.D + (t - 1) * C, t) + dd0[t] * c.d0[t - 1];
                    add_scaled(dD + (t - 1) * C, c.a[t], dD + t * C, t);
                    dd0[t - 1] += c.a[t] * dd0[t];
                }
                add_scaled(dB + t * C, keep, dD + t * C, t + 1);
                dB0[t] += keep * dd0[t];
                db = dB0[t] * (t ? c.B0[t - 1] : T(1));
                if (t) {
                    db += dot(dB + t * C, c.B + (t - 1) * C, t);
                    add_scaled(dB + (t - 1) * C, c.bt[t], dB + t * C, t);
                    dB0[t - 1] += c.bt[t] * dB0[t];
                }
            }
            da += dA0[t] * (t ? c.A0[t - 1] : T(1));
            if (t) {
                da += dot(dA + t * C, c.A + (t - 1) * C, t);
                add_scaled(dA + (t - 1) * C, c.a[t], dA + t * C, t);
                dA0[t - 1] += c.a[t] * dA0[t];
            }
            s.dlog_a[c.bm * C + t] = keep * da * c.a[t];
            if (c.momentum) s.dlog_b[c.bm * C + t] = keep * db * c.bt[t];
        }
    }

    void rates() {
        for (int64_t t = 0; t < C; t++) {
            T dlr = dot(dP + t * V, c.g + t * V, V);
            s.dlr[c.bm * C + t] = dlr * c.power[t];
            if (c.erases) s.derase[c.bm * C + t] = de[t] * c.power[t];
            scaled(dP + t * V, c.lr[t], dP + t * V, V);
            if (c.power[t] >= 1) continue;
            T dpower = dlr * s.lr[c.b * C + t] + (c.erases ? de[t] * s.erase[c.b * C + t] : T(0));
            add_scaled(dx + t * K, -2 * dpower * c.power[t] * c.power[t], c.x + t * K, K);
        }
    }

    void run() {
        advance();
        if (c.reads && s.dy) read();
        if (c.erases) {
            erase();
        } else if (!c.momentum) {
            add_scaled(dP, T(1), dE, C * V);
        }
        decay();
        rates();
    }
};

template <class T>
void run(const int64_t* sizes, void* const* t, bool backward) {
    Args<T> s{};
    int64_t* to_sizes[] = {&s.problems, &s.memories, &s.C, &s.K, &s.V, &s.Q, &s.normalise, &s.before, &s.threads};
    for (int64_t* p : to_sizes) *p = *sizes++;
    const T** inputs[] = {&s.x, &s.g, &s.lr, &s.erase, &s.log_a, &s.log_b};
    for (const T** p : inputs) *p = static_cast<const T*>(*t++);
    s.valid = static_cast<const uint8_t*>(*t++);
    const T** carried[] = {&s.W, &s.S, &s.recalled, &s.q};
    for (const T** p : carried) *p = static_cast<const T*>(*t++);
    T** results[] = {&s.y, &s.W2, &s.S2, &s.E, &s.R, &s.Tm, &s.QW, &s.QS};
    for (T** p : results) *p = static_cast<T*>(*t++);
    if (backward) {
        const T** upstream[] = {&s.dy, &s.dW2, &s.dS2};
        for (const T** p : upstream) *p = static_cast<const T*>(*t++);
        T** found[] = {&s.dx, &s.dg, &s.dlr, &s.derase, &s.dlog_a, &s.dlog_b, &s.dW, &s.dS, &s.drecalled, &s.dq};
        for (T** p : found) *p = static_cast<T*>(*t++);
    }
    const int64_t C = s.C, K = s.K, V = s.V, side = C > V ? C : V, other = K > V ? K : V;
    const size_t room = 12 * C * C + 7 * C * V + 2 * K * V + C * K + side * other + 16 * C + 16 * 64;
#pragma omp parallel num_threads(s.threads) if (s.problems * s.memories > 1)
    {
        static thread_local Scratch<T> mem;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.problems * s.memories; i++) {
            mem.reset(room);
            if (backward) {
                Backward<T>(s, i, mem).run();
            } else {
                forward_one(s, i, mem);
            }
        }
    }
}

}  // namespace

extern "C" {
void nestling_chunk(const int64_t* sizes, void* const* tensors, int is_double, int backward) {
    is_double ? run<double>(sizes, tensors, backward) : run<float>(sizes, tensors, backward);
}
}
