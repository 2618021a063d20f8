// The backward pass of the loop over chunks, from the last to the first.
#pragma once

#include "chunk_backward.h"
#include "loop.h"
#include "memory_lesson.h"
#include "memory_read.h"
#include "normalize.h"

// Gradients on their way through one chunk.
template <class T>
struct Upstream {
    T *W[most_layers], *S[most_layers];    // of the weights and surprise after the chunk
    T *W0[most_layers], *S0[most_layers];  // before it
    T* start[most_layers];                 // of the first weights where they are not the running ones
    T *base[most_layers], *whole[most_layers];  // of W_0, of all chunks; of W_0 + F at the start of a chunk
    T* own[most_layers];                        // and of the first memory's W_0 + gain F
    T *x0, *x_part, *H[most_layers], *g[most_layers], *recalled[most_layers];
    T *lr[most_layers], *e[most_layers], *log_a, *log_a_others, *log_b, *each[4];  // each: of every memory, before the sum
    T *vectors[3], *raw, *gates, *eta, *alpha, *log_b_of_rates, *answers, *query;

    Upstream(const LoopArguments<T>& s, Pieces<T>& p) {
        const int64_t C = s.longest(), made = s.generated() * C * s.K;
        for (int64_t l = 0; l < s.layers; l++) {
            const int64_t all = s.numbers(l), of_layer = s.stack(l) * C * s.wide(l);
            W[l] = p.take(all), W0[l] = p.take(all), start[l] = s.split ? p.take(all) : nullptr;
            S[l] = s.momentum ? p.take(all) : nullptr, S0[l] = s.momentum ? p.take(all) : nullptr;
            base[l] = s.anchored() ? p.take(all) : nullptr, whole[l] = s.anchored() ? p.take(all) : nullptr;
            own[l] = s.gain ? p.take(s.ungained(l)) : nullptr;
            H[l] = l ? p.take(s.memories * C * s.hidden) : nullptr;
            g[l] = p.take(of_layer), recalled[l] = p.take(of_layer), lr[l] = p.take(C), e[l] = p.take(C);
        }
        x0 = p.take(C * s.K), x_part = p.take(C * s.K), log_a = p.take(C), log_a_others = p.take(C), log_b = p.take(C), log_b_of_rates = p.take(C);
        for (T*& t : each) t = p.take(std::max<int64_t>(s.memories, 2) * C);
        for (T*& t : vectors) t = p.take(C * s.K);
        raw = p.take(made), gates = p.take(C * s.gates), eta = p.take(C), alpha = p.take(C);
        answers = p.take(C * std::max(s.K, s.hidden)), query = p.take(C * std::max(s.K, s.hidden));
    }
};

template <class T, Activation KIND>
struct BackwardChunk : LoopChunk<T> {
    using LoopChunk<T>::s, LoopChunk<T>::C, LoopChunk<T>::k, LoopChunk<T>::at, LoopChunk<T>::n, LoopChunk<T>::i;
    const Upstream<T>& d;
    const T *const *start, *const *base, *const *fast, *const *own;  // fast: F at the start, where `start` is W_0 + F
    Scratch<T>& mem;

    BackwardChunk(
        const LoopArguments<T>& loop, int64_t i, int64_t n, const Kept<T>& kept, const Upstream<T>& up, const T* const* first,
        const T* const* initial, const T* const* moved, const T* const* targets, Scratch<T>& m
    )
        : LoopChunk<T>(loop, i, n, kept), d(up), start(first), base(initial), fast(moved), own(targets), mem(m) {}

    BankArguments<T> bank() const {
        BankArguments<T> b = s.bank(n, start);
        std::copy_n(s.anchored() ? d.whole : s.fresh(n) ? d.W0 : d.start, s.layers, b.dW);
        if (s.anchored()) b.base = base[s.layers - 1], b.dbase = d.base[s.layers - 1];
        if (s.gain && s.answers) std::copy_n(own, s.layers, b.own), std::copy_n(d.own, s.layers, b.d_own);
        if (s.answers && s.value_length) b.length = s.value_length + this->head, b.d_length = s.d_value_length + i;
        return b;
    }

    // W_0 + F passes its gradients on to both.
    void part_whole() {
        for (int64_t l = 0; s.anchored() && l < s.layers; l++) {
            const int64_t own = s.ungained(l), rest = s.numbers(l) - own;
            T* to = (s.fresh(n) ? d.W0 : d.start)[l];
            add_scaled(d.base[l], T(1), d.whole[l], s.numbers(l));
            add_scaled(to, T(1), d.whole[l], own);
            if (!s.gain) continue;
            add_scaled(d.base[l], T(1), d.own[l], own);
            part_gained(d.own[l], fast[l], own, to);
            part_gained(d.whole[l] + own, fast[l] + own, rest, to + own);
        }
    }

