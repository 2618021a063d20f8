// What a chunk teaches a bank: products with its keys, and inner gradients.
#pragma once

#include "memories.h"

// Pointers of `inner`. key, value [B, C, K]; recalled, g: layer 0 [B, C, rows], others [B, M, C, out]; H[l], the input of
// layer l > 0, [B, M, C, hidden]; zv, z_l of the values, [B, M, C, out].
template <class T>
struct LessonArguments {
    const T *key, *value;
    T *H[most_layers], *recalled[most_layers], *g[most_layers], *zv[most_layers];
    const T *dH[most_layers], *drecalled[most_layers], *dg[most_layers];
    T *dkey, *dvalue;
};

template <class T, Activation KIND>
struct Lesson {
    const BankArguments<T>& s;
    const LessonArguments<T>& p;
    const int64_t b, C, K, L;
    const T clip;
    Work<T, KIND> work;
    const T *key, *value;
    T *dkey, *dvalue, *dz[most_layers], *dg[most_layers];

    Lesson(const BankArguments<T>& bank, const LessonArguments<T>& pointers, int64_t index, Scratch<T>& mem)
        : s(bank), p(pointers), b(index), C(bank.C), K(bank.K), L(bank.layers),
          clip(static_cast<T>(bank.clip)), work(bank, mem) {
        key = p.key + b * C * K, value = p.value + b * C * K;
        dkey = p.dkey + b * C * K, dvalue = p.dvalue + b * C * K;
        for (int64_t l = 0; l < L; l++) dz[l] = mem.take(C * s.outputs(l)), dg[l] = mem.take(C * s.outputs(l));
    }

    // Memory m's part of a tensor per layer; layer 0 is stacked in `recalled` and `g`.
    template <class P>
    Rows<P> part(P* const* tensors, int64_t m, int64_t l) const {
        if (!l) return {tensors[0] + b * C * s.rows() + m * s.hidden, s.rows()};
        return own(tensors, m, l);
    }

    template <class P>
    Rows<P> own(P* const* tensors, int64_t m, int64_t l) const {
        return {tensors[l] + (b * s.memories + m) * C * s.outputs(l), s.outputs(l)};
    }

    T clipped(T g) const { return std::min(std::max(g, -clip), clip); }
    bool inside(T g) const { return g > -clip && g < clip; }
    T error(T output, T target) const { return clipped(s.dot ? -target : output - target); }

    void forward(int64_t m) {
        Rows<T> zk[most_layers], zv[most_layers], g[most_layers];
        for (int64_t l = 0; l < L; l++) zk[l] = part(p.recalled, m, l), zv[l] = own(p.zv, m, l), g[l] = part(p.g, m, l);
        T* H[most_layers];
        for (int64_t l = 1; l < L; l++) H[l] = p.H[l] + (b * s.memories + m) * C * s.hidden;
        work.pass(b, m, key, zk, H);
        if (s.self_targets) work.pass(b, m, value, zv);
        const T residual = L > 1 ? T(1) : T(0);
        for (int64_t t = 0; t < C; t++) {
            const T *output = zk[L - 1][t], *own = zv[L - 1][t], *in = key + t * K, *v = value + t * K;
            T* top = g[L - 1][t];
            if (s.self_targets) {
#pragma omp simd
                for (int64_t j = 0; j < K; j++) top[j] = error(output[j] + residual * in[j], own[j] + residual * v[j]);
            } else {
#pragma omp simd
                for (int64_t j = 0; j < K; j++) top[j] = error(output[j] + residual * in[j], v[j]);
            }
        }
        for (int64_t l = L - 2; l >= 0; l--) {
            pull(m, l, g[l + 1]);
            for (int64_t t = 0; t < C; t++) {
                const T *in = zk[l][t], *y = work.y + t * s.hidden;
                T* o = g[l][t];
#pragma omp simd
                for (int64_t j = 0; j < s.hidden; j++) o[j] = clipped(y[j] * act<T, KIND>(in[j]).slope);
            }
        }
    }

    // y = g_{l+1} W_{l+1}
    void pull(int64_t m, int64_t l, Rows<T> g) {
        const int64_t out = s.outputs(l + 1), hidden = s.hidden;
        matmul<T>({g.data, g.row, 1}, {s.W[l + 1] + s.offset(b, m, l + 1), hidden}, work.y, hidden, C, hidden, out, {});
    }

