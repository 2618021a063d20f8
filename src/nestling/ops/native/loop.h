// The loop over the chunks of a layer whose memories generate what they learn from (nestling/layers/chunks.py): its
// arguments, and what its forward pass keeps of every chunk.
//
// One problem is a row and a head. A chunk: read k, v, q and the gates from its first weights, as far as memories make
// them; rates; inner gradients; write every layer, and answer the queries, layer i's answers querying layer i + 1.
#pragma once

#include <algorithm>
#include <utility>

#include "chunk.h"
#include "memories.h"
#include "rates.h"

template <class T>
struct LoopArguments {
    int64_t problems, heads, tokens, chunk, first;  // first: tokens of the first chunk
    int64_t K, hidden, layers, memories, gates, self_targets, dot;
    int64_t online;  // the last layer's gradients are those of the token before
    int64_t split;  // the first chunk's running weights are not its first ones
    int64_t momentum, before, online_only, threads;
    int64_t keep;  // a backward pass will come
    int64_t answers;  // the first memory answers the queries; else all generate, and y is what they make, side by side
    double clip, max_erase, floor, stretch;
    Activation activation;
    RateKind kind;
    int64_t made[all_roles];  // index among the generated memories, or among the gates; -1 for what is given
    // [problems, tokens(, K)], null where there is none. u: what the memory of a role reads; the gates read eta's.
    const T *u[all_roles], *given[all_roles], *log_b;
    const T *eta_bias, *alpha_bias, *share, *hidden_erase;
    const T* others;              // [heads], share of the rates for the memories after the first; null is all
    const T* gain;                // [heads], of what memories that generate add to their base; null is 1
    const T* value_length;        // [heads], of M_memory's targets; null is 1
    const T* base[most_layers];   // [heads, ...], what the weights, in the state and below, are the difference to; or null
    const T *start[most_layers], *running[most_layers], *surprise[most_layers];
    T *y, *last[most_layers], *last_surprise[most_layers], *last_start[most_layers];
    T* kept;
    const T *dy, *d_last[most_layers], *d_last_surprise[most_layers], *d_last_start[most_layers];
    T *d_u[all_roles], *d_given[all_roles], *d_log_b, *d_eta_bias, *d_alpha_bias, *d_share, *d_hidden_erase, *d_others, *d_gain, *d_value_length;
    T* d_base[most_layers];  // [problems, ...]
    T *d_start[most_layers], *d_running[most_layers], *d_surprise[most_layers];

    int64_t chunks() const { return 1 + (tokens - first + chunk - 1) / chunk; }
    int64_t begin(int64_t n) const { return n ? first + (n - 1) * chunk : 0; }
    int64_t length(int64_t n) const { return n ? std::min(chunk, tokens - begin(n)) : first; }
    int64_t longest() const { return std::min(chunk, tokens); }
    int64_t at(int64_t i, int64_t n) const { return i * tokens + begin(n); }

    bool retains() const { return given[alpha_role] || made[alpha_role] >= 0; }
    bool rates_erase() const {
        return kind == RateKind::erase || kind == RateKind::split || (kind == RateKind::online && !online_only);
    }
    bool fold() const { return online && !momentum; }  // l joins the last layer's erase
    // Gradients that follow a surprise; it fades with the weights, by a_t times the given b_t.
    bool follows() const { return online && momentum; }
    bool follows(int64_t l) const { return follows() && l == layers - 1; }
    bool erases() const { return fold() || rates_erase(); }
    bool erases(int64_t l) const { return rates_erase() || (fold() && l == layers - 1); }
    bool fresh(int64_t n) const { return n || !split; }
    bool anchored() const { return base[0]; }
    // The lesson's products are those of the weights that are written.
    bool recalls(int64_t n, int64_t l) const { return fresh(n) && (erases(l) || follows(l)) && !anchored(); }

