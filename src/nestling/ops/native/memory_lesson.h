// What a chunk teaches a bank: products with its keys, and inner gradients.
#pragma once

#include "memories.h"

// Pointers of `inner`. key, value [B, C, K]; recalled, g: layer 0 [B, C, rows] (with `apart`, [B, C, apart] and then
// [B, C, rows - apart]), others [B, M, C, out]; H[l], the input of layer l > 0, [B, M, C, hidden]; zv, z_l of the values,
// [B, M, C, out].
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
    T *dkey, *dvalue, *dz[most_layers], *dg[most_layers], *full, *folded, *at_value, *dtop, *spare;

    Lesson(const BankArguments<T>& bank, const LessonArguments<T>& pointers, int64_t index, Scratch<T>& mem)
        : s(bank), p(pointers), b(index), C(bank.C), K(bank.K), L(bank.layers),
          clip(static_cast<T>(bank.clip)), work(bank, mem) {
        key = p.key + b * C * K, value = p.value + b * C * K;
        dkey = p.dkey + b * C * K, dvalue = p.dvalue + b * C * K;
        for (int64_t l = 0; l < L; l++) dz[l] = mem.take(C * s.outputs(l)), dg[l] = mem.take(C * s.outputs(l));
        full = mem.take(C * K), folded = mem.take(C * K), at_value = mem.take(C * K);
        dtop = mem.take(C * s.wide()), spare = mem.take(C * s.wide());
    }

    // Memory m's part of a tensor per layer; layer 0 is stacked in `recalled` and `g`.
    template <class P>
    Rows<P> part(P* const* tensors, int64_t m, int64_t l) const {
        return l ? own(tensors, m, l) : stacked(tensors[0], m * s.hidden);
    }

    // Outputs of layer 0 from row `from` on.
    template <class P>
    Rows<P> stacked(P* data, int64_t from) const {
        data += b * C * s.rows();
        if (!s.apart) return {data + from, s.rows()};
        if (from < s.apart) return {data + from, s.apart};
        return {data + C * s.apart + from - s.apart, s.rows() - s.apart};
    }

    template <class P>
    Rows<P> own(P* const* tensors, int64_t m, int64_t l) const {
        return {tensors[l] + (b * s.memories + m) * C * s.outputs(l), s.outputs(l)};
    }

    T clipped(T g) const { return std::min(std::max(g, -clip), clip); }
    bool inside(T g) const { return g > -clip && g < clip; }
    T error(T output, T target) const { return clipped(s.dot ? -target : output - target); }
    T residual() const { return L > 1 ? T(1) : T(0); }

    // With the weights that make the targets of memory m.
    Work<T, KIND> targets(int64_t m) const {
        Work<T, KIND> found = work;
        if (!m && s.own[0]) found.W = s.own, found.dW = s.d_own;
        return found;
    }

    // Inputs of the last layer, [C, inputs].
    const T* top_inputs(int64_t m) const { return L > 1 ? p.H[L - 1] + (b * s.memories + m) * C * s.hidden : key; }
    int64_t top_offset(int64_t m) const { return L > 1 ? m * K * s.hidden : m * s.hidden * K; }

    T length(int64_t m) const { return !m && s.length ? *s.length : T(1); }

    T target(int64_t m, Rows<T> own, int64_t t, int64_t j) const {
        return length(m) * taught(own, t, j);
    }

    T taught(Rows<T> own, int64_t t, int64_t j) const {
        return s.self_targets ? own[t][j] + residual() * value[t * K + j] : value[t * K + j];
    }

    // What an online write moves to: the error without the part that the write itself takes away.
    void fold(int64_t m, Rows<T> own, Rows<T> top) {
        T* recalled = spare;
        if (s.base) {
            const int64_t in = s.inputs(L - 1);
            transpose(s.base + top_offset(m), in, K, in, work.Wt);
            matmul<T>({top_inputs(m), in, 1}, {work.Wt, K}, recalled, K, C, K, in, {});
        }
        for (int64_t t = 0; t < C; t++)
            for (int64_t j = 0; j < K; j++)
                top[t][j] = residual() * key[t * K + j] - clipped(target(m, own, t, j)) + (s.base ? recalled[t * K + j] : T(0));
    }

    // Gradients of `fold` from those of its result, in `folded`: the target's are left there, negative.
    void fold_back(int64_t m, Rows<T> own, T* dH) {
        const int64_t in = s.inputs(L - 1);
        add_scaled(dkey, residual(), folded, C * K);
        if (s.base) {
            matmul<T>({folded, K, 1}, {s.base + top_offset(m), in}, dH, in, C, in, K, {.add = true});
            matmul<T>({folded, 1, K}, {top_inputs(m), in}, s.dbase + top_offset(m), in, K, in, C, {.add = true});
        }
        for (int64_t t = 0; t < C; t++)
            for (int64_t j = 0; j < K; j++)
                if (!inside(target(m, own, t, j))) folded[t * K + j] = 0;
    }

    void forward(int64_t m) {
        Rows<T> zk[most_layers], zv[most_layers], g[most_layers];
        for (int64_t l = 0; l < L; l++) zk[l] = part(p.recalled, m, l), zv[l] = own(p.zv, m, l), g[l] = part(p.g, m, l);
        T* H[most_layers];
        for (int64_t l = 1; l < L; l++) H[l] = p.H[l] + (b * s.memories + m) * C * s.hidden;
        work.pass(b, m, key, zk, H);
        if (s.self_targets) targets(m).pass(b, m, value, zv);
        errors(m, zk[L - 1], zv[L - 1], g[L - 1]);
        for (int64_t l = L - 2; l >= 0; l--) {
            pull(m, l, g[l + 1]);
            for (int64_t t = 0; t < C; t++) {
                const T *in = zk[l][t], *y = work.y + t * s.hidden;
                T* o = g[l][t];
#pragma omp simd
                for (int64_t j = 0; j < s.hidden; j++) o[j] = clipped(y[j] * act<T, KIND>(in[j]).slope);
            }
        }
        if (s.online) fold(m, zv[L - 1], g[L - 1]);
    }

    // Gradients at the outputs of a memory.
    void errors(int64_t m, Rows<T> outputs, Rows<T> owns, Rows<T> tops) const {
        const T residual = this->residual(), length = this->length(m);
        for (int64_t t = 0; t < C; t++) {
            const T *output = outputs[t], *own = owns[t], *in = key + t * K, *v = value + t * K;
            T* top = tops[t];
            if (s.self_targets) {
#pragma omp simd
                for (int64_t j = 0; j < K; j++) top[j] = error(output[j] + residual * in[j], length * (own[j] + residual * v[j]));
            } else {
#pragma omp simd
                for (int64_t j = 0; j < K; j++) top[j] = error(output[j] + residual * in[j], length * v[j]);
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
        if (s.online) unfold(m, zk, zv, g, dH);
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
        const T through = s.dot ? T(0) : T(1), residual = this->residual();
        const T length = this->length(m), to_value = length * (s.self_targets ? residual : T(1));
        const bool lengthened = !m && s.length;
        if (lengthened && !s.online && s.self_targets) zv[L - 1] = recall_value(m, zv);
        for (int64_t t = 0; t < C; t++) {
            const T* top = g[L - 1][t];
            T *d = dg[L - 1] + t * K, *z = dz[L - 1] + t * K, *in = dkey + t * K, *v = dvalue + t * K;
#pragma omp simd
            for (int64_t j = 0; j < K; j++) {
                d[j] = inside(top[j]) ? d[j] : T(0);
                z[j] += through * d[j];
                in[j] += residual * through * d[j];
            }
            if (s.online) add_scaled(d, T(1), folded + t * K, K);
            add_scaled(v, -to_value, d, K);
            for (int64_t j = 0; lengthened && j < K; j++) *s.d_length -= d[j] * taught(zv[L - 1], t, j);
        }
        work.chain(b, m, key, zk, dz, dH, true, dkey);
        if (!s.self_targets) return;
        scaled(dz[L - 1], -length, dg[L - 1], C * K);
        targets(m).chain(b, m, value, zv, dz, nullptr, false, dvalue);
    }

    // Before the gradients of the errors: those of the folded ones, which the chunk was written with.
    void unfold(int64_t m, Rows<T>* zk, Rows<T>* zv, Rows<T>* g, const T** dH) {
        const int64_t n = C * s.hidden;
        std::copy_n(dg[L - 1], C * K, folded);
        zero(dg[L - 1], C * K);
        T* to = dkey;
        if (L > 1) {
            to = dtop;
            dH[L - 1] ? (void)std::copy_n(dH[L - 1], n, dtop) : zero(dtop, n);
            dH[L - 1] = dtop;
        }
        if (s.self_targets) zv[L - 1] = recall_value(m, zv);
        fold_back(m, zv[L - 1], to);
        g[L - 1] = {full, K};
        errors(m, zk[L - 1], zv[L - 1], g[L - 1]);
    }

    // z_{L-1} of the value, which nobody kept.
    Rows<T> recall_value(int64_t m, const Rows<T>* zv) {
        const int64_t in = s.inputs(L - 1);
        if (L > 1) work.activations(zv[L - 2], work.h);
        transpose(targets(m).W[L - 1] + s.offset(b, m, L - 1), in, K, in, work.Wt);
        matmul<T>({L > 1 ? work.h : value, in, 1}, {work.Wt, K}, at_value, K, C, K, in, {});
        return {at_value, K};
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

    // Whether the gates are rows of the last layer, and so written online.
    bool gates_online() const { return s.online && L == 1; }

    T gate_target(int64_t t, int64_t j, const T* own) const {
        return s.self_targets ? own[t * s.gates + j] : mean_value(t);
    }

    void forward_gates() {
        const int64_t G = s.gates, from = s.memories * s.hidden;
        const Rows<T> recalled = stacked(p.recalled[0], from), g = stacked(p.g[0], from);
        T* before = spare;
        work.gates(b, key, recalled.data, recalled.row);
        if (s.self_targets) work.gates(b, value, work.y, G);
        if (gates_online() && s.base) at_base(before);
        for (int64_t t = 0; t < C; t++)
            for (int64_t j = 0; j < G; j++) {
                const T to = gate_target(t, j, work.y);
                g[t][j] = gates_online() ? (s.base ? before[t * G + j] : T(0)) - clipped(to) : error(recalled[t][j], to);
            }
    }

    void at_base(T* out) {
        transpose(s.base + s.memories * s.hidden * K, K, s.gates, K, work.Wt);
        matmul<T>({key, K, 1}, {work.Wt, s.gates}, out, s.gates, C, s.gates, K, {});
    }

    void backward_gates() {
        const int64_t G = s.gates, from = s.memories * s.hidden;
        T *to_key = work.y, *to_value = work.dh, *at_value = spare;
        if (gates_online() && s.self_targets) work.gates(b, value, at_value, G);
        const Rows<T> g = stacked(p.g[0], from);
        const Rows<const T> dg = p.dg[0] ? stacked(p.dg[0], from) : Rows<const T>{};
        const Rows<const T> dz = p.drecalled[0] ? stacked(p.drecalled[0], from) : Rows<const T>{};
        for (int64_t t = 0; t < C; t++)
            for (int64_t j = 0; j < G; j++) {
                const int64_t i = t * G + j;
                const T up = dg.data ? dg[t][j] : T(0);
                dtop[i] = gates_online() ? up : T(0);
                const bool open = gates_online() ? inside(gate_target(t, j, at_value)) : inside(g[t][j]);
                const T d = open ? up : T(0);
                to_key[i] = (dz.data ? dz[t][j] : T(0)) + (s.dot || gates_online() ? T(0) : d);
                to_value[i] = -d;
                if (!s.self_targets)
                    for (int64_t c = 0; c < K; c++) dvalue[t * K + c] -= d / K;
            }
        if (gates_online() && s.base) {
            matmul<T>({dtop, G, 1}, {s.base + from * K, K}, dkey, K, C, K, G, {.add = true});
            matmul<T>({dtop, 1, G}, {key, K}, s.dbase + from * K, K, G, K, C, {.add = true});
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
