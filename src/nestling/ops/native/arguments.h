// What both sides must agree on. The structures whose names end in `Arguments`, here and in the other files, are declared
// once, in C++: arguments.py reads these files and lays out the same structures, filled by name.
//
// It understands what stands here and, at the start of such a structure, members of 8 bytes: int64_t, double, an enum of
// this file, pointers to T or uint8_t, and arrays of them whose bound has a name; methods come after all of them. What
// it does not understand it refuses.
#pragma once

#include <cstdint>

constexpr int64_t most_layers = 8;  // of a memory
constexpr int64_t most_inputs = 5;  // of a read: of four memories, and of the gates

enum class Activation : int64_t { silu, gelu, relu };
enum class RateKind : int64_t { online, erase, free, dot, split };
enum class DeltaScale : int64_t { nlms, bounded, literal };

// What memories can make for a chunk; the last one counts them.
enum Role : int64_t { k_role, v_role, q_role, eta_role, alpha_role, all_roles };

// Lets build.py compare the size of a structure here with the one that Python lays out.
#define NESTLING_BYTES(Arguments)                                               \
    extern "C" int64_t nestling_bytes_of_##Arguments() {                        \
        static_assert(sizeof(Arguments<float>) == sizeof(Arguments<double>));   \
        return sizeof(Arguments<double>);                                       \
    }