    int64_t outputs(int64_t l) const { return l == layers - 1 ? K : hidden; }
    int64_t inputs(int64_t l) const { return l ? hidden : K; }
    int64_t generated() const { return memories - answers; }
    int64_t made_wide() const { return generated() * K + gates; }
    // Layer 0 is padded to whole vectors: products with it then need no packing.
    int64_t rows() const {
        const int64_t step = 2 * width<T>, n = memories * hidden + gates;
        return (n + step - 1) / step * step;
    }
    int64_t stack(int64_t l) const { return l ? memories : 1; }      // memories of layer l with a weight of their own
    // Parts of layer l that are written by themselves: its memories; of the stacked layer 0 the first memory and, where
    // they have other rates, the rest.
    int64_t parts(int64_t l) const { return l ? memories : others && answers && memories + gates > 1 ? 2 : 1; }
    bool shared(int64_t part) const { return others && (part || !answers); }  // takes a share of the rates
    int64_t apart() const { return parts(0) > 1 ? hidden : 0; }
    int64_t outputs(int64_t l, int64_t part) const {
        if (l || !apart()) return wide(l);
        return part ? rows() - hidden : hidden;
    }
    // Numbers of a layer before a part: of the weights, and of what every token has.
    int64_t weights_before(int64_t l, int64_t part) const { return l ? part * wide(l) * inputs(l) : part * hidden * K; }
    int64_t outputs_before(int64_t l, int64_t part, int64_t C) const { return l ? part * C * wide(l) : part * C * hidden; }
    int64_t wide(int64_t l) const { return l ? outputs(l) : rows(); }  // outputs of such a weight
    int64_t numbers(int64_t l) const { return stack(l) * wide(l) * inputs(l); }  // of all weights of layer l
    int64_t given_numbers(int64_t l) const { return l ? numbers(l) : (memories * hidden + gates) * K; }

    // Numbers of the first memory's weight of a layer, or of all where the others are like it.
    int64_t ungained(int64_t l) const { return !gain ? numbers(l) : !answers ? 0 : l ? wide(l) * inputs(l) : hidden * K; }

    // W_0 + F; of the memories after the first W_0 + gain F, and beside it that of the first, which makes its targets.
    void whole(const T* W0, const T* F, int64_t l, int64_t head, T* out, T* own_out) const {
        const int64_t own = ungained(l), rest = numbers(l) - own;
        sum(out, W0, F, own);
        if (gain) gained(W0, F, head, own, own_out), gained(W0 + own, F + own, head, rest, out + own);
    }

    void gained(const T* W0, const T* F, int64_t head, int64_t n, T* out) const {
        std::copy_n(W0, n, out);
        add_scaled(out, gain[head], F, n);
    }

    BankArguments<T> bank(int64_t n, const T* const* W) const {
        BankArguments<T> b{};
        b.problems = b.threads = 1, b.first = answers, b.memories = memories, b.C = length(n), b.K = K, b.hidden = hidden;
        b.layers = layers, b.gates = gates, b.padding = rows() - memories * hidden - gates;
        b.self_targets = self_targets, b.dot = dot, b.clip = clip, b.apart = apart(), b.online = online;
        std::copy_n(W, layers, b.W);
        return b;
    }

    void load(const T* const* from, int64_t i, int64_t l, T* to) const {
        const int64_t n = given_numbers(l);
        std::copy_n(from[l] + i * n, n, to);
        zero(to + n, numbers(l) - n);
    }

    void store(const T* from, int64_t i, int64_t l, T* const* to) const {
        const int64_t n = given_numbers(l);
        std::copy_n(from, n, to[l] + i * n);
    }
};

// What the forward pass leaves of a chunk, for the backward pass or for the chunk's own next steps; and beside it what
// is cheap to make again, in memory that all chunks share.
template <class T>
struct Kept {
    T *W[most_layers], *S[most_layers];      // running weights and surprise before the chunk
    T *raw, *scale, *z[most_layers];         // of the generated memories: values, 1 / length, z_l
    T *eta, *alpha;                          // generated logits
    T *log_a, *lr[most_layers], *e[most_layers];
    T *recalled[most_layers], *g[most_layers], *zv[most_layers], *E[most_layers];
    T* answer[most_layers];                  // of the reads of layers before the last
    T *unit, *H[most_layers], *query[most_layers];  // shared: raw normalised, act(recalled), act(answer)
    T *lr_others[most_layers], *e_others[most_layers], *log_a_others;  // shared: rates of the memories after the first
    T* log_b;  // shared: of a surprise that fades with the weights

