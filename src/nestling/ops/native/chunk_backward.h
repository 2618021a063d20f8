// The backward pass of a chunk.
#pragma once

#include "chunk.h"

// Gradients of one problem, in the order in which the forward pass is undone: advance, read, solve, decay, rates.
template <class T>
struct Backward {
    Chunk<T> c;
    const ChunkArguments<T>& s;
    const int64_t C, K, V, Q;
    const T *kept, *E;
    T *dx, *dP, *dE, *dW, *dS, *dA, *dB, *dD, *dA0, *dB0, *dd0, *de, *work, *work2, *rows, *rows2, *back, *wide;

    Backward(const ChunkArguments<T>& args, int64_t index, Scratch<T>& mem)
        : c(args, index, mem), s(args), C(args.C), K(args.K), V(args.V), Q(args.Q) {
        E = kept = s.kept + c.bm * C * V;
        dx = s.dx + c.bm * C * K, dW = s.dW + c.bm * V * K, dS = c.momentum ? s.dS + c.bm * V * K : nullptr;
        dP = s.dg + c.bm * C * V;  // becomes dg at the end
        dE = mem.take(C * V), rows = mem.take(C * V), rows2 = mem.take(C * V), back = mem.take(C * K);
        wide = mem.take((C > V ? C : V) * (K > V ? K : V));
        work = mem.take(C * C), work2 = mem.take(C * C);
        dA = zeros(mem, C * C), dB = zeros(mem, C * C), dD = zeros(mem, C * C);
        if (c.momentum) {
            T* erased = mem.take(C * V);
            c.known(kept, erased);
            E = erased;
        }
        dA0 = zeros(mem, C), dB0 = zeros(mem, C), dd0 = zeros(mem, C), de = zeros(mem, C);
    }

    static T* zeros(Scratch<T>& mem, int64_t n) {
        T* p = mem.take(n);
        zero(p, n);
        return p;
    }

    // rows = X d^T
    void at_inputs(const T* d) {
        transpose(d, K, V, K, wide);
        matmul<T>({c.x, K, 1}, {wide, V}, rows, V, C, V, K, {});
    }

