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
    T *x0, *H[most_layers], *g[most_layers], *recalled[most_layers];
    T *lr[most_layers], *e[most_layers], *log_a, *log_b, *each[4];  // each: of every memory, before the sum
    T *vectors[3], *raw, *gates, *eta, *alpha, *log_b_of_rates, *answers, *query;

    Upstream(const LoopArguments<T>& s, Pieces<T>& p) {
        const int64_t C = s.longest(), made = s.generated() * C * s.K;
        for (int64_t l = 0; l < s.layers; l++) {
            const int64_t all = s.numbers(l), of_layer = s.stack(l) * C * s.wide(l);
            W[l] = p.take(all), W0[l] = p.take(all), start[l] = s.split ? p.take(all) : nullptr;
            S[l] = s.momentum ? p.take(all) : nullptr, S0[l] = s.momentum ? p.take(all) : nullptr;
            H[l] = l ? p.take(s.memories * C * s.hidden) : nullptr;
            g[l] = p.take(of_layer), recalled[l] = p.take(of_layer), lr[l] = p.take(C), e[l] = p.take(C);
        }
        x0 = p.take(C * s.K), log_a = p.take(C), log_b = p.take(C), log_b_of_rates = p.take(C);
        for (T*& t : each) t = p.take(s.memories * C);
        for (T*& t : vectors) t = p.take(C * s.K);
        raw = p.take(made), gates = p.take(C * s.gates), eta = p.take(C), alpha = p.take(C);
        answers = p.take(C * std::max(s.K, s.hidden)), query = p.take(C * std::max(s.K, s.hidden));
    }
};

template <class T, Activation KIND>
struct BackwardChunk : LoopChunk<T> {
    using LoopChunk<T>::s, LoopChunk<T>::C, LoopChunk<T>::k, LoopChunk<T>::at, LoopChunk<T>::n, LoopChunk<T>::i;
    const Upstream<T>& d;
    const T* const* start;
    Scratch<T>& mem;

    BackwardChunk(
        const LoopArguments<T>& loop, int64_t i, int64_t n, const Kept<T>& kept, const Upstream<T>& up, const T* const* first,
        Scratch<T>& m
    )
        : LoopChunk<T>(loop, i, n, kept), d(up), start(first), mem(m) {}

    BankArguments<T> bank() const {
        BankArguments<T> b = s.bank(n, start);
        std::copy_n(s.fresh(n) ? d.W0 : d.start, s.layers, b.dW);
        return b;
    }

    // Makes again what the forward pass did not keep.
    void prepare() {
        for (int64_t t = 0; t < s.generated() * C; t++) {
            const T *in = k.raw + t * s.K, r = k.scale[t], bound = static_cast<T>(unit_bound);
            T* out = k.unit + t * s.K;
#pragma omp simd
            for (int64_t j = 0; j < s.K; j++) out[j] = r * std::min(std::max(in[j], -bound), bound);
        }
        for (int64_t l = 1; l < s.layers; l++) {
            activations(k.answer[l - 1], k.query[l]);
            for (int64_t m = 0; m < s.memories; m++)
                for (int64_t t = 0; t < C; t++) {
                    const int64_t row = m * C + t;
                    const int64_t from = l > 1 ? row * s.hidden : t * s.rows() + m * s.hidden;
                    const T* in = k.recalled[l - 1] + from;
                    T* out = k.H[l] + row * s.hidden;
#pragma omp simd
                    for (int64_t j = 0; j < s.hidden; j++) out[j] = act<T, KIND>(in[j]).value;
                }
        }
    }

    void activations(const T* in, T* out) const {
#pragma omp simd
        for (int64_t j = 0; j < C * s.hidden; j++) out[j] = act<T, KIND>(in[j]).value;
    }

