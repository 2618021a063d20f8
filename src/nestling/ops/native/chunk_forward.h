// The forward pass of a chunk.
#pragma once

#include "chunk.h"

template <class T>
void chunk_forward(const ChunkArguments<T>& s, int64_t index, Scratch<T>& mem) {
    Chunk<T> c(s, index, mem);
    const int64_t C = c.C, K = c.K, V = c.V, Q = c.Q, lag = s.before ? 1 : 0;
    T* kept = s.kept + c.bm * C * V;
    T *Wt = mem.take(K * V), *St = mem.take(K * V), *work = mem.take(C * C), *tot = mem.take(C * V);
    T *product = mem.take(C * V), *past = mem.take(C * V);
    const T* recalled = s.recalled ? s.recalled + c.bm * C * V : product;
    if ((c.solves && !s.recalled) || c.reads) transpose(c.W, K, V, K, Wt);
    if (c.momentum && (c.solves || c.reads)) transpose(c.S, K, V, K, St);

    const T* E = kept;
    if (c.solves) {
        if (!s.recalled) matmul<T>({c.x, K, 1}, {Wt, V}, product, V, C, V, K, {});
        if (c.momentum) {
            matmul<T>({c.x, K, 1}, {St, V}, past, V, C, V, K, {});
            c.masked(work, c.D, c.G, 1);
            matmul<T>({work, C, 1}, {c.P, V}, kept, V, C, V, C, {.lower = true, .negate = true});
        }
        for (int64_t t = 0; t < C; t++) {
            T start = c.shifted(c.A0, t, 1, T(1)), start_m = c.momentum ? c.shifted(c.d0, t, 1, T(0)) : T(0);
            const T e = c.e[t], *recall = recalled + t * V;
            T* o = kept + t * V;
            if (c.momentum) {
                const T* pushed = past + t * V;
#pragma omp simd
                for (int64_t v = 0; v < V; v++) o[v] += start * recall[v] + start_m * pushed[v];
            } else {
                const T* step = c.P + t * V;
#pragma omp simd
                for (int64_t v = 0; v < V; v++) o[v] = e * start * recall[v] + step[v];
            }
        }
        c.system(work);
        solve_unit_lower(work, kept, C, V);
        if (c.momentum) {
            c.known(kept, product);
            E = product;
        }
    } else if (c.momentum) {
        zero(kept, C * V);
    } else {
        std::copy(c.P, c.P + C * V, kept);
    }

    if (c.reads) {
        T* y = s.y + c.b * C * Q;
        matmul<T>({c.q, K, 1}, {Wt, V}, y, Q, C, Q, K, {});
        if (c.momentum) matmul<T>({c.q, K, 1}, {St, V}, past, Q, C, Q, K, {});
        for (int64_t t = 0; t < C; t++) {
            scaled(y + t * Q, c.shifted(c.A0, t, lag, T(1)), y + t * Q, Q);
            if (c.momentum) add_scaled(y + t * Q, c.shifted(c.d0, t, lag, T(0)), past + t * Q, Q);
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