    void advance() {
        const int64_t l = C - 1, n = V * K;
        if (s.dW2) {
            const T* d = s.dW2 + c.bm * n;
            scaled(dW, c.A0[l], d, n);
            dA0[l] += dot(c.W, d, n);
            at_inputs(d);
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
            matmul<T>({rows2, V, 1}, {d, K}, dx, K, C, K, V, {.negate = true});
            if (c.momentum) {
                scaled(dS, c.d0[l], d, n);
                dd0[l] += dot(c.S, d, n);
            }
        } else {
            zero(dW, n);
            if (c.momentum) zero(dS, n);
            zero(dx, C * K);
            zero(dP, C * V);
            zero(dE, C * V);
        }
        if (c.momentum && s.dS2) {
            const T* d = s.dS2 + c.bm * n;
            add_scaled(dS, c.B0[l], d, n);
            dB0[l] += dot(c.S, d, n);
            at_inputs(d);
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

    // One of the two sums of a read, y -= (F * M) Z with F = A or D: dF, dZ and the part of dM, left in `dmatch`.
    void read_sum(
        const T* dy, int64_t out, const T* match, int64_t lag, const T* Z, const T* factor, T* dfactor, T* dZ, T* dmatch,
        bool add
    ) {
        transpose(Z, V, C, out, wide);
        matmul<T>({dy, out, 1}, {wide, C}, work, C, C, C, out, {.out_lower = true, .negate = true});
        for (int64_t t = 0; t < C; t++) {
            const int64_t n = t + 1 - lag;
            const T *f = factor + (t - lag) * C, *d = work + t * C, *with = match + t * C;
            T *df = dfactor + (t - lag) * C, *o = dmatch + t * C;
            if (!add) zero(o, C);
#pragma omp simd
            for (int64_t r = 0; r < n; r++) {
                df[r] += d[r] * with[r];
                o[r] += d[r] * f[r];
            }
        }
        c.masked(work, factor, match, lag);
        matmul<T>({work, 1, C}, {dy, out}, dZ, V, C, out, C, {.upper = true, .negate = true, .add = true});
    }

    void read() {
        T* dq = s.dq + c.b * C * K;
        zero(dq, C * K);
        const int64_t lag = s.before ? 1 : 0;
        const T* dy = s.dy + c.b * C * Q;
        start_term(dy, Q, c.q, dq, nullptr, c.A0, dA0, T(1), lag, c.W, dW);
        if (c.momentum) start_term(dy, Q, c.q, dq, nullptr, c.d0, dd0, T(0), lag, c.S, dS);
        bool both = c.momentum && c.erases;
        if (c.momentum) read_sum(dy, Q, c.Mq, lag, c.P, c.D, dD, dP, work2, false);
        if (c.erases || !c.momentum) read_sum(dy, Q, c.Mq, lag, E, c.A, dA, dE, work2, both);
        matmul<T>({work2, C, 1}, {c.x, K}, dq, K, C, K, C, {.lower = true, .add = true});
        matmul<T>({work2, 1, C}, {c.q, K}, dx, K, C, K, C, {.upper = true, .add = true});
    }

    // z += e * start * (in weight^T) with e = 1 where it is null, from dz [C, out].
    void start_term(
        const T* dz, int64_t out, const T* in, T* din, const T* e, const T* start, T* dstart, T first, int64_t lag,
        const T* weight, T* dweight
    ) {
        matmul<T>({dz, out, 1}, {weight, K}, back, K, C, K, out, {});
        for (int64_t t = 0; t < C; t++) {
            const T along = dot(back + t * K, in + t * K, K), scale = e ? e[t] : T(1);
            const T factor = c.shifted(start, t, lag, first);
            if (t >= lag) dstart[t - lag] += scale * along;
            if (e) de[t] += factor * along;
            add_scaled(din + t * K, scale * factor, back + t * K, K);
            scaled(rows + t * out, scale * factor, dz + t * out, out);
        }
        matmul<T>({rows, 1, out}, {in, K}, dweight, K, out, K, C, {.add = true});
    }

    // P from the triangular solve, with no momentum; leaves d(l g) of the direct path in dP.
    void solve() {
        c.system(work);
        solve_unit_lower_transposed(work, dE, C, V);
        add_scaled(dP, T(1), dE, C * V);
        // dN = -dE E^T; N = e * sh(A) * G.
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
        from_start(dE, c.e);
        at_gram(dG);
    }

    // u with momentum, u = sh(A0) X W^T + sh(d0) X S^T - (sh(D) * G) P - (sh(A) * G) E, where E = e u and, online,
    // P = l (g + u). The solve gives du; then everything but u itself is a sum of a read.
    void solve_with_momentum() {
        T* du = rows2;
        for (int64_t t = 0; t < C; t++) {
            scaled(du + t * V, c.e[t], dE + t * V, V);
            if (c.online) add_scaled(du + t * V, c.lr[t], dP + t * V, V);
        }
        c.system(work);
        solve_unit_lower_transposed(work, du, C, V);
        read_sum(du, V, c.G, 1, c.P, c.D, dD, dP, work2, false);
        if (c.erases) read_sum(du, V, c.G, 1, E, c.A, dA, dE, work2, true);
        for (int64_t t = 0; t < C; t++) de[t] += dot(kept + t * V, dE + t * V, V);
        from_start(du, nullptr);
        start_term(du, V, c.x, dx, nullptr, c.d0, dd0, T(0), 1, c.S, dS);
        at_gram(work2);
    }

    // z = e * sh(A0) * R, R = X W^T, with e = 1 where it is null, from dz.
    void from_start(const T* dz, const T* e) {
        if (!s.drecalled) {
            start_term(dz, V, c.x, dx, e, c.A0, dA0, T(1), 1, c.W, dW);
            return;
        }
        // R is at hand, and what it comes from is somebody else's.
        const T* R = s.recalled + c.bm * C * V;
        T* d = s.drecalled + c.bm * C * V;
        for (int64_t t = 0; t < C; t++) {
            const T along = dot(R + t * V, dz + t * V, V), start = c.shifted(c.A0, t, 1, T(1)), scale = e ? e[t] : T(1);
            if (t) dA0[t - 1] += scale * along;
            if (e) de[t] += start * along;
            scaled(d + t * V, scale * start, dz + t * V, V);
        }
    }

    // G = X X^T, of which only what lies below the diagonal is used.
    void at_gram(const T* dG) {
        matmul<T>({dG, C, 1}, {c.x, K}, dx, K, C, K, C, {.lower = true, .add = true});
        matmul<T>({dG, 1, C}, {c.x, K}, dx, K, C, K, C, {.upper = true, .add = true});
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
            if (c.online) dlr += dot(dP + t * V, kept + t * V, V);
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
        if (c.momentum) {
            if (c.solves) solve_with_momentum();
        } else if (c.erases) {
            solve();
        } else {
            add_scaled(dP, T(1), dE, C * V);
        }
        decay();
        rates();
    }
};