    Kept(const LoopArguments<T>& s, Pieces<T>& own, Pieces<T>& shared) {
        const int64_t C = s.longest(), L = s.layers;
        for (int64_t l = 0; l < L; l++) {
            W[l] = own.take(s.numbers(l));
            S[l] = s.momentum ? own.take(s.numbers(l)) : nullptr;
        }
        raw = own.take(s.generated() * C * s.K), unit = shared.take(s.generated() * C * s.K);
        scale = own.take(s.generated() * C), eta = own.take(C), alpha = own.take(C), log_a = own.take(C);
        for (int64_t l = 0; l < L; l++) {
            const int64_t of_layer = s.stack(l) * C * s.wide(l), hidden = s.memories * C * s.hidden;
            lr[l] = own.take(C), e[l] = s.erases() ? own.take(C) : nullptr;
            recalled[l] = own.take(of_layer), g[l] = own.take(of_layer), E[l] = own.take(of_layer);
            z[l] = zv[l] = answer[l] = nullptr;
            if (l < L - 1) z[l] = own.take(s.generated() * C * s.hidden), answer[l] = own.take(C * s.hidden);
            if (l < L - 1 && s.self_targets) zv[l] = own.take(hidden);
            H[l] = l ? shared.take(hidden) : nullptr, query[l] = l ? shared.take(C * s.hidden) : nullptr;
            lr_others[l] = s.others ? shared.take(C) : nullptr;
            e_others[l] = s.others && s.erases() ? shared.take(C) : nullptr;
        }
        log_a_others = s.others ? shared.take(C) : nullptr, log_b = s.follows() ? shared.take(C) : nullptr;
    }

    static size_t room(const LoopArguments<T>& s) { return rooms(s).first; }
    static size_t shared_room(const LoopArguments<T>& s) { return rooms(s).second; }

    static std::pair<size_t, size_t> rooms(const LoopArguments<T>& s) {
        Pieces<T> own, shared;
        Kept(s, own, shared);
        return {own.used, shared.used};
    }

    // Chunks that a problem has memory for: without a backward pass to come two are enough.
    static int64_t slots(const LoopArguments<T>& s) { return s.keep ? s.chunks() : std::min<int64_t>(s.chunks(), 2); }

    static Kept of(const LoopArguments<T>& s, int64_t i, int64_t n, T* shared) {
        Pieces<T> own{s.kept + (i * slots(s) + n % slots(s)) * room(s)}, beside{shared};
        return Kept(s, own, beside);
    }
};

// A chunk of a loop as the pieces it is made of take it, for either direction.
template <class T>
struct LoopChunk {
    const LoopArguments<T>& s;
    const int64_t i, n, C, at, head;
    const Kept<T>& k;

    LoopChunk(const LoopArguments<T>& loop, int64_t problem, int64_t index, const Kept<T>& kept)
        : s(loop), i(problem), n(index), C(loop.length(index)), at(loop.at(problem, index)), head(problem % loop.heads),
          k(kept) {}

    // k, v or q of the chunk, wherever it comes from.
    const T* vectors(Role role) const {
        return s.made[role] < 0 ? s.given[role] + at * s.K : k.unit + s.made[role] * C * s.K;
    }