    void part_gained(const T* up, const T* F, int64_t count, T* to) {
        add_scaled(to, s.gain[this->head], up, count);
        s.d_gain[i] += dot(up, F, count);
    }

    // Makes again what the forward pass did not keep.
    void prepare() {
        this->fade_surprise();
        this->share_rates();
        for (int64_t l = 0; s.anchored() && l < s.layers; l++) {
            zero(d.whole[l], s.numbers(l));
            if (s.gain) zero(d.own[l], s.ungained(l));
        }
        for (int64_t t = 0; t < s.generated() * C; t++) {
            const T *in = k.raw + t * s.K, r = k.scale[t], bound = static_cast<T>(unit_bound);
            T* out = k.unit + t * s.K;
#pragma omp simd
            for (int64_t j = 0; j < s.K; j++) out[j] = r * std::min(std::max(in[j], -bound), bound);
        }
        for (int64_t l = 1; l < s.layers; l++) {
            if (s.answers) activations(k.answer[l - 1], k.query[l]);
            for (int64_t m = 0; m < s.memories; m++)
                for (int64_t t = 0; t < C; t++) {
                    const int64_t row = m * C + t;
                    const T* in = l > 1 ? k.recalled[l - 1] + row * s.hidden : stacked(k.recalled[0], m, t);
                    T* out = k.H[l] + row * s.hidden;
#pragma omp simd
                    for (int64_t j = 0; j < s.hidden; j++) out[j] = act<T, KIND>(in[j]).value;
                }
        }
    }

    // A memory's outputs of layer 0.
    const T* stacked(const T* data, int64_t m, int64_t t) const {
        if (!m || !s.apart()) return data + t * (s.apart() ? s.hidden : s.rows()) + m * s.hidden;
        return data + C * s.hidden + t * (s.rows() - s.hidden) + (m - 1) * s.hidden;
    }

    void activations(const T* in, T* out) const {
#pragma omp simd
        for (int64_t j = 0; j < C * s.hidden; j++) out[j] = act<T, KIND>(in[j]).value;
    }

    void write() {
        const int64_t L = s.layers;
        T* d_query = d.vectors[q_role];
        const T* up = s.answers && s.dy ? s.dy + at * s.K : nullptr;
        zero(d_query, C * s.K);
        if (up && L > 1) std::copy_n(up, C * s.K, d_query);
        zero(d.log_a, C);
        zero(d.log_a_others, C);
        zero(d.log_b, C);
        for (int64_t l = L - 1; l >= 0; l--) {
            for (int64_t part = 0; part < s.parts(l); part++) write_part(l, part, up);
            sum_parts(l);
            if (!up) continue;
            read_base(l, up);
            if (!l) {
                add_scaled(d_query, T(1), d.query, C * s.K);
                continue;
            }
            const T *in = k.answer[l - 1], *from = d.query;
            T* to = d.answers;
#pragma omp simd
            for (int64_t j = 0; j < C * s.hidden; j++) to[j] = from[j] * act<T, KIND>(in[j]).slope;
            up = to;
        }
    }

    void write_part(int64_t l, int64_t part, const T* up) {
        ChunkArguments<T> a = this->write_args(l, part);
        const int64_t of_weights = s.weights_before(l, part), of_tokens = s.outputs_before(l, part, C);
        a.dy = up, a.dW2 = d.W[l] + of_weights, a.dW = d.W0[l] + of_weights;
        if (s.momentum) a.dS2 = d.S[l] + of_weights, a.dS = d.S0[l] + of_weights;
        a.dx = l ? d.H[l] + part * C * s.hidden : part ? d.x_part : d.x0, a.dg = d.g[l] + of_tokens;
        a.drecalled = a.recalled ? d.recalled[l] + of_tokens : nullptr, a.dq = d.query;
        a.dlr = d.each[0] + part * C, a.derase = d.each[1] + part * C;
        a.dlog_a = d.each[2] + part * C, a.dlog_b = d.each[3] + part * C;
        mem.reset(chunk_room(C, a.K, a.V));
        Backward<T>(a, 0, mem).run();
        if (!l && part) add_scaled(d.x0, T(1), d.x_part, C * s.K);
    }