    void write() {
        const int64_t L = s.layers;
        T* d_query = d.vectors[q_role];
        const T* up = s.dy ? s.dy + at * s.K : nullptr;
        zero(d_query, C * s.K);
        if (up && L > 1) std::copy_n(up, C * s.K, d_query);
        zero(d.log_a, C);
        zero(d.log_b, C);
        for (int64_t l = L - 1; l >= 0; l--) {
            ChunkArguments<T> a = this->write_args(l);
            a.dy = up, a.dW2 = d.W[l], a.dS2 = d.S[l], a.dW = d.W0[l], a.dS = d.S0[l];
            a.dx = l ? d.H[l] : d.x0, a.dg = d.g[l], a.drecalled = a.recalled ? d.recalled[l] : nullptr, a.dq = d.query;
            a.dlr = d.each[0], a.derase = d.each[1], a.dlog_a = d.each[2], a.dlog_b = d.each[3];
            for (int64_t m = 0; m < a.memories; m++) {
                mem.reset(chunk_room(C, a.K, a.V));
                Backward<T>(a, m, mem).run();
            }
            sum_memories(l, a.memories);
            if (!up) continue;
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

    void sum_memories(int64_t l, int64_t memories) {
        zero(d.lr[l], C);
        zero(d.e[l], C);
        for (int64_t m = 0; m < memories; m++) {
            add_scaled(d.lr[l], T(1), d.each[0] + m * C, C);
            if (s.erases()) add_scaled(d.e[l], T(1), d.each[1] + m * C, C);
            add_scaled(d.log_a, T(1), d.each[2] + m * C, C);
            if (s.momentum) add_scaled(d.log_b, T(1), d.each[3] + m * C, C);
        }
    }

    void lesson() {
        LessonArguments<T> p{};
        p.key = this->vectors(k_role), p.value = this->vectors(v_role);
        p.dkey = d.vectors[k_role], p.dvalue = d.vectors[v_role];
        std::copy_n(k.recalled, s.layers, p.recalled), std::copy_n(k.g, s.layers, p.g);
        std::copy_n(k.zv, s.layers, p.zv), std::copy_n(d.H, s.layers, p.dH), std::copy_n(d.g, s.layers, p.dg);
        if (s.fresh(n) && s.erases()) std::copy_n(d.recalled, s.layers, p.drecalled);
        const BankArguments<T> b = bank();
        mem.reset(b.room());
        Lesson<T, KIND>(b, p, 0, mem).run(true);
        add_scaled(p.dkey, T(1), d.x0, C * s.K);
    }

    void rates() {
        if (s.fold) add_scaled(d.lr[0], T(1), d.e[0], C);
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
        for (Role role : {k_role, v_role, q_role}) {
            const int64_t m = s.made[role];
            if (m < 0) {
                std::copy_n(d.vectors[role], C * s.K, s.d_given[role] + at * s.K);
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
        r.x = s.u + at * s.K, r.dvalues = d.raw, r.dgates = d.gates, r.dx = s.d_u + at * s.K;
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
    for (int64_t l = 0; l < L; l++) room += s.numbers(l) + 16;
    held.reset(room);
    Upstream<T> d(s, held);
    T* shared = held.take(Kept<T>::shared_room(s));
    T* first[most_layers];
    for (int64_t l = 0; l < L; l++) {
        first[l] = held.take(s.numbers(l));
        if (s.split) s.load(s.start, i, l, first[l]), zero(d.start[l], s.numbers(l));
        s.d_last[l] ? s.load(s.d_last, i, l, d.W[l]) : zero(d.W[l], s.numbers(l));
        if (!s.momentum) continue;
        s.d_last_surprise[l] ? s.load(s.d_last_surprise, i, l, d.S[l]) : zero(d.S[l], s.numbers(l));
    }
    for (int64_t n = N - 1; n >= 0; n--) {
        const Kept<T> k = Kept<T>::of(s, i, n, shared);
        BackwardChunk<T, KIND> chunk(s, i, n, k, d, s.fresh(n) ? k.W : first, mem);
        chunk.prepare();
        chunk.write();
        chunk.lesson();
        chunk.rates();
        chunk.generate();
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
    }
}