    void backward(int64_t m) {
        Rows<T> zk[most_layers], zv[most_layers], g[most_layers];
        const T* dH[most_layers];
        for (int64_t l = 0; l < L; l++) {
            zk[l] = part(p.recalled, m, l), zv[l] = own(p.zv, m, l), g[l] = part(p.g, m, l);
            dH[l] = l && p.dH[l] ? p.dH[l] + (b * s.memories + m) * C * s.hidden : nullptr;
            gather(p.drecalled, m, l, dz[l]);
            gather(p.dg, m, l, dg[l]);
        }
        for (int64_t l = 0; l < L - 1; l++) {
            const int64_t hidden = s.hidden, out = s.outputs(l + 1), at = s.offset(b, m, l + 1);
            pull(m, l, g[l + 1]);
            for (int64_t t = 0; t < C; t++) {
                const T *in = zk[l][t], *y = work.y + t * hidden, *gl = g[l][t], *up = dg[l] + t * hidden;
                T *o = dz[l] + t * hidden, *dy = work.dh + t * hidden;
#pragma omp simd
                for (int64_t j = 0; j < hidden; j++) {
                    const Point<T> a = act<T, KIND>(in[j]);
                    const T d = inside(gl[j]) ? up[j] : T(0);
                    o[j] += d * y[j] * a.curve;
                    dy[j] = d * a.slope;
                }
            }
            transpose(s.W[l + 1] + at, hidden, out, hidden, work.Wt);
            matmul<T>({work.dh, hidden, 1}, {work.Wt, out}, dg[l + 1], out, C, out, hidden, {.add = true});
            matmul<T>({g[l + 1].data, 1, g[l + 1].row}, {work.dh, hidden}, s.dW[l + 1] + at, hidden, out, hidden, C,
                      {.add = true});
        }
        const T through = s.dot ? T(0) : T(1), residual = L > 1 ? T(1) : T(0);
        const T to_value = s.self_targets ? residual : T(1);
        for (int64_t t = 0; t < C; t++) {
            const T* top = g[L - 1][t];
            T *d = dg[L - 1] + t * K, *z = dz[L - 1] + t * K, *in = dkey + t * K, *v = dvalue + t * K;
#pragma omp simd
            for (int64_t j = 0; j < K; j++) {
                d[j] = inside(top[j]) ? d[j] : T(0);
                z[j] += through * d[j];
                in[j] += residual * through * d[j];
                v[j] -= to_value * d[j];
            }
        }
        work.chain(b, m, key, zk, dz, dH, true, dkey);
        if (!s.self_targets) return;
        scaled(dz[L - 1], T(-1), dg[L - 1], C * K);
        work.chain(b, m, value, zv, dz, nullptr, false, dvalue);
    }

    void gather(const T* const* tensors, int64_t m, int64_t l, T* out) const {
        const int64_t n = s.outputs(l);
        if (!tensors[l]) return zero(out, C * n);
        Rows<const T> rows = part(tensors, m, l);
        for (int64_t t = 0; t < C; t++) std::copy(rows[t], rows[t] + n, out + t * n);
    }

    T mean_value(int64_t t) const {
        T sum = 0;
        for (int64_t j = 0; j < K; j++) sum += value[t * K + j];
        return sum / K;
    }

    void forward_gates() {
        const int64_t G = s.gates, row = s.rows(), from = s.memories * s.hidden;
        T *recalled = p.recalled[0] + b * C * row + from, *g = p.g[0] + b * C * row + from;
        work.gates(b, key, recalled, row);
        if (s.self_targets) work.gates(b, value, work.y, G);
        for (int64_t t = 0; t < C; t++)
            for (int64_t j = 0; j < G; j++)
                g[t * row + j] = error(recalled[t * row + j], s.self_targets ? work.y[t * G + j] : mean_value(t));
    }

    void backward_gates() {
        const int64_t G = s.gates, row = s.rows(), at = b * C * row + s.memories * s.hidden;
        T *to_key = work.y, *to_value = work.dh;
        for (int64_t t = 0; t < C; t++)
            for (int64_t j = 0; j < G; j++) {
                const int64_t i = at + t * row + j;
                T d = p.dg[0] && inside(p.g[0][i]) ? p.dg[0][i] : T(0);
                to_key[t * G + j] = (p.drecalled[0] ? p.drecalled[0][i] : T(0)) + (s.dot ? T(0) : d);
                to_value[t * G + j] = -d;
                if (!s.self_targets)
                    for (int64_t c = 0; c < K; c++) dvalue[t * K + c] -= d / K;
            }
        work.linear_back(s.gate_offset(b), G, key, to_key, G, dkey);
        if (s.self_targets) work.linear_back(s.gate_offset(b), G, value, to_value, G, dvalue);
    }

    void run(bool back) {
        if (back) {
            zero(dkey, C * K);
            zero(dvalue, C * K);
        }
        for (int64_t m = 0; m < s.memories; m++) back ? backward(m) : forward(m);
        if (s.gates) back ? backward_gates() : forward_gates();
    }
};
