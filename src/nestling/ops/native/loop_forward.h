// The forward pass of the loop over chunks.
#pragma once

#include "chunk_forward.h"
#include "loop.h"
#include "memory_lesson.h"
#include "memory_read.h"
#include "normalize.h"

template <class T, Activation KIND>
struct ForwardChunk : LoopChunk<T> {
    using LoopChunk<T>::s, LoopChunk<T>::C, LoopChunk<T>::k, LoopChunk<T>::at;
    const T* const* start;
    Scratch<T>& mem;
    T* spare;  // [memories, C, K] and [C, gates]: what nobody reads again
    const T* const* base;
    const T* const* base_turned;
    const T* const* own;

    ForwardChunk(
        const LoopArguments<T>& loop, int64_t i, int64_t n, const Kept<T>& kept, const T* const* first, Scratch<T>& m,
        T* room, const T* const* initial, const T* const* turned, const T* const* targets
    )
        : LoopChunk<T>(loop, i, n, kept), start(first), mem(m), spare(room), base(initial), base_turned(turned), own(targets) {}

    BankArguments<T> bank() const {
        BankArguments<T> b = s.bank(this->n, start);
        b.base = s.anchored() ? base[s.layers - 1] : nullptr;
        if (s.gain && s.answers) std::copy_n(own, s.layers, b.own);
        if (s.answers && s.value_length) b.length = s.value_length + this->head;
        return b;
    }

    void generate() {
        if (!s.generated() && !s.gates) return;
        const BankArguments<T> bank = this->bank();
        ReadArguments<T> r{};
        T* gates = spare + s.memories * C * s.K;
        for (Role role : {k_role, v_role, q_role})
            if (s.made[role] >= 0) r.x[s.made[role]] = s.u[role] + at * s.K;
        if (s.gates) r.x[most_inputs - 1] = s.u[eta_role] + at * s.K;
        r.values = k.raw, r.gate_values = gates;
        std::copy_n(k.z, s.layers, r.z);
        r.z[s.layers - 1] = spare;
        mem.reset(bank.room());
        read_one<T, KIND>(bank, r, 0, mem, false);
        for (int64_t t = 0; t < s.generated() * C; t++)
            k.scale[t] = normalize_row<T>(s.K, unit_eps, unit_bound, k.raw + t * s.K, k.unit + t * s.K);
        for (auto [role, to] : {std::pair{eta_role, k.eta}, std::pair{alpha_role, k.alpha}})
            for (int64_t t = 0; s.made[role] >= 0 && t < C; t++) to[t] = gates[t * s.gates + s.made[role]];
        if (s.answers) return;
        this->each_made([&](Role role, int64_t from, int64_t to, int64_t n) {
            const T* made = role == eta_role ? k.eta : role == alpha_role ? k.alpha : this->vectors(role);
            std::copy_n(made + from, n, s.y + to);
        });
    }

    void rates() {
        T share[most_layers], hidden[most_layers];
        rates::forward(this->rate_args(share, hidden), 0, 0);
        const int64_t top = s.layers - 1;
        for (int64_t t = 0; s.fold() && t < C; t++) k.e[top][t] = k.lr[top][t] + (s.rates_erase() ? k.e[top][t] : T(0));
        this->fade_surprise();
        this->share_rates();
    }

    void lesson() {
        const BankArguments<T> bank = this->bank();
        LessonArguments<T> p{};
        p.key = this->vectors(k_role), p.value = this->vectors(v_role);
        std::copy_n(k.H, s.layers, p.H), std::copy_n(k.recalled, s.layers, p.recalled);
        std::copy_n(k.g, s.layers, p.g), std::copy_n(k.zv, s.layers, p.zv);
        p.zv[s.layers - 1] = spare;
        mem.reset(bank.room());
        // What of the stack is padding holds zeros.
        const int64_t apart = s.apart(), used = s.memories * s.hidden + s.gates - apart, row = s.rows() - apart;
        for (T* stacked : {k.recalled[0], k.g[0]})
            for (int64_t t = 0; t < C; t++) zero(stacked + C * apart + t * row + used, row - used);
        Lesson<T, KIND>(bank, p, 0, mem).run(false);
    }