    // Of the part of an answer that W_0 gives.
    void read_base(int64_t l, const T* up) {
        if (!s.anchored()) return;
        const int64_t in = s.inputs(l), out = s.outputs(l);
        matmul<T>({up, out, 1}, {base[l], in}, d.query, in, C, in, out, {.add = true});
        matmul<T>({up, 1, out}, {this->query(l), in}, d.base[l], in, out, in, C, {.add = true});
    }

    void sum_parts(int64_t l) {
        zero(d.lr[l], C);
        zero(d.e[l], C);
        for (int64_t part = 0; part < s.parts(l); part++) {
            const bool shared = s.shared(part);
            const T *lr = d.each[0] + part * C, *e = d.each[1] + part * C, share = shared ? s.others[this->head] : T(1);
            add_scaled(d.lr[l], share, lr, C);
            if (s.erases(l)) add_scaled(d.e[l], share, e, C);
            if (shared) s.d_others[i] += dot(lr, k.lr[l], C) + (s.erases(l) ? dot(e, k.e[l], C) : T(0));
            add_scaled(shared ? d.log_a_others : d.log_a, T(1), d.each[2] + part * C, C);
            if (s.momentum) add_scaled(d.log_b, T(1), d.each[3] + part * C, C);
        }
    }

    // log a' = log a + log(1 - share * written / 2), of the memories after the first.
    void fade_back() {
        if (!s.others) return;
        const int64_t top = s.layers - 1;
        const T share = s.others[this->head];
        for (int64_t t = 0; t < C; t++) {
            const T up = d.log_a_others[t], written = this->written(t), g = -up / (2 - share * written);
            d.log_a[t] += up;
            s.d_others[i] += g * written;
            if (!s.fold()) d.lr[top][t] += g * share;
            if (s.erases(top)) d.e[top][t] += g * share;
        }
    }

    void lesson() {
        LessonArguments<T> p{};
        p.key = this->vectors(k_role), p.value = this->vectors(v_role);
        p.dkey = d.vectors[k_role], p.dvalue = d.vectors[v_role];
        std::copy_n(k.recalled, s.layers, p.recalled), std::copy_n(k.g, s.layers, p.g);
        std::copy_n(k.zv, s.layers, p.zv), std::copy_n(d.H, s.layers, p.dH), std::copy_n(d.g, s.layers, p.dg);
        std::copy_n(k.H, s.layers, p.H);
        for (int64_t l = 0; l < s.layers; l++) p.drecalled[l] = s.recalls(n, l) ? d.recalled[l] : nullptr;
        const BankArguments<T> b = bank();
        mem.reset(b.room());
        Lesson<T, KIND>(b, p, 0, mem).run(true);
        add_scaled(p.dkey, T(1), d.x0, C * s.K);
    }

    void rates() {
        fade_back();
        if (s.fold()) add_scaled(d.lr[s.layers - 1], T(1), d.e[s.layers - 1], C);
        if (s.follows()) add_scaled(d.log_a, T(1), d.log_b, C);
        T share[most_layers], hidden[most_layers];
        RatesArguments<T> a = this->rate_args(share, hidden);
        std::copy_n(d.lr, s.layers, a.d_lr), std::copy_n(d.e, s.layers, a.d_e);
        a.d_log_a = d.log_a;
        a.d_eta = s.made[eta_role] < 0 ? s.d_given[eta_role] + at : d.eta;
        if (s.retains()) a.d_alpha = s.made[alpha_role] < 0 ? s.d_given[alpha_role] + at : d.alpha;
        a.d_log_b = d.log_b_of_rates, a.d_eta_bias = s.d_eta_bias + i;
        a.d_alpha_bias = s.d_alpha_bias ? s.d_alpha_bias + i : nullptr;
        a.d_share = s.d_share + i * s.layers;
        a.d_hidden = s.d_hidden_erase ? s.d_hidden_erase + i * (s.layers - 1) : nullptr;
        rates::backward(a, 0, 0);
        if (!s.momentum) return;
        std::copy_n(d.log_b, C, s.d_log_b + at);
        add_scaled(s.d_log_b + at, T(1), d.log_b_of_rates, C);
    }

