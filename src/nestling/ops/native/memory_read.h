// Reads of a bank.
#pragma once

#include "memories.h"

// Pointers of `read`: values [B, count, C, K] and gates [B, C, G] of the memories from `first` on; z kept for backward.
// x [B, C, K]: what each of these memories reads, and in the last place what the gates read.
template <class T>
struct ReadArguments {
    const T* x[most_inputs];
    T *values, *gate_values, *z[most_layers];
    const T *dvalues, *dgates;
    T* dx[most_inputs];
};

template <class T, Activation KIND>
void read_one(const BankArguments<T>& s, const ReadArguments<T>& r, int64_t b, Scratch<T>& mem, bool backward) {
    Work<T, KIND> work(s, mem);
    const int64_t C = s.C, K = s.K, L = s.layers, count = s.memories - s.first;
    T* dz[most_layers];
    for (int64_t l = 0; l < L; l++) dz[l] = mem.take(C * s.outputs(l));
    for (T* dx : r.dx)
        if (backward && dx) zero(dx + b * C * K, C * K);
    for (int64_t i = 0; i < count; i++) {
        const T* x = r.x[i] + b * C * K;
        T* dx = backward ? r.dx[i] + b * C * K : nullptr;
        Rows<T> z[most_layers];
        for (int64_t l = 0; l < L; l++) z[l] = {r.z[l] + (b * count + i) * C * s.outputs(l), s.outputs(l)};
        const int64_t at = (b * count + i) * C * K;
        if (!backward) {
            work.pass(b, s.first + i, x, z);
            std::copy(z[L - 1].data, z[L - 1].data + C * K, r.values + at);
            if (L > 1) add_scaled(r.values + at, T(1), x, C * K);
        } else if (r.dvalues) {
            std::copy(r.dvalues + at, r.dvalues + at + C * K, dz[L - 1]);
            if (L > 1) add_scaled(dx, T(1), dz[L - 1], C * K);
            work.chain(b, s.first + i, x, z, dz, nullptr, false, dx);
        }
    }
    if (!s.gates) return;
    const T* x = r.x[most_inputs - 1] + b * C * K;
    if (!backward) {
        work.gates(b, x, r.gate_values + b * C * s.gates, s.gates);
    } else if (r.dgates) {
        work.linear_back(s.gate_offset(b), s.gates, x, r.dgates + b * C * s.gates, s.gates,
                         r.dx[most_inputs - 1] + b * C * K);
    }
}