    void write(T* const* W2, T* const* S2) {
        for (int64_t l = 0; l < s.layers; l++) {
            if (l && s.answers) {
                const T* in = k.answer[l - 1];
                T* out = k.query[l];
#pragma omp simd
                for (int64_t j = 0; j < C * s.hidden; j++) out[j] = act<T, KIND>(in[j]).value;
            }
            for (int64_t part = 0; part < s.parts(l); part++) {
                ChunkArguments<T> a = this->write_args(l, part);
                const int64_t before = s.weights_before(l, part);
                a.W2 = W2[l] + before, a.S2 = s.momentum ? S2[l] + before : nullptr;
                mem.reset(chunk_room(C, a.K, a.V));
                chunk_forward(a, 0, mem);
            }
            if (!s.anchored() || !s.answers) continue;
            const int64_t in = s.inputs(l), out = s.outputs(l);
            matmul<T>({this->query(l), in, 1}, {base_turned[l], out}, this->answers(l), out, C, out, in, {.add = true});
        }
        if (s.layers > 1 && s.answers) add_scaled(s.y + at * s.K, T(1), this->vectors(q_role), C * s.K);
    }
};

template <class T, Activation KIND>
void loop_forward(const LoopArguments<T>& s, int64_t i, Scratch<T>& mem, Scratch<T>& held) {
    const int64_t L = s.layers, N = s.chunks(), C = s.longest();
    size_t room = s.memories * C * s.K + C * s.gates + 16 + Kept<T>::shared_room(s);
    for (int64_t l = 0; l < L; l++) room += (s.anchored() ? 7 : 3) * (s.numbers(l) + 16);
    held.reset(room);
    T* shared = held.take(Kept<T>::shared_room(s));
    T *first[most_layers], *last[most_layers], *last_s[most_layers];
    T *base[most_layers], *turned[most_layers], *whole[most_layers], *own[most_layers];
    for (int64_t l = 0; s.anchored() && l < L; l++) {
        base[l] = held.take(s.numbers(l)), turned[l] = held.take(s.numbers(l)), whole[l] = held.take(s.numbers(l));
        own[l] = held.take(s.ungained(l));
        s.load(s.base, i % s.heads, l, base[l]);
        transpose(base[l], s.inputs(l), s.outputs(l), s.inputs(l), turned[l]);
    }
    for (int64_t l = 0; l < L; l++) {
        first[l] = held.take(s.numbers(l)), last[l] = held.take(s.numbers(l)), last_s[l] = held.take(s.numbers(l));
        if (s.split) s.load(s.start, i, l, first[l]);
        const Kept<T> k = Kept<T>::of(s, i, 0, shared);
        s.load(s.split ? s.running : s.start, i, l, k.W[l]);
        if (s.momentum) s.load(s.surprise, i, l, k.S[l]);
    }
    T* spare = held.take(s.memories * C * s.K + C * s.gates);
    for (int64_t n = 0; n < N; n++) {
        const Kept<T> k = Kept<T>::of(s, i, n, shared), next = Kept<T>::of(s, i, n + 1 < N ? n + 1 : n, shared);
        const T* const* start = s.fresh(n) ? k.W : first;
        for (int64_t l = 0; s.anchored() && l < L; l++) s.whole(base[l], start[l], l, i % s.heads, whole[l], own[l]);
        ForwardChunk<T, KIND> chunk(s, i, n, k, s.anchored() ? whole : start, mem, spare, base, turned, own);
        chunk.generate();
        chunk.rates();
        chunk.lesson();
        chunk.write(n + 1 < N ? next.W : last, n + 1 < N ? next.S : last_s);
        for (int64_t l = 0; n == N - 1 && l < L; l++) {
            s.store(last[l], i, l, s.last);
            if (s.momentum) s.store(last_s[l], i, l, s.last_surprise);
            if (s.last_start[0]) s.store(k.W[l], i, l, s.last_start);
        }
    }
}