    void generate() {
        if (!s.answers && s.dy)
            this->each_made([&](Role role, int64_t to, int64_t from, int64_t n) {
                T* made = role == eta_role ? d.eta : role == alpha_role ? d.alpha : d.vectors[role];
                add_scaled(made + to, T(1), s.dy + from, n);
            });
        for (Role role : {k_role, v_role, q_role}) {
            const int64_t m = s.made[role];
            if (m < 0) {
                if (s.given[role]) std::copy_n(d.vectors[role], C * s.K, s.d_given[role] + at * s.K);
                continue;
            }
            for (int64_t t = 0; t < C; t++) {
                const int64_t row = m * C + t, from = row * s.K;
                const T* up = d.vectors[role] + t * s.K;
                normalize_row_back<T>(s.K, unit_bound, k.raw + from, k.unit + from, k.scale[row], up, d.raw + from);
            }
        }
        if (!s.generated() && !s.gates) return;
        for (auto [role, from] : {std::pair{eta_role, d.eta}, std::pair{alpha_role, d.alpha}})
            for (int64_t t = 0; s.made[role] >= 0 && t < C; t++) d.gates[t * s.gates + s.made[role]] = from[t];
        ReadArguments<T> r{};
        for (Role role : {k_role, v_role, q_role})
            if (const int64_t m = s.made[role]; m >= 0) r.x[m] = s.u[role] + at * s.K, r.dx[m] = s.d_u[role] + at * s.K;
        if (s.gates) r.x[most_inputs - 1] = s.u[eta_role] + at * s.K, r.dx[most_inputs - 1] = s.d_u[eta_role] + at * s.K;
        r.dvalues = d.raw, r.dgates = d.gates;
        std::copy_n(k.z, s.layers, r.z);
        const BankArguments<T> b = bank();
        mem.reset(b.room());
        read_one<T, KIND>(b, r, 0, mem, true);
    }
};

template <class T, Activation KIND>
void loop_backward(const LoopArguments<T>& s, int64_t i, Scratch<T>& mem, Scratch<T>& held) {
    const int64_t L = s.layers, N = s.chunks();
    Pieces<T> count;
    Upstream<T>(s, count);
    size_t room = count.used + Kept<T>::shared_room(s) + 16;
    for (int64_t l = 0; l < L; l++) room += (s.anchored() ? 4 : 1) * (s.numbers(l) + 16);
    held.reset(room);
    Upstream<T> d(s, held);
    T* shared = held.take(Kept<T>::shared_room(s));
    T *first[most_layers], *base[most_layers], *whole[most_layers], *own[most_layers];
    for (int64_t l = 0; s.anchored() && l < L; l++) {
        base[l] = held.take(s.numbers(l)), whole[l] = held.take(s.numbers(l)), own[l] = held.take(s.ungained(l));
        s.load(s.base, i % s.heads, l, base[l]);
        zero(d.base[l], s.numbers(l));
    }
    for (int64_t l = 0; l < L; l++) {
        first[l] = held.take(s.numbers(l));
        if (s.split) s.load(s.start, i, l, first[l]), zero(d.start[l], s.numbers(l));
        s.d_last[l] ? s.load(s.d_last, i, l, d.W[l]) : zero(d.W[l], s.numbers(l));
        if (!s.momentum) continue;
        s.d_last_surprise[l] ? s.load(s.d_last_surprise, i, l, d.S[l]) : zero(d.S[l], s.numbers(l));
    }
    for (int64_t n = N - 1; n >= 0; n--) {
        const Kept<T> k = Kept<T>::of(s, i, n, shared);
        const T* const* start = s.fresh(n) ? k.W : first;
        for (int64_t l = 0; s.anchored() && l < L; l++) s.whole(base[l], start[l], l, i % s.heads, whole[l], own[l]);
        BackwardChunk<T, KIND> chunk(s, i, n, k, d, s.anchored() ? whole : start, base, start, own, mem);
        chunk.prepare();
        chunk.write();
        chunk.lesson();
        chunk.rates();
        chunk.generate();
        chunk.part_whole();
        for (int64_t l = 0; l < L; l++) {
            const int64_t given = s.given_numbers(l);
            if (n == N - 1 && s.d_last_start[l]) add_scaled(d.W0[l], T(1), s.d_last_start[l] + i * given, given);
            std::swap(d.W[l], d.W0[l]), std::swap(d.S[l], d.S0[l]);
        }
    }
    for (int64_t l = 0; l < L; l++) {
        s.store(s.split ? d.start[l] : d.W[l], i, l, s.d_start);
        if (s.split) s.store(d.W[l], i, l, s.d_running);
        if (s.momentum) s.store(d.S[l], i, l, s.d_surprise);
        if (s.anchored()) s.store(d.base[l], i, l, s.d_base);
    }
}
