// A bank of MLP memories (nestling/memory/bank.py) at the first weights of a chunk: reads, and the inner gradients.
//
// Layer 0 of all memories is one stacked weight [rows, K], memory m at rows m * hidden, the gates after the last;
// layer l > 0 is [M, out, hidden]. Memory m at x: z_0 = W_0 x, z_l = W_l act(z_{l-1}), output z_{L-1} + x.

#include <cmath>
#include <cstdint>
#include <vector>

#include "exponential.h"
#include "matmul.h"
#include "scratch.h"
#include "vectors.h"

namespace {

constexpr int most_layers = 8;  // MAX_LAYERS of memories.py

template <class T>
struct Bank {
    int64_t problems, first, memories, C, K, hidden, layers, gates, activation, self_targets, dot, threads;
    T clip;
    const T* W[most_layers];
    T* dW[most_layers];

    int64_t outputs(int64_t l) const { return l == layers - 1 ? K : hidden; }
    int64_t inputs(int64_t l) const { return l ? hidden : K; }
    int64_t rows() const { return memories * hidden + gates; }        // of layer 0
    int64_t offset(int64_t b, int64_t m, int64_t l) const {           // of a memory's weight
        return l ? (b * memories + m) * outputs(l) * hidden : (b * rows() + m * hidden) * K;
    }
    int64_t wide() const { return std::max({K, hidden, gates}); }  // of any row of working memory
    int64_t gate_offset(int64_t b) const { return (b * rows() + memories * hidden) * K; }
};

// One activation at one point: value, slope and curvature.
template <class T>
struct Point {
    T value, slope, curve;
};

template <class T, int KIND>
inline Point<T> act(T z) {
    if constexpr (KIND == 0) {
        T s = 1 / (1 + exponential(-z));
        return {z * s, s + z * s * (1 - s), s * (1 - s) * (2 + z * (1 - 2 * s))};
    } else if constexpr (KIND == 1) {
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

template <class T, int KIND>
struct Work {
    const Bank<T>& s;
    const int64_t C, K, L;
    T *Wt, *h, *y, *dh;

    Work(const Bank<T>& bank, Scratch<T>& mem) : s(bank), C(bank.C), K(bank.K), L(bank.layers) {
        const int64_t wide = s.wide();
        Wt = mem.take(wide * wide), h = mem.take(C * wide), y = mem.take(C * wide), dh = mem.take(C * wide);
    }

    // z_l of memory m at x, for all l; `H` keeps the inputs of the layers after the first.
    void pass(int64_t b, int64_t m, const T* x, const Rows<T>* z, T* const* H = nullptr) const {
        for (int64_t l = 0; l < L; l++) {
            const int64_t out = s.outputs(l), in = s.inputs(l);
            T* h = H && l ? H[l] : this->h;
            if (l) activations(z[l - 1], h);
            transpose(s.W[l] + s.offset(b, m, l), in, out, in, Wt);
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

    // The reverse of `pass`. dz[L - 1] holds the gradient of z_{L-1}; with `key`, dz[l] of earlier layers and dH[l], the
    // gradient of act(z_{l-1}), hold what else comes back to them. Adds to dx and to the bank's dW.
    void chain(int64_t b, int64_t m, const T* x, const Rows<T>* z, T* const* dz, const T* const* dH, bool key, T* dx) const {
        for (int64_t l = L - 1; l > 0; l--) {
            const int64_t out = s.outputs(l), at = s.offset(b, m, l), hidden = s.hidden;
            const T* more = key ? dH[l] : nullptr;
            activations(z[l - 1], h);
            matmul<T>({dz[l], out, 1}, {s.W[l] + at, hidden}, dh, hidden, C, hidden, out, {});
            matmul<T>({dz[l], 1, out}, {h, hidden}, s.dW[l] + at, hidden, out, hidden, C, {.add = true});
            if (more) add_scaled(dh, T(1), more, C * hidden);
            if (!key) zero(dz[l - 1], C * hidden);
            for (int64_t t = 0; t < C; t++) {
                const T *in = z[l - 1][t], *d = dh + t * hidden;
                T* o = dz[l - 1] + t * hidden;
#pragma omp simd
                for (int64_t j = 0; j < hidden; j++) o[j] += d[j] * act<T, KIND>(in[j]).slope;
            }
        }
        linear_back(s.offset(b, m, 0), s.hidden, x, dz[0], s.hidden, dx);
    }

    // out = W_0 x over `count` rows of layer 0 at `at`: adds to dx and dW_0.
    void linear_back(int64_t at, int64_t count, const T* x, const T* d, int64_t d_row, T* dx) const {
        matmul<T>({d, d_row, 1}, {s.W[0] + at, K}, dx, K, C, K, count, {.add = true});
        matmul<T>({d, 1, d_row}, {x, K}, s.dW[0] + at, K, count, K, C, {.add = true});
    }

    void gates(int64_t b, const T* x, T* out, int64_t out_row) const {
        transpose(s.W[0] + s.gate_offset(b), K, s.gates, K, Wt);
        matmul<T>({x, K, 1}, {Wt, s.gates}, out, out_row, C, s.gates, K, {});
    }
};

// Pointers of `read`: values [B, count, C, K] and gates [B, C, G] of the memories from `first` on; z kept for backward.
template <class T>
struct Read {
    const T* x;
    T *values, *gate_values, *z[most_layers];
    const T *dvalues, *dgates;
    T* dx;
};

template <class T, int KIND>
void read_one(const Bank<T>& s, const Read<T>& r, int64_t b, Scratch<T>& mem, bool backward) {
    Work<T, KIND> work(s, mem);
    const int64_t C = s.C, K = s.K, L = s.layers, count = s.memories - s.first;
    const T* x = r.x + b * C * K;
    T* dz[most_layers];
    for (int64_t l = 0; l < L; l++) dz[l] = mem.take(C * s.outputs(l));
    T* dx = backward ? r.dx + b * C * K : nullptr;
    if (backward) zero(dx, C * K);
    for (int64_t i = 0; i < count; i++) {
        Rows<T> z[most_layers];
        for (int64_t l = 0; l < L; l++) z[l] = {r.z[l] + (b * count + i) * C * s.outputs(l), s.outputs(l)};
        const int64_t at = (b * count + i) * C * K;
        if (!backward) {
            work.pass(b, s.first + i, x, z);
            std::copy(x, x + C * K, r.values + at);
            add_scaled(r.values + at, T(1), z[L - 1].data, C * K);
        } else if (r.dvalues) {
            std::copy(r.dvalues + at, r.dvalues + at + C * K, dz[L - 1]);
            add_scaled(dx, T(1), dz[L - 1], C * K);
            work.chain(b, s.first + i, x, z, dz, nullptr, false, dx);
        }
    }
    if (!s.gates) return;
    if (!backward) {
        work.gates(b, x, r.gate_values + b * C * s.gates, s.gates);
    } else if (r.dgates) {
        work.linear_back(s.gate_offset(b), s.gates, x, r.dgates + b * C * s.gates, s.gates, dx);
    }
}

// Pointers of `inner`. key, value [B, C, K]; recalled, g: layer 0 [B, C, rows], others [B, M, C, out]; H[l], the input of
// layer l > 0, [B, M, C, hidden]; zv, z_l of the values, [B, M, C, out].
template <class T>
struct Inner {
    const T *key, *value;
    T *H[most_layers], *recalled[most_layers], *g[most_layers], *zv[most_layers];
    const T *dH[most_layers], *drecalled[most_layers], *dg[most_layers];
    T *dkey, *dvalue;
};

template <class T, int KIND>
struct InnerOne {
    const Bank<T>& s;
    const Inner<T>& p;
    const int64_t b, C, K, L;
    Work<T, KIND> work;
    const T *key, *value;
    T *dkey, *dvalue, *dz[most_layers], *dg[most_layers];

    InnerOne(const Bank<T>& bank, const Inner<T>& pointers, int64_t index, Scratch<T>& mem)
        : s(bank), p(pointers), b(index), C(bank.C), K(bank.K), L(bank.layers), work(bank, mem) {
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

    T clipped(T g) const { return std::min(std::max(g, -s.clip), s.clip); }
    bool inside(T g) const { return g > -s.clip && g < s.clip; }
    T error(T output, T target) const { return clipped(s.dot ? -target : output - target); }

    void forward(int64_t m) {
        Rows<T> zk[most_layers], zv[most_layers], g[most_layers];
        for (int64_t l = 0; l < L; l++) zk[l] = part(p.recalled, m, l), zv[l] = own(p.zv, m, l), g[l] = part(p.g, m, l);
        T* H[most_layers];
        for (int64_t l = 1; l < L; l++) H[l] = p.H[l] + (b * s.memories + m) * C * s.hidden;
        work.pass(b, m, key, zk, H);
        if (s.self_targets) work.pass(b, m, value, zv);
        std::copy(value, value + C * K, work.y);
        if (s.self_targets) add_scaled(work.y, T(1), zv[L - 1].data, C * K);
        const T *output = zk[L - 1].data, *target = work.y, *x = key;
        T* top = g[L - 1].data;
#pragma omp simd
        for (int64_t i = 0; i < C * K; i++) top[i] = error(output[i] + x[i], target[i]);
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
        T *d = dg[L - 1], *to_z = dz[L - 1], *to_key = dkey, *to_value = dvalue;
        const T *top = g[L - 1].data, through = s.dot ? T(0) : T(1);
#pragma omp simd
        for (int64_t i = 0; i < C * K; i++) {
            d[i] = inside(top[i]) ? d[i] : T(0);
            to_z[i] += through * d[i];
            to_key[i] += through * d[i];
            to_value[i] -= d[i];
        }
        work.chain(b, m, key, zk, dz, dH, true, dkey);
        if (!s.self_targets) return;
        for (int64_t i = 0; i < C * K; i++) to_z[i] = -d[i];
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

// Takes pointers off the caller's list, one a layer from `from` on.
template <class P>
void take(P* to, void* const*& t, int64_t from, int64_t to_layer) {
    for (int64_t l = from; l < to_layer; l++) to[l] = static_cast<P>(*t++);
}

template <class T, int KIND>
void run(Bank<T> s, void* const* t, bool inner, bool backward) {
    const int64_t L = s.layers;
    Read<T> r{};
    Inner<T> p{};
    if (inner) {
        p.key = static_cast<const T*>(*t++), p.value = static_cast<const T*>(*t++);
        take(p.H, t, 1, L), take(p.recalled, t, 0, L), take(p.g, t, 0, L), take(p.zv, t, 0, L);
    } else {
        r.x = static_cast<const T*>(*t++), r.values = static_cast<T*>(*t++), r.gate_values = static_cast<T*>(*t++);
        take(r.z, t, 0, L);
    }
    if (backward && inner) {
        take(p.dH, t, 1, L), take(p.drecalled, t, 0, L), take(p.dg, t, 0, L);
        p.dkey = static_cast<T*>(*t++), p.dvalue = static_cast<T*>(*t++);
    } else if (backward) {
        r.dvalues = static_cast<const T*>(*t++), r.dgates = static_cast<const T*>(*t++), r.dx = static_cast<T*>(*t++);
    }
    const int64_t wide = s.wide();
    const size_t room = wide * wide + (3 + 2 * L) * s.C * wide + 64 * (4 + 2 * L);
#pragma omp parallel num_threads(s.threads) if (s.problems > 1)
    {
        static thread_local Scratch<T> mem;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < s.problems; b++) {
            mem.reset(room);
            if (inner) {
                InnerOne<T, KIND>(s, p, b, mem).run(backward);
            } else {
                read_one<T, KIND>(s, r, b, mem, backward);
            }
        }
    }
}

template <class T>
void dispatch(const int64_t* sizes, double clip, void* const* t, bool inner, bool backward) {
    Bank<T> s{};
    int64_t* to_sizes[] = {&s.problems, &s.first, &s.memories,   &s.C,            &s.K,   &s.hidden,
                           &s.layers,   &s.gates, &s.activation, &s.self_targets, &s.dot, &s.threads};
    for (int64_t* p : to_sizes) *p = *sizes++;
    s.clip = static_cast<T>(clip);
    take(s.W, t, 0, s.layers);
    if (backward) take(s.dW, t, 0, s.layers);
    if (s.activation == 0) return run<T, 0>(s, t, inner, backward);
    if (s.activation == 1) return run<T, 1>(s, t, inner, backward);
    run<T, 2>(s, t, inner, backward);
}

}  // namespace

extern "C" {
// The tensors: weights; (backward) their gradients, zeroed; then the fields of Inner or Read in their order.
void nestling_memories(
    const int64_t* sizes, double clip, void* const* tensors, int is_double, int inner, int backward
) {
    is_double ? dispatch<double>(sizes, clip, tensors, inner, backward)
              : dispatch<float>(sizes, clip, tensors, inner, backward);
}
}