    RatesArguments<T> rate_args(T* share, T* hidden) const {
        RatesArguments<T> a{};
        a.rows = a.heads = 1, a.tokens = C, a.layers = s.layers, a.kind = s.kind, a.online_only = s.online_only;
        a.max_erase = s.max_erase, a.floor = s.floor, a.stretch = s.stretch;
        a.eta = s.made[eta_role] < 0 ? s.given[eta_role] + at : k.eta;
        if (s.retains()) a.alpha = s.made[alpha_role] < 0 ? s.given[alpha_role] + at : k.alpha;
        a.log_b = s.log_b ? s.log_b + at : nullptr;
        a.eta_bias = s.eta_bias + head, a.alpha_bias = s.alpha_bias ? s.alpha_bias + head : nullptr;
        for (int64_t l = 0; l < s.layers; l++) {
            share[l] = s.share[l * s.heads + head];
            a.lr[l] = k.lr[l], a.e[l] = k.e[l];
            if (l < s.layers - 1 && s.hidden_erase) hidden[l] = s.hidden_erase[l * s.heads + head];
        }
        a.share = share, a.hidden = hidden, a.log_a = k.log_a;
        return a;
    }

    // The write of a part of layer l, and its read where there is one.
    ChunkArguments<T> write_args(int64_t l, int64_t part) const {
        ChunkArguments<T> a{};
        a.problems = a.threads = a.memories = 1, a.C = C, a.K = s.inputs(l), a.V = s.outputs(l, part);
        a.Q = s.outputs(l), a.normalise = l > 0, a.before = s.before;
        const int64_t of_tokens = s.outputs_before(l, part, C), of_weights = s.weights_before(l, part);
        const bool shared = s.shared(part);
        a.x = l ? k.H[l] + part * C * s.hidden : vectors(k_role), a.g = k.g[l] + of_tokens, a.kept = k.E[l] + of_tokens;
        a.lr = shared ? k.lr_others[l] : k.lr[l], a.erase = !s.erases(l) ? nullptr : shared ? k.e_others[l] : k.e[l];
        a.log_a = shared ? k.log_a_others : k.log_a, a.log_b = log_b();
        a.online = s.follows(l), a.W = k.W[l] + of_weights, a.S = s.momentum ? k.S[l] + of_weights : nullptr;
        a.recalled = s.recalls(n, l) ? k.recalled[l] + of_tokens : nullptr;
        if (part || !s.answers) return a;
        a.q = query(l), a.y = answers(l);
        return a;
    }

    // Every number that a bank without M_memory makes of the chunk's tokens, with its place in y.
    template <class F>
    void each_made(F visit) const {
        const int64_t W = s.made_wide();
        for (Role role : {k_role, v_role, q_role, eta_role, alpha_role}) {
            const bool gate = role == eta_role || role == alpha_role;
            const int64_t n = gate ? 1 : s.K, m = s.made[role];
            for (int64_t t = 0; m >= 0 && t < C; t++)
                visit(role, t * n, (at + t) * W + (gate ? s.generated() * s.K + m : m * s.K), n);
        }
    }

    const T* query(int64_t l) const { return l ? k.query[l] : vectors(q_role); }
    T* answers(int64_t l) const { return l < s.layers - 1 ? k.answer[l] : s.y + at * s.K; }

    const T* log_b() const { return s.follows() ? k.log_b : s.momentum ? s.log_b + at : nullptr; }

    void fade_surprise() const {
        if (s.follows()) sum(k.log_b, s.log_b + at, k.log_a, C);
    }

    // The rates of the memories after the first, from those of the first. They fade as fast as they are written.
    void share_rates() const {
        if (!s.others) return;
        for (int64_t l = 0; l < s.layers; l++) {
            scaled(k.lr_others[l], s.others[head], k.lr[l], C);
            if (s.erases(l)) scaled(k.e_others[l], s.others[head], k.e[l], C);
        }
        for (int64_t t = 0; t < C; t++) k.log_a_others[t] = k.log_a[t] + std::log1p(-s.others[head] * written(t) / 2);
    }

    // e_t + l_t of the last layer, where a folded e_t holds l_t already.
    T written(int64_t t) const {
        const int64_t top = s.layers - 1;
        return (s.fold() ? T(0) : k.lr[top][t]) + (s.erases(top) ? k.e[top][t] : T(0));
    }
};
